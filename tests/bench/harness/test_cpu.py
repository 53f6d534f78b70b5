"""The cases on a CPU: their goals, what is measured of each, and that the gate comes first."""

from __future__ import annotations

import os
import time
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from harness import cpu, peers
from harness.cpu import Bench, Case
from harness.gate import GateError
from harness.providers import Fixed, Ours
from harness.timing import Timer

batches: list[int] = []

GOALS = {
    "forward-500-uniform": (0.5, 0.8),
    "forward-500-zipf": (1.0, 1.2),
    "forward-65536-uniform": (1.15, 1.5),
    "forward-65536-zipf": (1.4, 2.0),
    "forward-65536-uniform-2-threads": (1.1, None),
    "forward-65536-zipf-2-threads": (1.3, None),
    "step-adam-65536-uniform": (2.0, 3.0),
    "step-adam-65536-zipf": (2.5, 4.0),
    "step-sgd-65536-uniform": (2.0, 3.0),
    "step-sgd-65536-zipf": (2.5, 4.0),
    "step-sgd-500-uniform-before": (9.0, None),
    "step-adagrad-500-uniform-before": (9.0, None),
    "step-adam-500-uniform-before": (9.0, None),
    "forward-65536-uniform-fbgemm": (1.0, 1.3),
    "forward-65536-zipf-fbgemm": (1.0, 1.3),
    "step-sgd-65536-uniform-fbgemm": (1.0, 1.3),
    "step-sgd-65536-zipf-fbgemm": (1.0, 1.3),
    "step-rowwise-adagrad-65536-uniform-fbgemm": (0.8, 1.3),
    "step-rowwise-adagrad-65536-zipf-fbgemm": (0.8, 1.3),
    "promote-adam-10240-eager": (1.9, 3.0),
    "bits-sgd": (20, None),
    "bits-adagrad": (20, None),
    "bits-rowwise-adagrad": (20, None),
    "bits-adam": (20, None),
    # For information.
    "forward-64-uniform": (None, None),
    "forward-1048576-uniform": (None, None),
    "forward-1048576-zipf": (None, None),
    "dense-500-uniform": (None, None),
    "dense-65536-uniform": (None, None),
}


@pytest.fixture
def bench(spec: Any) -> Bench:
    return Bench(spec, "auto", "warm", 3, 0, product=8)


def test_goals() -> None:
    assert {case.name: (case.goal, case.stretch) for case in cpu.CASES} == GOALS
    assert Counter(case.name for case in cpu.CASES).most_common(1)[0][1] == 1


def test_two_threads_come_last_and_defaults_are_of_one() -> None:
    threads = [case.threads for case in cpu.CASES]
    assert threads == sorted(threads)
    assert {case.name for case in cpu.CASES if case.has_default} == {
        *(f"forward-65536-{traffic}" for traffic in ("uniform", "zipf")),
        *(f"step-{r}-65536-{t}" for r in ("adam", "sgd") for t in ("uniform", "zipf")),
    }


@pytest.mark.parametrize(
    "case",
    [
        Case("forward", 40, goal=1e-9, stretch=1e9),
        Case("dense", 40, "zipf"),
        Case("step", 40, rule="adam"),
        Case("step", 40, rule="sgd"),
    ],
    ids=lambda case: case.name,
)
def test_times(bench: Bench, case: Case, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "_IDS_A_TURN", 80)
    line = bench.measure(case)
    assert (line.name, line.other, line.ids) == (case.name, "nn.Embedding", 40)
    assert (line.turns, line.calls, line.clock, line.threads) == (3, 2, "CPU", 1)
    ratios = [b / a for a, b in zip(line.ours_samples_us, line.other_samples_us, strict=True)]
    assert line.ratio == pytest.approx(sorted(ratios)[1], rel=0.05)
    assert line.gate_error is not None and 0 < line.gate_error < 5e-5
    assert line.status == ("met" if case.goal else "")
    forward = case.what == "forward"
    assert (line.floor_bytes_ms is not None) == (line.floor_products_ms is not None) == forward
    assert bench.timer.clock is time.process_time


def test_floors(bench: Bench, monkeypatch: Any) -> None:
    """Of bytes at the copy's bandwidth, of products at the rate of a large one."""
    monkeypatch.setattr(bench, "gflops", {1: 2.0})
    monkeypatch.setattr(cpu, "forward_flop", lambda looked: 4_000_000)
    monkeypatch.setattr(cpu, "forward_bytes", lambda looked: 6_000_000)
    line = bench.measure(Case("forward", 40))
    assert line.floor_products_ms == 2.0 and line.copy_gb_per_s is not None
    assert line.floor_bytes_ms == pytest.approx(6 / line.copy_gb_per_s)


def test_two_threads_are_timed_by_a_wall_clock(bench: Bench, monkeypatch: Any) -> None:
    seen = []
    measure = Timer.measure

    def noting(timer: Timer, *rest: Any) -> Any:
        seen.append((torch.get_num_threads(), timer.clock))
        return measure(timer, *rest)

    monkeypatch.setattr(Timer, "measure", noting)
    before = torch.get_num_threads()
    assert bench.measure(Case("forward", 40, threads=2)).clock == "wall"
    assert seen == [(2, time.perf_counter)] and torch.get_num_threads() == before


def test_threads_and_cores_come_back() -> None:
    threads, number = torch.get_num_threads(), cpu.cores()
    with pytest.raises(KeyError), cpu.running_on(1):
        assert torch.get_num_threads() == 1
        if hasattr(os, "sched_setaffinity"):
            assert cpu.cores() == 1
        raise KeyError
    assert (torch.get_num_threads(), cpu.cores()) == (threads, number)


def test_promotion(bench: Bench) -> None:
    line = bench.measure(Case("promote", 10_240, rule="adam", against="eager"))
    assert line.ids == int((bench.spec.sizes < 128).sum())
    assert (line.name, line.other, line.turns) == ("promote-adam-10240-eager", "eager", 3)
    assert line.ratio is not None and line.ratio > 0 and line.floor_bytes_ms is None


@pytest.mark.parametrize("rule", ["sgd", "rowwise_adagrad", "adam"])
def test_equal_bits_are_counted(bench: Bench, rule: str) -> None:
    line = bench.measure(Case("bits", 40, "zipf", rule, "", 1, goal=20))
    assert (line.equal, line.runs, line.status, line.ratio) == (20, 20, "met", None)


def test_runs_compared_have_one_and_two_threads(bench: Bench, monkeypatch: Any) -> None:
    seen = []
    forward = Ours.__call__

    def noting(ours: Ours, ids: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return forward(ours, ids)

    monkeypatch.setattr(Ours, "__call__", noting)
    line = bench.measure(Case("bits", 40, "zipf", "sgd", "", 2, goal=20))
    assert line.other == "1, 2 threads"
    assert seen == [1, 1, 2, 2] * 10


@pytest.mark.parametrize("spoilt", ["rows", "state"])
def test_other_bits_are_found(bench: Bench, spoilt: str, monkeypatch: Any) -> None:
    """One run of the twenty ends with another row, or with other state."""
    runs = []

    def optimizer(rule: str, module: Any) -> Any:
        made = fused(rule, module)
        runs.append(made)
        if len(runs) == 3:
            storage = module.arena.storage
            held = storage.data if spoilt == "rows" else made.state[storage]["sum"]
            held[-1] += 1
        return made

    fused = cpu.fused_optimizer
    monkeypatch.setattr(cpu, "fused_optimizer", optimizer)
    line = bench.measure(Case("bits", 40, "zipf", "adagrad", "", 1, goal=20))
    assert (line.equal, line.status) == (19, "missed")


@pytest.mark.parametrize("wrong", [Ours, Fixed])
@pytest.mark.parametrize("what", ["forward", "dense", "step"])
def test_nothing_is_timed_before_the_gate(
    bench: Bench, wrong: Any, what: str, monkeypatch: Any
) -> None:
    right = wrong.__call__
    monkeypatch.setattr(wrong, "__call__", lambda self, ids: right(self, ids) * 1.001)
    monkeypatch.setattr(Timer, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(GateError, match=f"^.*{wrong.name}.* off by .*e-0[34] "):
        bench.measure(Case(what, 40, rule="sgd" if what == "step" else ""))


class Bags(torch.nn.Module):
    """As fbgemm's table with SGD: bags of one id, rows stepped inside backward."""

    def __init__(
        self, embedding_specs: Any, optimizer: str, learning_rate: float, eps: float
    ) -> None:
        super().__init__()
        (rows, dim, place, kind), *_ = embedding_specs
        assert (place, kind, optimizer) == ("host", "cpu", "sgd")
        self.weight = torch.zeros(rows, dim)
        self.lr = learning_rate

    def split_embedding_weights(self) -> list[torch.Tensor]:
        return [self.weight]

    def set_learning_rate(self, lr: float) -> None:
        self.lr = lr

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        assert torch.equal(offsets, torch.arange(len(ids) + 1))
        batches.append(len(ids))
        out = self.weight[ids]
        if torch.is_grad_enabled():
            out.requires_grad_().register_hook(partial(self.step, ids))
        return out

    def step(self, ids: torch.Tensor, grad: torch.Tensor) -> None:
        self.weight.index_add_(0, ids, grad, alpha=-self.lr)


@pytest.fixture
def fbgemm(monkeypatch: Any) -> None:
    class Place:
        HOST, CPU = "host", "cpu"

    class Modules:
        EmbeddingLocation = ComputeDevice = Place
        SplitTableBatchedEmbeddingBagsCodegen = Bags
        EmbOptimType = {"EXACT_SGD": "sgd"}

    monkeypatch.setattr(peers, "import_module", lambda name: Modules)


@pytest.mark.parametrize("what", ["forward", "step"])
def test_fbgemm(bench: Bench, what: str, fbgemm: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu, "_IDS_A_TURN", 40)
    batches.clear()
    line = bench.measure(Case(what, 40, rule="sgd" if what == "step" else "", against="fbgemm"))
    assert line.other == "fbgemm" and line.name.endswith("-40-uniform-fbgemm")
    # The gate's (two steps, or one forward), the first of all, and the turns.
    assert batches == [40] * ((2 if what == "step" else 1) + 1 + 3)


def test_fbgemm_settles_before_it_is_timed(bench: Bench, fbgemm: None) -> None:
    step = peers.FbgemmStep(bench.spec, "sgd")
    assert step.bags.bags.lr == 0.1 and bool(step.bags.parameters[0].any())
    step.settle()
    assert step.bags.bags.lr == 1e-6


def test_why_fbgemm_is_missing(monkeypatch: Any) -> None:
    def missing(name: str) -> Any:
        raise OSError("cannot open libx.so\nmore")

    monkeypatch.setattr(peers, "import_module", missing)
    assert peers.fbgemm_error() == "cannot open libx.so"
