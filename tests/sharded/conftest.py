"""Ranks for the tests of this folder, which need TorchRec: ``make test-sharded``."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator

import pytest

if importlib.util.find_spec("torchrec") is None:
    collect_ignore_glob = ["*.py"]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchRec's and FBGEMM's own
        import torchrec.distributed  # noqa: F401


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable]:
    """``ranks(world)`` gives so many; those that a failure ended are made anew."""
    from tests.sharded.gang import Gang

    gangs: dict[int, Gang] = {}

    def of(world: int) -> Gang:
        if world not in gangs or not gangs[world].is_alive:
            gangs[world] = Gang(world)
        return gangs[world]

    yield of
    for gang in gangs.values():
        gang.close()
