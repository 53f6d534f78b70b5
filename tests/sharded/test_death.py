"""A rank that dies, or does not come, is noticed by the others."""

from __future__ import annotations

import pytest

from tests.sharded.gang import Gang


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_others_notice(how):
    """At once where its connections close, else when the process group's patience ends."""
    gang = Gang(2)
    try:
        said = {0: (False, "")}
        for rank, good, value in gang.answers("one_leaves", how=how):
            said[rank] = good, value
            if rank == 0:
                break
        assert said[0][0] is True
        assert said[0][1].startswith("RuntimeError")
    finally:
        gang.close()
