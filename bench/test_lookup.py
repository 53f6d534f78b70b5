"""pytest-benchmark cases of the lookup: ``pytest bench/ --benchmark-only``.

Every result is compared with the float64 reference before it is timed; ``extra_info`` holds bytes
and GB/s. ``bench/lookup.py`` is the full comparison, with all baselines and interleaved timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.gate import check, make_reference
from harness.lookups import MODES, lookup_bytes
from harness.promotions import EagerPromotion, Ready, check_promotion, draw_batches
from harness.providers import (
    Fixed,
    Ours,
    TableSpec,
    Workload,
    interpreted,
    make_table_spec,
    make_workload,
)
from harness.roof import PAPER_ROWS, SIZES, promotion_bytes
from harness.updates import RULES, check_step, make_steps
from torch import Tensor

ROUNDS = 15


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of ``--device`` where that option exists, else the CPU."""
    kind = request.config.getoption("--device", default=None) or "cpu"
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if interpreted(device):
        pytest.skip("TRITON_INTERPRET is set: interpreted kernels are not timed")
    return device


@pytest.fixture(scope="module")
def table() -> TableSpec:
    return make_table_spec("ml-20m", PAPER_ROWS, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def providers(device: torch.device, table: TableSpec) -> dict[str, Ours | Fixed]:
    torch.manual_seed(0)
    return {"ours": Ours(table, device), "fixed": Fixed(table, device)}


@pytest.fixture(scope="module", params=[500, 65_536], ids=["500-ids", "65536-ids"])
def workload(request: pytest.FixtureRequest, device: torch.device, table: TableSpec) -> Workload:
    generator = torch.Generator().manual_seed(1)
    return make_workload(table, "uniform", request.param, device, generator)


@pytest.mark.parametrize("name", ["ours", "fixed"])
@pytest.mark.parametrize("mode", MODES)
def test_lookup(
    benchmark: Any, providers: dict[str, Ours | Fixed], workload: Workload, mode: str, name: str
) -> None:
    provider = providers[name]
    ids = workload.batches[0]
    check(provider, ids, make_reference(provider, ids))

    def prepare(turn: int) -> Tensor | None:
        return provider(workload.batch(turn)) if mode == "backward" else None

    def region(turn: int, out: Tensor | None) -> None:
        if out is None:
            out = provider(workload.batch(turn))
        if mode != "forward":
            provider.backward(out, workload.grad)

    looked = workload.looked(ragged=provider.ragged)
    moved = lookup_bytes(mode, provider.grad_elements)(looked)
    run(benchmark, f"lookup {mode}, {workload.count:,} ids", region, moved, ids, prepare)


# torch.optim has no row-wise Adagrad.
STEPS = [(r, n) for r in RULES for n in ("ours", "fixed") if (r, n) != ("rowwise_adagrad", "fixed")]


@pytest.mark.parametrize(("rule", "name"), STEPS)
def test_step(benchmark: Any, workload: Workload, rule: str, name: str) -> None:
    steps = make_steps(workload.table, workload.grad.device, rule)
    step = next(step for step in steps if step.name == name)
    check_step(step, workload.batches[0], rule)
    step.settle()
    moved = step.moved(workload.looked(ragged=step.holder.ragged))

    def region(turn: int, _: Any) -> None:
        step(workload.batch(turn), workload.grad)

    run(benchmark, f"step {rule}, {workload.count:,} ids", region, moved, workload.grad)


@pytest.mark.parametrize("name", ["ours", "eager"])
def test_promotion(benchmark: Any, device: torch.device, table: TableSpec, name: str) -> None:
    torch.manual_seed(0)
    ours = Ours(table, device)
    batches = draw_batches(table, device, torch.Generator().manual_seed(1))
    ids = batches[0]
    check_promotion(ours, ids)
    eager = EagerPromotion(ours, len(ids))

    def prepare(turn: int) -> Ready | EagerPromotion:
        if name == "ours":
            return Ready.copy_of(ours, len(ids))
        eager.reset()
        return eager

    def region(turn: int, ready: Ready | EagerPromotion) -> None:
        ready.promote(batches[turn % len(batches)])

    counts = [int((table.sizes[ids.cpu()] == size).sum()) for size in SIZES]
    group = f"promotion with Adam, {len(ids):,} rows"
    run(benchmark, group, region, promotion_bytes(counts), ids, prepare)


def run(
    benchmark: Any,
    group: str,
    region: Callable[[int, Any], None],
    moved: int,
    on: Tensor,
    prepare: Callable[[int], Any] = lambda turn: None,
) -> None:
    """Time ``region`` of the turn and of what ``prepare`` gave for it; ``on`` says the device."""
    turn = -1

    def setup() -> tuple[tuple[int, Any], dict[str, Any]]:
        nonlocal turn
        turn += 1
        prepared = prepare(turn)
        _wait(on)
        return (turn, prepared), {}

    def timed(turn: int, prepared: Any) -> None:
        region(turn, prepared)
        _wait(on)

    benchmark.group = group
    benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
