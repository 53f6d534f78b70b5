"""Fixtures of the tests of commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def no_figure() -> Iterator[None]:
    """``run.png`` is an empty file: drawing it takes most of a small run."""

    def touch(path: Path, *arguments: object) -> None:
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esapn.run.result.plot", touch)
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """A run sets the number of threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
