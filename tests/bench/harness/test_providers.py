"""What is compared: tables, traffic and torch's deterministic mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import gate, providers

from tests.bench.small import CPU, SMALL


def test_table_and_traffic(spec: Any) -> None:
    assert {d: int((spec.sizes == d).sum()) for d in SMALL} == SMALL
    assert not torch.equal(spec.sizes, spec.sizes.sort().values)
    assert sorted(spec.popular.tolist()) == list(range(len(spec)))
    assert torch.equal(spec.sizes[spec.popular], spec.sizes.sort(descending=True).values)
    generator = torch.Generator().manual_seed(0)
    weight = torch.arange(1, len(spec) + 1, dtype=torch.float64).pow(-1.05)
    drawn = providers.make_ids(spec, "zipf", 200_000, generator).bincount(minlength=len(spec))
    share = drawn[spec.popular] / 200_000
    torch.testing.assert_close(share, (weight / weight.sum()).float(), atol=0.005, rtol=0)
    drawn = providers.make_ids(spec, "uniform", 230_000, generator).bincount(minlength=len(spec))
    assert int(drawn.min()) > 9_500 and int(drawn.max()) < 10_500


def test_deterministic_mode_is_left_again(spec: Any, ids: torch.Tensor) -> None:
    fixed = providers.Fixed(spec, CPU)
    provider = providers.Deterministic(fixed)
    with provider.around():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert gate.check(provider, ids, gate.make_reference(fixed, ids)) < 1e-5
    with pytest.raises(KeyError), provider.around():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
