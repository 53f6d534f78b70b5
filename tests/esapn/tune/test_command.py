"""``tune`` as a user starts it: what it writes, goes on with and refuses."""

from __future__ import annotations

import csv
import json
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from esapn import config as config_module
from esapn.tune import command
from esapn.tune.space import ROWS
from tests.esapn.commands import CSV, run
from tests.esapn.commands import ROWS as LINES

pytestmark = pytest.mark.usefixtures("threads", "own_cache")
METHODS = ("fixed-2", "counts-300%", "esapn")
SMALL = ("--events", 600, "--batch-size", 50, "--sizes", 1, 2, 4, "--workers", 1)


class Here:
    """The processes of a pool, without processes."""

    def submit(self, work, *arguments):
        future: Future = Future()
        future.set_result(work(*arguments))
        return future


@pytest.fixture
def here(monkeypatch):
    @contextmanager
    def pool(workers):
        yield Here()

    monkeypatch.setattr(command, "pool", pool)


def tune(out, *more, trials=4, orders=2, methods=METHODS) -> int:
    arguments = [*SMALL, "--trials", trials, "--orders", orders, "--out", out, *more]
    return run("tune", *arguments, *(["--methods", *methods] if methods else []))


def lines(out) -> list[dict[str, str]]:
    with (out / "trials.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def settings(out) -> dict:
    return json.loads((out / "settings.json").read_text())


def test_the_same_trials_of_every_method_and_a_choice_of_each(here, tmp_path, capsys):
    assert tune(tmp_path / "out") == 0
    rows = lines(tmp_path / "out")
    for method in METHODS:
        firsts = [r for r in rows if r["method"] == method and r["order"] == "0"]
        assert [r["trial"] for r in firsts] == ["0", "1", "2", "3"]
        # The mode's own settings first, points that all methods share after it.
        assert {n: float(firsts[1][n]) for n in ROWS} == {n: float(rows[3][n]) for n in ROWS}
        assert (firsts[0]["policy_lr"] != "") == (method == "esapn")
    found = settings(tmp_path / "out")
    assert found["orders"] == [0, 1] and list(found["methods"]) == list(METHODS)
    for method, about in found["methods"].items():
        mine = [r for r in rows if r["method"] == method and r["trial"] == about["trial"]]
        losses = {r["order"]: float(r["validation"]) for r in mine}
        assert about["loss"] == pytest.approx((losses["0"] + losses["1"]) / 2)
        default = {
            r["order"]: float(r["validation"])
            for r in rows
            if r["method"] == method and r["trial"] == "0"
        }
        assert about["less"]["default"] == pytest.approx(
            [losses[k] - default[k] for k in ("0", "1")]
        )
    captured = capsys.readouterr()
    assert all(method in captured.out for method in METHODS)
    assert (tmp_path / "out" / "tuning.png").stat().st_size > 1000


def test_the_same_command_goes_on_and_more_trials_are_added(here, tmp_path):
    assert tune(tmp_path / "whole", trials=6) == 0
    whole = lines(tmp_path / "whole")
    assert tune(tmp_path / "parts", trials=3) == 0
    path = tmp_path / "parts" / "trials.csv"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join(text[:5]) + text[5][:11])  # killed while it wrote
    assert tune(tmp_path / "parts", trials=6) == 0

    def order_0(rows):
        return sorted(
            (tuple(r.items()) for r in rows if r["order"] == "0"), key=lambda r: (r[0], r[1])
        )

    assert order_0(lines(tmp_path / "parts")) == order_0(whole)
    before = lines(tmp_path / "parts")
    assert tune(tmp_path / "parts", trials=6) == 0
    assert lines(tmp_path / "parts") == before
    assert settings(tmp_path / "parts")["methods"] == settings(tmp_path / "whole")["methods"]


def test_a_choice_is_checked_on_other_orders(here, tmp_path, capsys):
    assert tune(tmp_path / "one") == 0
    assert tune(tmp_path / "two", "--positive-above", 2.5) == 0
    capsys.readouterr()
    more = ["--check", tmp_path / "one", tmp_path / "two", "--first-order", 2]
    assert tune(tmp_path / "check", *more, methods=None) == 0
    rows = lines(tmp_path / "check")
    assert len(rows) == 3 * 2 * 4  # methods, orders, settings
    chosen = {name: settings(tmp_path / name)["methods"] for name in ("one", "two")}
    shared = [{n: row[n] for n in ROWS} for row in rows if row["trial"] == "shared"]
    assert all(each == shared[0] for each in shared)
    assert {n: float(v) for n, v in shared[0].items()} in [
        {n: about["settings"][n] for n in ROWS} for by in chosen.values() for about in by.values()
    ]
    for row in rows:
        assert row["order"] in ("2", "3")
        if row["trial"] in chosen:
            own = chosen[row["trial"]][row["method"]]["settings"]
            assert {n: float(row[n]) for n in own} == own
    found = settings(tmp_path / "check")["methods"]
    assert {about["trial"] for about in found.values()} <= {"default", "shared", "one", "two"}
    # The order of the folders changes no settings: only the first gives the methods.
    more = ["--check", tmp_path / "two", tmp_path / "one", "--first-order", 2]
    assert tune(tmp_path / "turned", *more, methods=None) == 0
    key = lambda row: (row["method"], row["trial"], row["order"])  # noqa: E731
    assert sorted(lines(tmp_path / "turned"), key=key) == sorted(rows, key=key)


def test_processes_give_what_one_process_gives(here, tmp_path, monkeypatch):
    assert tune(tmp_path / "one", trials=11, methods=("fixed-2",)) == 0
    monkeypatch.undo()
    monkeypatch.setenv("ESAPN_CACHE", str(tmp_path / "cache"))
    assert tune(tmp_path / "two", "--workers", 3, trials=11, methods=("fixed-2",)) == 0
    key = lambda row: (row["method"], int(row["trial"]), row["order"])  # noqa: E731
    assert sorted(lines(tmp_path / "one"), key=key) == sorted(lines(tmp_path / "two"), key=key)


def refusal(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run("tune", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "error: " in captured.err and not captured.out
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", 0], "--trials must be at least 1"),
        (["--orders", 0], "--orders must be at least 1"),
        (["--first-order", -1], "--first-order must lie between 0 and"),
        (["--first-order", 2**32 - 1, "--orders", 2], "--first-order must lie between 0 and"),
        (["--order-seed", 2**32], "--order-seed must lie between 0 and"),
        (["--order-seed", -1], "--order-seed must lie between 0 and"),
        (["--events", 200], "less than one batch a quarter"),
        (["--methods", "fixt-2"], "unknown method"),
        (["--methods", "biases"], "nothing to tune"),
        (["--methods", "fixed-2,row_lr=0.1,row_accumulator=0.1,init_std=0.1"], "nothing to tune"),
        (["--methods", "counts-1%"], "--methods counts-1%: --budget 1% does not hold the rows"),
        (["--check", "absent"], "No such file"),
        (["--task", "triple"], "invalid choice"),
        (["--order", "time"], "needs timestamps"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "ratings.csv"
    data.write_text("user,item,rating\n" + LINES.replace(",0\n", "\n"))
    if "time" in arguments:
        text = "".join(line.rsplit(",", 1)[0] + "\n" for line in LINES.splitlines())
        data.write_text("user,item,rating\n" + text)
        arguments = [*arguments, "--data", data]
    assert said in refusal(capsys, *SMALL, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_data_orders_or_settings_is_refused(here, tmp_path, capsys):
    data = tmp_path / "ratings.csv"
    data.write_text(CSV + LINES)
    assert tune(tmp_path / "out", trials=1, orders=1, methods=("fixed-2",)) == 0
    kept = (tmp_path / "out" / "trials.csv").read_bytes()
    same = [*SMALL, "--methods", "fixed-2", "--out", tmp_path / "out"]
    for other in (
        ["--orders", 2],
        ["--orders", 1, "--data", data],
        ["--orders", 1, "--order-seed", 1],
        ["--orders", 1, "--task", "multiclass"],
        ["--orders", 1, "--check", tmp_path / "out"],
    ):
        assert "use another --out" in refusal(capsys, *same, *other)
    (tmp_path / "out" / "tune.json").write_text("{}")
    assert "cannot be read" in refusal(capsys, *same, "--orders", 1)
    (tmp_path / "out" / "tune.json").unlink()
    assert "but no tune.json" in refusal(capsys, *same, "--orders", 1)
    assert (tmp_path / "out" / "trials.csv").read_bytes() == kept


def test_trials_that_cannot_be_read_are_left_as_they_are(here, tmp_path, capsys):
    assert tune(tmp_path / "out", trials=1, orders=1, methods=("fixed-2",)) == 0
    (tmp_path / "out" / "trials.csv").write_text("mine\n1")
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    same = [*SMALL, "--methods", "fixed-2", "--out", tmp_path / "out", "--orders", 1]
    assert "cannot be read as trials" in refusal(capsys, *same, "--trials", 2)
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_trials_of_other_settings_are_not_taken_for_the_present_ones(
    here, tmp_path, capsys, monkeypatch
):
    assert tune(tmp_path / "one", trials=2, orders=1, methods=("fixed-2",)) == 0
    more = ["--check", tmp_path / "one", "--first-order", 5, "--orders", 1]
    assert tune(tmp_path / "check", *more, methods=None) == 0
    held = settings(tmp_path / "one")
    held["methods"]["fixed-2"]["settings"]["row_lr"] = 0.123
    (tmp_path / "one" / "settings.json").write_text(json.dumps(held))
    same = [*SMALL, "--out", tmp_path / "check", *more]
    assert "'one' of fixed-2 has other settings" in refusal(capsys, *same)
    monkeypatch.setitem(config_module._TUNED["binary"]["methods"], "fixed-2", {"row_lr": 0.321})
    same = [*SMALL, "--methods", "fixed-2", "--out", tmp_path / "one", "--orders", 1]
    assert "'0' of fixed-2 has other settings" in refusal(capsys, *same)


def test_fewer_trials_leave_the_others_out_of_the_choice(here, tmp_path):
    assert tune(tmp_path / "out", trials=4, orders=1, methods=("fixed-2",)) == 0
    before = lines(tmp_path / "out")
    assert tune(tmp_path / "out", trials=1, orders=1, methods=("fixed-2",)) == 0
    assert lines(tmp_path / "out") == before
    assert settings(tmp_path / "out")["methods"]["fixed-2"]["trial"] == "0"


def test_a_check_walks_other_orders_than_the_choice(here, tmp_path, capsys):
    assert tune(tmp_path / "one", trials=1, orders=2, methods=("fixed-2",)) == 0
    more = ["--check", tmp_path / "one", "--out", tmp_path / "out"]
    said = refusal(capsys, *SMALL, *more, "--first-order", 1, "--orders", 1)
    assert "settings were chosen on order 1" in said and not (tmp_path / "out").exists()
    assert tune(tmp_path / "out", "--check", tmp_path / "one", orders=1, methods=None) == 0
    assert {row["order"] for row in lines(tmp_path / "out")} == {"2"}


@pytest.mark.parametrize("names", [("a/t", "b/t"), ("default",), ("shared",)])
def test_folders_that_cannot_be_told_apart_are_refused(names, tmp_path, capsys):
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        about = {"settings": dict.fromkeys(ROWS, 0.1)}
        held = {"orders": [0], "methods": {"fixed-2": about}}
        (folder / "settings.json").write_text(json.dumps(held))
    said = refusal(capsys, *SMALL, "--out", tmp_path / "out", "--check", *folders)
    assert "name it otherwise" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", '{"methods": {"esapn": {}}}', "nonsense", '{"orders": [0], "methods": {}}'),
        '{"orders": [0], "methods": {"fixed-2": {"settings": {"row_lr": "x"}}}}',
        '{"orders": [0], "methods": {"fixed-2": {"settings": {"row_lr": null}}}}',
        '{"orders": [0], "methods": {"fixed-2": {"settings": {}}}}',
    ],
)
def test_a_check_of_what_is_no_choice_is_refused(text, tmp_path, capsys):
    (tmp_path / "settings.json").write_text(text)
    said = refusal(capsys, *SMALL, "--out", tmp_path / "out", "--check", tmp_path)
    assert "no settings that were chosen" in said


def test_a_check_of_settings_out_of_range_is_refused(tmp_path, capsys):
    about = {"settings": {**dict.fromkeys(ROWS, 0.1), "row_lr": -1}}
    held = {"orders": [0], "methods": {"fixed-2": about}}
    (tmp_path / "settings.json").write_text(json.dumps(held))
    said = refusal(capsys, *SMALL, "--out", tmp_path / "out", "--check", tmp_path)
    assert "--row-lr must be positive" in said and not (tmp_path / "out").exists()


def test_a_check_of_a_method_that_was_not_tuned_is_refused(here, tmp_path, capsys):
    assert tune(tmp_path / "one", trials=1, orders=1, methods=("fixed-2",)) == 0
    more = ["--check", tmp_path / "one", "--methods", "esapn", "--out", tmp_path / "out"]
    assert "'esapn' was not tuned there" in refusal(capsys, *SMALL, *more)
    assert not (tmp_path / "out").exists()
