"""The benchmarks are imported as their commands import each other, with ``bench/`` on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bench.small import SMALL

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture(scope="session", autouse=True)
def short_copies() -> Iterator[None]:
    """The copies that give the roof's bandwidth are of a few pages, not of half a gigabyte."""
    from harness import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.COPIED, "cpu", 1 << 12)
        yield


@pytest.fixture
def spec():
    """A table with a few rows of every size."""
    from harness.providers import make_table_spec

    torch.manual_seed(0)
    return make_table_spec("small", SMALL, torch.Generator().manual_seed(0))


@pytest.fixture
def ids(spec) -> torch.Tensor:
    """Every id but the first and the last, some of them several times."""
    return torch.cat([torch.arange(1, len(spec) - 1), torch.tensor([3, 3, 7, 3])])
