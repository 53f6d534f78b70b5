"""Intervals, paired differences and corrections against numbers by hand or from printed tables."""

from __future__ import annotations

import math

import pytest

from esapn.compare.intervals import (
    Difference,
    Interval,
    holm,
    mean_interval,
    paired_difference,
    pareto_front,
)

# Printed t tables: t(0.975) of 1, 2, 4 and 9 degrees of freedom.
T_975 = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622}


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_mean_interval_of_consecutive_integers(n):
    # The variance of 1..n with n - 1 in the denominator is n (n + 1) / 12.
    interval = mean_interval(range(1, n + 1))
    half = T_975[n - 1] * math.sqrt(n * (n + 1) / 12) / math.sqrt(n)
    assert interval.mean == (n + 1) / 2
    assert interval.half == pytest.approx(half, rel=1e-4)
    assert (interval.low, interval.high) == (
        interval.mean - interval.half,
        interval.mean + interval.half,
    )


def test_one_value_has_no_interval():
    assert mean_interval([0.25]) == Interval(0.25, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_paired_difference_takes_common_seeds_only():
    a = {0: 10.0, 1: 21.0, 2: 35.0, 9: 1e6}
    b = {0: 9.0, 1: 19.0, 2: 32.0, 8: -1e6}
    difference = paired_difference(a, b)  # 1, 2, 3
    assert (difference.mean, difference.n) == (2.0, 3)
    assert difference.half == pytest.approx(T_975[2] / math.sqrt(3), rel=1e-4)
    # t = 2 sqrt(3); with 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert difference.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_p_with_one_degree_of_freedom_is_cauchys():
    difference = paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert difference.p == pytest.approx(1 - 2 / math.pi * math.atan(2.0), rel=1e-9)


def test_paired_difference_at_the_edges():
    assert paired_difference({3: 1.0}, {3: 0.5}) == Difference(0.5, None, 1, None)
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).p == 0.0
    with pytest.raises(ValueError, match="common seed"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_holm():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; then the maximum.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_pareto_front():
    points = [(4, 0.3), (1, 0.5), (2, 0.6), (2, 0.4), (8, 0.3), (9, 0.1)]
    assert pareto_front(points) == [1, 3, 0, 5]
    assert pareto_front([(1, 1), (1, 1)]) == [0, 1]
    assert pareto_front([]) == []
