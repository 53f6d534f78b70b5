"""A budget of a run: its shares, its refusals, and what the result and the commands say of it."""

from __future__ import annotations

import re

import pytest
import torch

from esapn.compare.jobs import plan
from esapn.config import ConfigError, SearchConfig
from esapn.data.synthetic import synthetic_ratings
from esapn.methods import method_settings
from esapn.run.loop import check_budget
from esapn.run.result import memory_table, record
from tests.esapn.commands import SMALL, refused, result, search
from tests.esapn.tiny import ITEMS, RULES, USERS, both_modes, tiny, tiny_stream
from tests.helpers import same

PLAIN = (USERS + ITEMS) * 4 * 4
GROWING = ("esapn", *RULES)


def smallest(method="always", mode="paper", **settings):
    """The smallest budget, as the refusal of one byte names it."""
    with pytest.raises(ConfigError) as caught:
        tiny(mode, method=method, budget="1", **settings)
    message = re.fullmatch(r"--budget 1 does not hold .*: (\d+) bytes do", str(caught.value))
    assert message is not None
    return int(message[1])


@pytest.mark.parametrize("hops", ["linear", "padded", "tails"])
@pytest.mark.parametrize("method", [*GROWING, "fixed"])
def test_the_smallest_budget(method, hops):
    """The one that is named does; a byte less does not."""
    least = smallest(method, hops=hops)
    run = tiny(method=method, budget=f"{least} B", hops=hops)
    assert sum(table.budget for table in run.model.tables().values()) <= least
    with pytest.raises(ConfigError, match=f": {least} bytes do"):
        tiny(method=method, budget=str(least - 1), hops=hops)
    with pytest.raises(ConfigError, match=f": {least} bytes do"):
        check_budget(
            SearchConfig(**run.config.to_json() | {"budget": "2", "sizes": (1, 2, 4)}), run.stream
        )


def test_shares_are_of_ids_times_the_last_size():
    """Beyond the first size users and items get it by the square root of their ids."""
    tables = tiny(method="always", budget="130%").model.tables()
    fresh = tiny(method="always").model.tables()
    more = {name: table.budget - fresh[name].least_budget for name, table in tables.items()}
    assert sum(table.budget for table in tables.values()) == pytest.approx(1.3 * PLAIN, abs=2)
    assert more["user"] / more["item"] == pytest.approx((USERS / ITEMS) ** 0.5, rel=0.01)
    tables = tiny(method="fixed", fixed_size=2, budget="3 kB").model.tables()
    assert [t.budget for t in tables.values()] == [USERS * 2 * 4, ITEMS * 2 * 4]


@both_modes
@pytest.mark.parametrize("method", GROWING)
def test_no_step_exceeds_it(method, mode):
    least = smallest(method, mode)
    run = tiny(mode, method=method, budget=str(least + 200), threshold=1.0)
    tables = run.model.tables().values()
    while not run.done:
        sizes = [table.sizes_of() for table in tables]
        refused_before = [table.refused for table in tables]
        run.step()
        for table, before, count in zip(tables, sizes, refused_before, strict=True):
            report = table.memory_report()
            assert report.serving <= table.budget and table.refused >= count
            assert (table.sizes_of() >= before).all()
    found = run.result()
    assert found.bytes["budget"] <= least + 200 and found.bytes["serving_peak"] <= least + 200
    assert found.bytes["refused"] == sum(table.refused for table in tables)
    if method in ("always", "thresholds"):
        assert found.bytes["refused"] > 0
    sides = found.memory.values()
    assert found.bytes["refused"] == sum(side["refused"] for side in sides)
    assert f"rows refused for want of room: {found.bytes['refused']:,}" in memory_table(
        found.memory
    )


def test_counts_fill_it_and_never_exceed_it():
    least = smallest("counts")
    run = tiny(method="counts", budget=str(least + 200), move_every=1, half_life=60.0)
    tables = run.model.tables().values()
    while not run.done:
        run.step()
        for table in tables:
            assert table.memory_report().serving <= table.budget
    report = run.growth.report()
    assert sum(table.promoted for table in report.tables.values()) > 50
    assert sum(table.demoted for table in report.tables.values()) > 0  # with decay rows shrink
    found = run.result().bytes
    assert found["serving_peak"] <= found["budget"] <= least + 200
    # Beside the rows a count of 4 bytes for every ID, at the least.
    counters = found["training"] - found["serving"] - optimizer_bytes(run)
    assert counters > 4 * (USERS + ITEMS)


def optimizer_bytes(run):
    return sum(side["optimizer"] for side in run.memory().values())


def test_counts_need_one():
    with pytest.raises(ConfigError, match="^--method counts needs --budget: its rows fill it$"):
        SearchConfig(method="counts")


def test_counts_need_several_sizes():
    with pytest.raises(ConfigError, match=r"^--sizes must be several for --method counts, got \[4"):
        SearchConfig(method="counts", budget="300%", sizes=(4,))


def test_a_large_budget_changes_nothing():
    """No number of a run, of a policy's neither."""
    one, other = (tiny(budget=budget).walk() for budget in ("", "1 MB"))
    assert other.bytes["refused"] == 0 and one.test == other.test
    same(one.run.search.state_dict(), other.run.search.state_dict())
    assert "budget" not in one.bytes and "budget" not in memory_table(one.memory)


@pytest.mark.parametrize("method", ["esapn", "always", "counts"])
def test_a_resumed_run_goes_on_counting(method):
    stream, budget = tiny_stream(), str(smallest(method) + 100)
    whole = tiny(stream=stream, method=method, budget=budget)
    half = tiny(stream=stream, method=method, budget=budget)
    for _ in range(7):
        half.step()
    again = tiny(stream=stream, method=method, budget=budget)
    again.load_state_dict(half.state_dict())
    expected, found = whole.walk(), again.walk()
    assert found.bytes == expected.bytes and found.test == expected.test
    old = half.state_dict()
    del old["refused"]  # of a run that was written before there were budgets
    again.load_state_dict(old)
    assert again.refused == {}


def test_a_run_goes_on_whose_budget_was_split_by_ids():
    """As it was before rows grew by counts, whose state no such checkpoint holds."""
    stream, settings = tiny_stream(), {"method": "always", "budget": "260%"}
    whole, half, again = (tiny(stream=stream, **settings) for _ in range(3))
    for run in (whole, half):
        for (name, table), ids in zip(run.model.tables().items(), (USERS, ITEMS), strict=True):
            assert name == ("user" if ids == USERS else "item")
            table.set_budget(int(2.6 * PLAIN) * ids // (USERS + ITEMS))
    for _ in range(7):
        half.step()
    old = half.state_dict()
    del old["growth"]
    again.load_state_dict(old)
    expected, found = whole.walk(), again.walk()
    assert found.bytes == expected.bytes and found.test == expected.test


@pytest.mark.parametrize("method", ["darts", "autoemb", "biases"])
def test_methods_without_rows_of_sizes(method):
    with pytest.raises(ConfigError, match=f"^--budget is for methods .*, got {method}$"):
        SearchConfig(method=method, budget="3%")


@pytest.mark.parametrize("budget", ["x", "-1", "0", "3 XB", " ", "1e3"])
def test_nonsense(budget):
    with pytest.raises(ConfigError, match="^--budget must be bytes as"):
        SearchConfig(budget=budget)


def test_on_the_command_line(capsys, tmp_path):
    folder = tmp_path / "out"
    arguments = ("--out", folder, "--sizes", 2, 4, 8, *SMALL, "--method", "always")
    said = refused(capsys, *arguments, "--budget", "1%")
    least = int(said.split(": ")[-1].split()[0])
    assert not folder.exists()
    assert search(*arguments, "--budget", f"{least + 500} B") == 0
    found = result(folder)
    assert found["config"]["budget"] == f"{least + 500} B"
    assert found["bytes"]["serving_peak"] <= found["bytes"]["budget"] <= least + 500
    assert found["bytes"]["refused"] > 0
    out = capsys.readouterr().out
    assert f"rows refused for want of room: {found['bytes']['refused']:,}" in out
    assert search(*arguments[:-1], "fixed", "--fixed-size", 8, "--budget", "99%") == 2


def test_as_a_setting_of_a_method(tmp_path):
    assert method_settings("power-1,budget=2.5%")[1]["budget"] == "2.5%"
    assert method_settings("esapn,budget=64MB")[1]["budget"] == "64MB"
    options = {
        **{"common": {"order": "shuffle", "batch_size": 50}, "tasks": ["binary"], "seeds": [0]},
        **{"modes": ["paper"], "folder": tmp_path},
    }
    ratings = synthetic_ratings(700, n_users=USERS, n_items=ITEMS)
    _, jobs = plan(ratings, methods=["always", "always,budget=200%"], **options)
    assert [job.config.budget for job in jobs] == ["", "200%"]
    with pytest.raises(ConfigError, match="--budget 1% does not hold the rows"):
        plan(ratings, methods=["always", "always,budget=1%"], **options)


def test_what_is_kept_of_a_run():
    ratings = synthetic_ratings(700, n_users=USERS, n_items=ITEMS)
    run = tiny(method="always", budget="200%")
    kept = record(run.config, ratings, run.stream, run.walk())
    assert kept["bytes"]["budget"] == sum(s["budget"] for s in kept["memory"].values()) <= 2 * PLAIN
    assert kept["config"]["budget"] == "200%"
    assert SearchConfig.complete({"seed": 1})["budget"] == ""
    assert torch.tensor(kept["bytes"]["serving_peak"]) <= 2 * PLAIN
