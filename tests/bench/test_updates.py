"""bench: the gates of steps, forwards and promotions, the captured step, goals and the plot."""

from __future__ import annotations

import importlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
FILES = (
    *("gate", "goals", "graphs", "promotions", "providers"),
    *("roof", "table", "timing", "updates"),
)
SMALL = {2: 5, 4: 4, 8: 3, 16: 3, 64: 2, 128: 6}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The files of the benchmark, each an attribute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        files = {name: importlib.import_module(f"harness.{name}") for name in FILES}
        yield SimpleNamespace(plot=importlib.import_module("plot"), **files)


@pytest.fixture
def table(bench: Any) -> Any:
    torch.manual_seed(0)
    return bench.providers.make_table("small", SMALL, torch.Generator().manual_seed(0))


@pytest.fixture
def ids(table: Any) -> torch.Tensor:
    """Every id but the first and the last, some of them several times."""
    return torch.cat([torch.arange(1, len(table) - 1), torch.tensor([3, 3, 7, 3])])


def one_step(bench: Any, table: Any, rule: str, name: str) -> Any:
    return next(s for s in bench.updates.make_steps(table, CPU, rule) if s.name == name)


def test_deterministic_mode_is_left_again(bench: Any, table: Any, ids: torch.Tensor) -> None:
    fixed = bench.providers.Fixed(table, CPU)
    provider = bench.providers.Deterministic(fixed)
    with provider.around():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert bench.gate.check(provider, ids, bench.gate.make_reference(fixed, ids)) < 1e-5
    with pytest.raises(KeyError), provider.around():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_gate_of_the_forwards(bench: Any, table: Any, ids: torch.Tensor) -> None:
    providers, gate = bench.providers, bench.gate
    fixed = providers.Fixed(table, CPU)
    forwards = providers.make_forwards(table, providers.Ours(table, CPU), fixed)
    assert [(f.mode, f.name) for f in forwards] == [
        (f"forward {mode}", name)
        for mode in ("out=", "bf16 out", "bf16")
        for name in ("ours", "fixed")
    ]
    for forward in forwards:
        error = gate.check_forward(forward, ids)
        assert error < (3e-3 if forward.out_itemsize == 2 else 1e-5)
        assert error > 0 or forward.name == "fixed"
    into, wide, narrow = forwards[0], forwards[2], forwards[3]
    with torch.no_grad():
        # Into the same memory every time, and of the dtype that the mode says.
        assert into.call(ids).data_ptr() == into.call(ids).data_ptr()
        assert wide.call(ids).dtype == narrow.call(ids).dtype == torch.bfloat16
    off = providers.Forward("m", "n", lambda ids: wide.call(ids) * 1.02, wide.source, 4, 2)
    with pytest.raises(gate.GateError, match=r"m n: outputs off by [12]\.\de-02"):
        gate.check_forward(off, ids)
    off = providers.Forward("m", "n", narrow.call, narrow.source)
    with pytest.raises(gate.GateError, match="outputs of 2 bytes a number"):
        gate.check_forward(off, ids)


def test_every_rule_has_its_providers(bench: Any, table: Any) -> None:
    names = ["ours", "ours 128", "ours dense", "fixed", "sparse"]
    for rule, number in (("sgd", 4), ("adagrad", 4), ("rowwise_adagrad", 2), ("adam", 5)):
        steps = list(bench.updates.make_steps(table, CPU, rule))
        assert [step.name for step in steps] == names[:number]
        assert bool((steps[1].holder.module.sizes_of() == 128).all())


def test_gate_refuses_another_optimizer(bench: Any, table: Any, ids: torch.Tensor) -> None:
    for rule, wanted in [("sgd", "adam"), ("adagrad", "rowwise_adagrad"), ("adam", "adagrad")]:
        step = bench.updates.fused_step(table, CPU, rule)
        with pytest.raises(bench.gate.GateError, match=f"ours, {wanted}: .* off by"):
            bench.updates.check_step(step, ids, wanted)


@pytest.mark.parametrize("name", ["ours", "ours dense", "fixed"])
def test_gate_refuses_a_step_that_forgets(
    bench: Any, table: Any, ids: torch.Tensor, name: str
) -> None:
    """The second step of the gate meets the state of the first: one alone would pass."""
    step = one_step(bench, table, "adagrad", name)
    right = step.backward

    def forgetful(out: torch.Tensor, grad: torch.Tensor) -> None:
        right(out, grad)
        for optimizer in filter(None, (*step.optimizers, step.rows)):
            for state in optimizer.state.values():
                state["sum"].zero_()

    step.backward = forgetful
    with pytest.raises(bench.gate.GateError, match=f"{name}, adagrad: .* off by"):
        bench.updates.check_step(step, ids, "adagrad")


def test_gate_refuses_a_row_too_many(bench: Any, table: Any, ids: torch.Tensor) -> None:
    step = one_step(bench, table, "sgd", "fixed")
    right = step.backward

    def spill(out: torch.Tensor, grad: torch.Tensor) -> None:
        right(out, grad)
        step.holder.module.weight.data[0] += 1.0  # of an id that is not looked up

    step.backward = spill
    with pytest.raises(bench.gate.GateError, match="rows moved that were not looked up"):
        bench.updates.check_step(step, ids, "sgd")


def test_timed_steps_move_next_to_nothing(bench: Any, table: Any, ids: torch.Tensor) -> None:
    for step in bench.updates.make_steps(table, CPU, "adam"):
        step.settle()
        before = step.holder.parameters[0].detach().clone()
        step(ids, torch.randn(len(ids), 128))
        assert 0 < (step.holder.parameters[0] - before).abs().max() < 2e-6


def test_memory_of_a_step_counts_its_state(bench: Any, table: Any) -> None:
    for rule, moments, counter, clock in (("sgd", 0, 0, 0), ("adam", 2, 4, 24)):
        fixed = one_step(bench, table, rule, "fixed")
        fixed(torch.tensor([1]), torch.ones(1, 128))
        assert fixed.bytes == 4 * 128 * len(table) * (1 + moments) + counter
        ours = one_step(bench, table, rule, "ours")
        report = ours.holder.module.memory_report()
        assert ours.bytes == report.serving + report.optimizer + clock


def test_gate_of_the_promotion(bench: Any, table: Any, monkeypatch: Any) -> None:
    promotions = bench.promotions
    ours = bench.providers.Ours(table, CPU)
    ids = promotions.draw_batches(table, CPU, torch.Generator().manual_seed(0))[0]
    assert sorted(ids.tolist()) == (table.sizes < 128).nonzero()[:, 0].tolist()
    before = ours.module.arena.storage.detach().clone()
    assert max(promotions.check_promotion(ours, ids).values()) < 1e-6
    assert torch.equal(ours.module.arena.storage, before)
    ready, eager = promotions.Ready, promotions.EagerPromotion
    for holder, spoil, message in [
        (ready, lambda r: r.module.arena.storage.data.mul_(1.001), "other rows changed"),
        (ready, lambda r: r.optimizer.state[r.module.arena.storage]["exp_avg"].add_(1), "moments"),
        (eager, lambda e: [t.mul_(1.001) for t in e.tables], "eager, promotion: .* by 1.0e-03"),
        (eager, lambda e: [m.add_(1) for m, _ in e.moments], "moments"),
        (eager, lambda e: e.level.add_(1), "sizes are wrong"),
    ]:
        right = holder.promote

        def wrong(self: Any, ids: torch.Tensor, right: Any = right, spoil: Any = spoil) -> Any:
            result = right(self, ids)
            spoil(self)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(holder, "promote", wrong)
            with pytest.raises(bench.gate.GateError, match=message):
                promotions.check_promotion(ours, ids)


def test_promotion_starts_from_the_same_table_every_turn(bench: Any, table: Any) -> None:
    ours, clock = bench.providers.Ours(table, CPU), bench.timing.Clock(CPU)
    generator = torch.Generator().manual_seed(0)
    rows, facts = bench.promotions.measure_promotion(table, ours, clock, 3, generator)
    assert [(r.provider, r.ids, r.repeats) for r in rows] == [("ours", 17, 3), ("eager", 17, 3)]
    assert facts == {} and torch.equal(ours.module.sizes_of(), table.sizes)
    eager = bench.promotions.EagerPromotion(ours, 17)
    level = torch.searchsorted(torch.tensor(list(SMALL)), table.sizes)
    for _ in range(2):
        eager.reset()
        eager.promote((table.sizes < 128).nonzero()[:, 0])
        assert torch.equal(eager.level.long(), level.add(1).clamp(max=5))


def test_step_of_the_graph_and_its_twin(bench: Any, table: Any, monkeypatch: Any) -> None:
    """What a GPU captures, called: a twin takes the same steps from the same state."""
    monkeypatch.setattr(bench.graphs, "GROWING", 4)
    step = bench.graphs.GrowingStep(bench.providers.Ours(table, CPU).module, 8)
    generator = torch.Generator().manual_seed(0)
    case = bench.providers.make_case(table, "uniform", 9, CPU, generator)
    for turn in range(3):
        step(case.batch(turn), case.grad)
    sizes = step.module.sizes_of()
    assert int(sizes.sum()) > int(table.sizes.sum())
    twin = step.twin()
    assert step.same_as(twin) and twin.module is not step.module
    for turn in range(3, 6):
        assert torch.equal(*(s(case.batch(turn), case.grad) for s in (step, twin)))
    assert step.same_as(twin) and not torch.equal(step.module.sizes_of(), sizes)
    twin(case.batch(6), case.grad)
    assert not step.same_as(twin)


def test_equal_runs_are_counted(bench: Any) -> None:
    values = iter([1, 1, 2, 1])
    assert bench.gate.equal_runs(lambda: [torch.tensor(7), torch.tensor(next(values))], 4) == 3


def test_entries_are_prepared_and_timed_in_turns(bench: Any) -> None:
    seen: list[tuple[str, int]] = []

    def entry(name: str) -> Any:
        made = bench.table.Row("t", 1, "uniform", 1, 1, "forward", name, 1, bytes=1)
        return bench.timing.Entry(
            made, lambda turn, given: seen.append((given, turn)), lambda turn: f"{name}{turn}"
        )

    rows = bench.timing.Clock(CPU).measure([entry("a"), entry("b")], 2)
    warm = [("a0", 0), ("b0", 0)]
    assert seen == [*warm, ("b0", 0), ("a0", 0), ("a1", 1), ("b1", 1)]
    assert [row.repeats for row in rows] == [2, 2]


def test_state_and_promotion_bytes_by_hand(bench: Any) -> None:
    model = bench.roof
    # Id 0 twice and id 2 once: three ids, two distinct rows, of sizes 2 and 128.
    looked = model.Looked.of(torch.tensor([0, 2, 0]), torch.tensor([2, 64, 128]))
    assert (looked.counts, looked.distinct) == ([2, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1])
    # 3 * (8 index + 512 gradient), 130 elements with state read and written, 2 rows with theirs
    for rule, by_element, by_row in (("adagrad", 16, 0), ("rowwise_adagrad", 8, 8)):
        assert model.sparse_backward_bytes(looked, rule) == 1_560 + 130 * by_element + 2 * by_row
    assert model.sparse_backward_bytes(looked.cold, "sgd") == 1_560 + 132 * 8
    # Rows and output of 2 bytes: 3 * (8 + 4 + 256) + 2 * 130
    assert model.forward_bytes(looked, 2, 2) == 1_064
    # id 8, location read and written 8, answer 1, last step 4; row of 2 read, row of 4 written,
    # two moments of 4 written: 21 + 8 + 16 + 32
    assert model.promotion_bytes([1, 0, 0, 0, 0, 0]) == 77
    # twice from 64 to 128: 21 + 256 + 512 + 1,024; rows of 128 do not move
    assert model.promotion_bytes([0, 0, 0, 0, 2, 9]) == 2 * 1_813


def row(bench: Any, mode: str, provider: str, median: float, **more: Any) -> Any:
    """A measured row of 65,536 uniform ids on ml-20m; the roof of 1e6 bytes is 1 ms."""
    made = {"table": "ml-20m", "traffic": "uniform", "ids": 65_536, "bytes": 1_000_000, **more}
    found = bench.table.Row(
        rows=9, distinct=9, mode=mode, provider=provider, memory_bytes=1, **made
    )
    bench.table.fill(found, [median], 1.0)
    assert bench.table.Row(**json.loads(json.dumps(asdict(found)))) == found
    return found


def test_goals_on_a_gpu_come_from_the_rows(bench: Any) -> None:
    large: dict[str, Any] = {"ids": 1_048_576}
    cold = {"table": "ml-20m x100", **large}
    rows = [
        row(bench, "forward", "ours", 8.0, **cold),
        row(bench, "forward", "fixed", 10.0, **{**cold, "bytes": 1_250_000}),
        row(bench, "forward", "ours", 4.0),
        row(bench, "forward", "eager", 10.0),
        row(bench, "both", "ours", 5.0),
        row(bench, "both", "eager", 20.0),
        row(bench, "step adam", "ours", 2.0),
        row(bench, "step adam", "fixed", 7.0, bytes=4_000_000),
        row(bench, "backward sgd", "ours", 10.0, **large),
        row(bench, "backward sgd", "ours", 12.0, traffic="zipf", **large),
    ]
    facts = {
        "exact": {"runs": 20, "ours": {"a": 20, "b": 19}},
        "promotion": {"ids": 10_240, "launches": 3, "synchronisations": 1},
    }
    at, far = "65,536 uniform, ml-20m", "1,048,576 uniform, ml-20m x100"
    expected = {
        f"forward fp32 / fixed, {far}": (0.8, 0.82, 0.8, "met"),
        f"share of the roof, forward, {far}": (0.125, 0.85, 1.0, "missed"),
        f"share of the roof, backward, {far}": (None, 0.65, None, "not measured"),
        f"eager / ours, {at}, forward": (2.5, 15.0, 10.0, "missed"),
        f"eager / ours, {at}, forward + backward": (4.0, None, 20.0, "reported"),
        f"fixed / ours, {at}, step with Adam": (3.5, 3.0, 4.0, "met"),
        "backward Zipf / uniform, 1,048,576, ml-20m": (1.2, 1.15, 1.0, "missed"),
        "runs of ours with equal bits, of 20, in its only mode": (19, 20, 20, "missed"),
        "promotion of 10,240 rows: launches": (3, 3, 3, "met"),
        "promotion of 10,240 rows: synchronisations": (1, 0, 0, "missed"),
    }
    found = {goal["name"]: goal for goal in bench.goals.judge(rows, facts, "cuda")}
    for name, (value, wanted, limit, status) in expected.items():
        got = tuple(found[name][key] for key in ("value", "goal", "limit", "status"))
        assert got == (pytest.approx(value), wanted, pytest.approx(limit), status), name
    lines = bench.goals.lines(list(found.values()))
    assert max(map(len, lines)) <= 120 and len(lines) == 1 + len(found)
    assert lines[1].split()[-5:] == ["0.80", "<=", "0.82", "0.80", "met"]


def test_goals_without_rows(bench: Any) -> None:
    for device in ("cpu", "cuda"):
        goals = bench.goals.judge([], {}, device)
        assert {goal["value"] for goal in goals} == {None}
        assert {goal["status"] for goal in goals} <= {"needs a GPU", "not measured"}


@pytest.fixture
def result(bench: Any) -> dict[str, Any]:
    """Two batch sizes of two providers, as ``--out`` writes them."""
    rows = [
        row(bench, mode, provider, 2.0, ids=ids)
        for mode in ("forward", "backward", "both", "step adam")
        for provider in ("ours", "fixed")
        for ids in (500, 65_536)
    ]
    return {"conditions": ["device: x", "timing: y", "torch z"], "rows": list(map(asdict, rows))}


def size_of_png(path: Path) -> tuple[int, ...]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_plot_has_a_panel_per_table_and_mode(
    bench: Any, result: dict[str, Any], tmp_path: Path
) -> None:
    # 3.9 x 3 inches a panel at 120 dots an inch, three side by side, and room for the legend.
    bench.plot.plot(result, tmp_path / "four.png")
    assert size_of_png(tmp_path / "four.png") == (1476, 900)
    one = [r for r in result["rows"] if r["mode"] == "forward"]
    two = one + [{**r, "table": "other"} for r in one]
    bench.plot.plot({**result, "rows": two}, tmp_path / "two.png")
    assert size_of_png(tmp_path / "two.png") == (540, 900)


def test_plot_from_a_shell(result: dict[str, Any], tmp_path: Path) -> None:
    def plot(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(BENCH / "plot.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    source, target = tmp_path / "x.json", tmp_path / "x.png"
    source.write_text(json.dumps(result))
    assert plot(source, target).returncode == 0
    assert size_of_png(target) == (1476, 900)
    (tmp_path / "empty.json").write_text('{"rows": []}')
    (tmp_path / "bad.json").write_text("rows")
    for arguments, message in [
        ((), "usage: python bench/plot.py results.json out.png"),
        ((tmp_path / "no.json", target), "No such file"),
        ((tmp_path / "bad.json", target), "Expecting value"),
        ((tmp_path / "empty.json", target), "no measured row of forward"),
        ((source, tmp_path / "no" / "x.png"), "No such file"),
    ]:
        done = plot(*arguments)
        assert done.returncode == 2 and not done.stdout
        assert message in done.stderr and done.stderr.count("\n") == 1
