"""Whole runs: every method in both modes, resumed ones bit for bit, and the search as a library."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from esapn.config import CHOICES, SearchConfig
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream
from esapn.models.two_tower import TwoTower
from esapn.run import checkpoint
from esapn.run.loop import Run
from esapn_kernels import optim
from tests.esapn.tiny import (
    EVENTS,
    ITEMS,
    METHODS,
    RULES,
    TINY,
    USERS,
    both_modes,
    every_method,
    tiny,
    tiny_stream,
)
from tests.helpers import same

CLOCKS = ("seconds",)
VARIANTS = [{"method": method} for method in METHODS] + [
    {"state": "rich", "acting": "argmax"},
    {"state": "rich", "advantage": "normalised", "entropy": 0.1},
    {"row_optimizer": "adagrad", "hops": "linear"},
    {"row_optimizer": "adam", "row_lr": 0.02, "hops": "padded"},
    {"row_optimizer": "adagrad", "hops": "tails"},
    {"row_optimizer": "adam", "hops": "tails"},
    {"method": "darts", "row_optimizer": "adam", "row_lr": 0.02},
]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=["-".join(map(str, v.values())) for v in VARIANTS]
)


# Every method


@every_method
@both_modes
@pytest.mark.parametrize("task", CHOICES["task"])
def test_a_run_gives_finite_measures_and_consistent_memory(method, mode, task):
    stream = tiny_stream(task)
    result = tiny(mode, stream, method=method, task=task).walk()
    assert not result.stopped_early and result.run.done
    assert result.train["events"] == stream.n_train == 500 and result.test["events"] == 200
    for part in (result.train, result.test):
        assert all(torch.tensor(value).isfinite() for value in part.values())
        assert 0 <= part["accuracy"] <= 1 and part["loss"] > 0 and part["log_loss"] > 0
    assert ("auc" in result.test) == (task == "binary")
    assert [line["events"] for line in result.log] == [150, 300, 450, 600, 700]
    check_memory(result, method)


def check_memory(result, method: str) -> None:
    serving = training = 0
    rows = {"user": USERS, "item": ITEMS}
    for (name, n), side in zip(rows.items(), result.memory.values(), strict=True):
        counts = {int(size): count for size, count in side["rows_per_size"].items()}
        parts = ("payload", "slack", "locations", "chain")
        assert side["serving"] == sum(side[part] for part in parts)
        assert side["fixed"] == n * 4 * 4 and side["optimizer"] >= 0
        serving, training = (
            serving + side["serving"],
            training + side["serving"] + side["optimizer"],
        )
        if method == "biases":
            assert not counts and side["payload"] == getattr(result.run.model, name).nbytes
            continue
        assert sum(counts.values()) == n
        if method in ("darts", "autoemb"):
            ids = n + (method == "autoemb")  # the sink row is allocated as well
            assert counts == {7: n} and side["payload"] == 4 * (7 * n + 3 * ids)
        else:
            assert side["payload"] == 4 * sum(size * count for size, count in counts.items())
        assert side["slack"] == 0 or method not in ("fixed", "darts", "autoemb")
    assert result.bytes["serving"] == serving
    assert result.bytes["fixed128"] == sum(side["fixed"] for side in result.memory.values())
    assert result.bytes["training"] >= training
    logged = [line["serving_bytes"] for line in result.log]
    assert result.bytes["serving_peak"] == max(*logged, serving)
    events = [150, 150, 150, 150, 100]
    mean = sum(b * n for b, n in zip(logged, events, strict=True)) / EVENTS
    assert result.bytes["serving_mean"] == pytest.approx(mean)


@pytest.mark.parametrize("method", ["esapn", *RULES])
def test_log_and_sizes_say_what_the_tables_say(method):
    result = tiny(method=method).walk()
    run, last = result.run, result.log[-1]
    for name, n in (("user", USERS), ("item", ITEMS)):
        sizes = getattr(run.model, name).sizes_of()
        assert last[f"mean_{name}_size"] == pytest.approx(sizes.double().mean().item())
        assert last[f"{name}_rows"] == [int((sizes == size).sum()) for size in TINY["sizes"]]
        seen = Counter(getattr(run.stream, name).tolist())
        found = result.sizes_by_frequency[name]
        assert sum(bucket["ids"] for bucket in found) == len(seen) <= n
        for bucket in found:
            mine = [i for i, count in seen.items() if bucket["from"] <= count < bucket["to"]]
            assert bucket["ids"] == len(mine) > 0
            assert bucket["mean_size"] == pytest.approx(sizes[mine].double().mean().item())
    for buckets in result.by_frequency.values():
        assert sum(bucket["events"] for bucket in buckets) == result.test["events"]


def test_a_paper_run_has_the_published_parts():
    stream = tiny_stream()
    config = SearchConfig(batch_size=50)
    assert config == SearchConfig.of_mode("paper", batch_size=50)
    run = Run(config, stream)
    assert isinstance(run.model, TwoTower)
    for name in ("user", "item"):
        norm, activation = getattr(run.model, f"{name}_norm")
        assert isinstance(norm, torch.nn.BatchNorm1d) and isinstance(activation, torch.nn.Tanh)
        table = getattr(run.model, name)
        assert table.sizes == (2, 4, 8, 16, 64, 128) and table.chain.requires_grad
        assert table.arena.storage.std().item() > 0.5
    shapes = [tuple(p.shape) for p in run.model.inference.parameters()]
    assert shapes == [(256,), (256,), (512, 256), (512,), (512,), (512,), (1, 512), (1,)]
    (adam,) = run.optimizers
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["lr"] == 1e-3
    assert {id(p) for p in adam.param_groups[0]["params"]} == {
        id(p) for p in run.model.parameters()
    }
    assert run.search.optimizer.param_groups[0]["lr"] == 1e-4
    for field in run.search.fields:
        assert field.history.length == 5 and not field.policy.rich
        assert field.policy.linear1.weight.shape == (512, 32 + 6)
        assert field.policy.frequency.weight.shape == (4097, 32)


@pytest.mark.parametrize("hops", ["padded", "tails"])
@pytest.mark.parametrize("start", [0.0, 0.25])
def test_a_tuned_run_has_adagrad_rows_that_keep_their_sums(hops, start):
    run = tiny("tuned", row_lr=0.3, hops=hops, row_accumulator=start)
    rows, adam = run.optimizers[0], run.optimizers[-1]
    assert isinstance(rows, optim.Adagrad) and rows.param_groups[0]["lr"] == 0.3
    assert rows.param_groups[0]["initial_accumulator_value"] == start
    named = {id(p): name for name, p in run.model.named_parameters()}
    learnt = {named[id(p)] for p in adam.param_groups[0]["params"]}
    assert learnt == {f"inference.{k}.{part}" for k in (0, 2) for part in ("weight", "bias")}
    table, grow = run.model.user, run.search.grow
    chain = table.chain.clone()

    def sums() -> list[torch.Tensor]:
        """Of the squared gradients of every row."""
        state = rows.state[table.arena.storage]["sum"]
        starts, sizes = table.arena.row_start.tolist(), table.sizes_of().tolist()
        return [state[at : at + d].clone() for at, d in zip(starts, sizes, strict=False)]

    grown = []

    def watched(*arguments) -> None:
        before = sums()
        grow(*arguments)
        for old, new in zip(before, sums(), strict=True):
            expected = old
            if len(new) > len(old):  # e' = g e, so dL/de = g dL/de'
                grown.append(len(new))
                added = torch.full((len(new) - len(old),), start)
                expected = torch.cat([old * len(old) / len(new), added])
            torch.testing.assert_close(new, expected)

    run.step()
    run.search.grow = watched
    run.walk()
    assert set(grown) == {2, 4} and torch.equal(table.chain, chain) == (hops == "padded")


@pytest.mark.parametrize("method", ["darts", "autoemb", "fixed", "never"])
def test_sums_of_rows_start_at_the_accumulator(method):
    run = tiny("tuned", method=method, row_accumulator=0.25)
    (rows,) = [o for o in run.optimizers if "initial_accumulator_value" in o.param_groups[0]]
    assert {id(p) for p in rows.param_groups[0]["params"]} == {id(p) for p in run.model.rows()}
    run.step()
    user = run.model.rows()[0]
    sums, seen = rows.state[user]["sum"], run.stream.batch(0).user.unique()
    assert sums.min() == 0.25 and sums.max() > 0.25
    if method != "never":  # rows of one size, by id
        unseen = torch.ones(len(user), dtype=torch.bool)
        unseen[seen] = False
        assert (sums[unseen] == 0.25).all() and (sums[seen].amax(1) > 0.25).all()
    # Without effect on Adam.
    losses = [
        tiny("tuned", method=method, row_optimizer="adam", row_accumulator=start).walk().test
        for start in (0.0, 0.25)
    ]
    assert losses[0] == losses[1]


@both_modes
def test_tails_have_an_optimizer_of_their_own(mode):
    run = tiny(mode, hops="tails", tail_lr=0.7, lr=1e-3)
    tails = {id(p) for p in run.model.tails()}
    (adam,) = [o for o in run.optimizers if {id(p) for p in o.param_groups[0]["params"]} & tails]
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["lr"] == 0.7
    assert {id(p) for p in adam.param_groups[0]["params"]} == tails and len(tails) == 2
    every = [id(p) for o in run.optimizers[mode == "tuned" :] for p in o.param_groups[0]["params"]]
    rows = [id(p) for p in run.model.rows()] if mode == "tuned" else []
    assert sorted(every + rows) == sorted(id(p) for p in run.model.parameters())
    run.walk()
    assert all(chain.any() for chain in run.model.tails())


@pytest.mark.parametrize("method", ["darts", "autoemb"])
@both_modes
def test_soft_weights_have_an_optimizer_of_their_own(method, mode):
    run = tiny(mode, method=method, policy_lr=0.7)
    soft = {id(p) for table in (run.model.user, run.model.item) for p in table.soft_parameters()}
    groups = [optimizer.param_groups[0] for optimizer in run.optimizers]
    assert {id(p) for p in groups[0]["params"]} == soft and groups[0]["lr"] == 0.7
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in run.model.parameters())


@every_method
@both_modes
def test_a_prediction_does_not_depend_on_labels_to_come(method, mode):
    stream = tiny_stream()
    other = stream.target.clone()
    other[300:] = 1 - other[300:]  # batches 6 and later
    logits: list[list[torch.Tensor]] = []
    for target in (stream.target, other):
        run = tiny(mode, replace(stream, target=target), method=method)
        logits.append([])
        run.model.register_forward_hook(lambda _, __, out: logits[-1].append(out.detach()))
        for _ in range(8):
            run.step()
    assert len(logits[0]) == len(logits[1]) == 8
    assert all(torch.equal(logits[0][k], logits[1][k]) for k in range(7))
    assert not torch.equal(logits[0][7], logits[1][7])


@pytest.mark.parametrize("method", ["esapn", "fixed", "darts", "biases"])
def test_the_seed_says_where_everything_starts(method):
    stream = tiny_stream()
    one, two, other = (tiny(stream=stream, method=method, seed=seed) for seed in (1, 1, 2))
    first = one.step()
    assert torch.equal(two.step(), first)
    assert torch.equal(other.step(), first) == (method == "biases")


# The walk


def test_step_walks_by_itself():
    run, stream = tiny(), tiny_stream()
    assert not run.done and run.index == 0
    losses = [run.step() for _ in range(14)]
    assert run.done and run.index == 14 and run.measures.seen == EVENTS
    assert [len(loss) for loss in losses] == [50] * 14 and len(stream.bounds) == 14
    assert all(not loss.requires_grad for loss in losses)
    total = torch.cat(losses[10:]).double().mean().item()
    assert run.measures.summary("test")["loss"] == pytest.approx(total, rel=1e-5)


def test_progress_and_pause_are_called_with_every_line():
    calls: list[tuple[Any, ...]] = []
    run = tiny()
    result = run.walk(
        progress=lambda done, line: calls.append(("progress", done, line["events"])),
        pause=lambda r: calls.append(("pause", r.index, r is run)),
    )
    lines = [(3, 150), (6, 300), (9, 450), (12, 600), (14, 700)]
    expected = [
        call for done, n in lines for call in (("progress", done, n), ("pause", done, True))
    ]
    assert calls == expected
    assert result.cpu_seconds > 0 and result.wall_seconds > 0


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_early(patience):
    """With a learning rate of nothing no line is better for long."""
    run = tiny(lr=1e-30, row_lr=1e-30, method="never", patience=patience, log_every=1)
    result = run.walk()
    losses = [line["loss"] for line in result.log]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert result.stopped_early and len(losses) == best + 1 + patience < 14
    for k in range(best):  # and nowhere before
        assert min(losses[k + 1 : k + 1 + patience]) < min(losses[: k + 1])
    assert result.train["events"] + result.test["events"] == 50 * len(losses)


def test_patience_of_zero_never_stops():
    assert not tiny(lr=1e-30, row_lr=1e-30, method="never", log_every=1).walk().stopped_early


@pytest.mark.parametrize("steps", [4, 10, 12])
def test_a_run_that_stops_in_either_part_has_a_result(steps):
    run = tiny()
    for _ in range(steps):
        run.step()
    result = run.result()
    assert result.train["events"] == min(50 * steps, 500)
    assert result.test["events"] == max(50 * steps - 500, 0)
    assert result.stopped_early


# Resuming


def place_of(variant: dict[str, Any], mode: str) -> int:
    """Where to stop: drawn once for every case, the first step and the last among them."""
    return sum(map(ord, f"{mode}{sorted(variant.items())}")) % 13 + 1


@every_variant
@both_modes
def test_a_run_goes_on_bit_for_bit_where_it_was_saved(variant, mode, tmp_path):
    stream = tiny_stream()
    whole, first = tiny(mode, stream, **variant), tiny(mode, stream, **variant)
    place = place_of(variant, mode)
    losses = [whole.step() for _ in range(14)]
    for k in range(place):
        assert torch.equal(first.step(), losses[k])
    checkpoint.save(tmp_path, first.index, first.state_dict())
    torch.manual_seed(999)
    second = tiny(mode, stream, **variant)
    found = checkpoint.load(tmp_path)
    assert found is not None and found.step == place
    second.load_state_dict(found.state)
    assert second.index == place
    same(second.state_dict(), first.state_dict(), ignoring=CLOCKS)
    for k in range(place, 14):
        assert torch.equal(second.step(), losses[k])
    assert second.done
    same(second.state_dict(), whole.state_dict(), ignoring=CLOCKS)


@both_modes
def test_a_walk_goes_on_with_its_log(mode, tmp_path):
    stream = tiny_stream()
    whole = tiny(mode, stream).walk()

    class Killed(Exception):
        pass

    def pause(run):
        checkpoint.save(tmp_path, run.index, run.state_dict())
        if run.index == 9:
            raise Killed

    with pytest.raises(Killed):
        tiny(mode, stream).walk(pause=pause)
    second = tiny(mode, stream)
    found = checkpoint.load(tmp_path)
    assert found is not None
    second.load_state_dict(found.state)
    result = second.walk()
    same(result.log, whole.log)
    same([result.train, result.test, result.memory], [whole.train, whole.test, whole.memory])
    same([result.bytes, result.by_frequency], [whole.bytes, whole.by_frequency])
    assert result.cpu_seconds > 0


@pytest.mark.parametrize("place", [1, 3])
def test_patience_goes_on_where_it_was(place, tmp_path):
    settings = {"lr": 1e-30, "row_lr": 1e-30, "method": "never", "patience": 2, "log_every": 1}
    whole = tiny(**settings).walk()
    assert place < len(whole.log) < 14

    def pause(run):
        if run.index == place:
            checkpoint.save(tmp_path, place, run.state_dict())

    tiny(**settings).walk(pause=pause)
    second = tiny(**settings)
    found = checkpoint.load(tmp_path)
    assert found is not None
    second.load_state_dict(found.state)
    assert second.best["line"] in range(place)
    result = second.walk()
    same(result.log, whole.log)
    assert result.stopped_early and second.best == whole.run.best


def test_a_run_that_has_walked_can_go_back(tmp_path):
    """A state loads into a run that is further on, whose rows have other sizes."""
    run = tiny("tuned", state="rich")
    for _ in range(3):
        run.step()
    checkpoint.save(tmp_path, 3, run.state_dict())
    losses = [run.step() for _ in range(11)]
    found = checkpoint.load(tmp_path)
    assert found is not None
    run.load_state_dict(found.state)
    assert all(torch.equal(run.step(), loss) for loss in losses)


def test_load_ratings_and_run_from_the_top():
    """The quickstart of the library, as a user writes it."""
    stream = build_stream(load_ratings("synthetic", events=2_000), batch_size=100)
    result = Run(SearchConfig(batch_size=100, hidden=8, policy_hidden=8), stream).walk()
    assert result.test["events"] == 500 and result.log
