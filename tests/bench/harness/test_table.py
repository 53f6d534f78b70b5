"""What follows from the samples of a row."""

from __future__ import annotations

import pytest
from harness.table import Row, fill, relate


def test_statistics_by_hand() -> None:
    rows = [
        Row("t", 9, "uniform", 4, 3, "forward", name, memory_bytes=1, bytes=6_000_000)
        for name in ("ours", "fixed")
    ]
    fill(rows[0], [5.0, 1.0, 2.0, 3.0, 4.0, 6.0], 4.0)
    fill(rows[1], [7.0, 7.0], 4.0)
    relate(rows)
    assert (rows[0].p20_ms, rows[0].median_ms, rows[0].p80_ms) == (2.0, 3.5, 5.0)
    assert rows[0].gb_per_s == pytest.approx(6 / 3.5)
    assert rows[0].roof_ms == pytest.approx(1.5)  # 6 MB at 4 GB/s
    assert rows[0].roof_share == pytest.approx(1.5 / 3.5)
    assert (rows[0].times_ours, rows[1].times_ours) == (1.0, 2.0)
    assert rows[1].limit_times_ours == 1.0
