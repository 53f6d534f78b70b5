"""pytest-benchmark cases of the lookup: ``pytest bench/ --benchmark-only``.

Every case is compared with the float64 reference before it is timed; ``extra_info`` holds its bytes
and GB/s. ``bench/lookup.py`` is the full comparison, with all baselines and interleaved timing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lookup import MODES, Case, make_case
from providers import PAPER_ROWS, Fixed, Ours, Provider, check, make_reference, make_table
from torch import Tensor

from esapn_kernels.backend import INTERPRETED, resolve_backend

ROUNDS = 15


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of ``--device`` where that option exists, else the CPU."""
    kind = request.config.getoption("--device", default=None) or "cpu"
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if INTERPRETED and resolve_backend("auto", device) == "triton":
        pytest.skip("TRITON_INTERPRET is set: interpreted kernels are not timed")
    return device


@pytest.fixture(scope="module")
def providers(device: torch.device) -> dict[str, Provider]:
    torch.manual_seed(0)
    table = make_table("ml-20m", PAPER_ROWS, torch.Generator().manual_seed(0))
    return {"ours": Ours(table, device), "fixed": Fixed(table, device)}


@pytest.fixture(scope="module", params=[500, 65_536], ids=["500-ids", "65536-ids"])
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    table = make_table("ml-20m", PAPER_ROWS, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return make_case(table, "uniform", request.param, device, generator)


@pytest.mark.parametrize("name", ["ours", "fixed"])
@pytest.mark.parametrize("mode", MODES)
def test_lookup(
    benchmark: Any, providers: dict[str, Provider], case: Case, mode: str, name: str
) -> None:
    provider = providers[name]
    assert isinstance(provider, Ours | Fixed)
    ids = case.batches[0]
    check(provider, ids, make_reference(provider, ids))
    turn = 0

    def setup() -> tuple[tuple[Tensor, Tensor | None], dict[str, Any]]:
        nonlocal turn
        batch = case.batches[turn % len(case.batches)]
        turn += 1
        out = provider(batch) if mode == "backward" else None
        _wait(batch)
        return (batch, out), {}

    def region(batch: Tensor, out: Tensor | None) -> None:
        if out is None:
            out = provider(batch)
        if mode != "forward":
            torch.autograd.grad(out, provider.parameters, case.grad)
        _wait(batch)

    benchmark.group = f"lookup {mode}, {case.count:,} ids"
    benchmark.pedantic(region, setup=setup, rounds=ROUNDS, warmup_rounds=2)
    moved = case.new_row(mode, provider).bytes
    benchmark.extra_info["bytes"] = moved
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
