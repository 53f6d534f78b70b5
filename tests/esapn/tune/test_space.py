"""What is tried of which method."""

from __future__ import annotations

import math

import pytest

from esapn.config import SearchConfig
from esapn.methods import method_settings
from esapn.tune.space import ROWS, SETTINGS, SPREAD, ranges, rounded, spread


def of(spec: str) -> set[str]:
    _, given = method_settings(spec)
    return set(ranges(SearchConfig.of_mode("tuned", **given), given))


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ("fixed-16", set()),
        ("fixed-16,hops=tails", set()),  # one size has no hops
        ("power-1", set()),
        ("power-1,row_optimizer=adam", {"-row_accumulator"}),
        ("power-1,hops=tails", {"tail_lr"}),
        ("esapn", {"policy_lr"}),
        ("darts", {"policy_lr"}),
        ("counts-25%", {"count_scale", "move_every"}),
        ("counts-25%,hops=tails", {"count_scale", "move_every", "tail_lr"}),
        ("counts-25%,move_every=5", {"count_scale"}),
    ],
)
def test_every_method_has_the_rows_settings_and_its_own(spec, own):
    without = {name[1:] for name in own if name.startswith("-")}
    assert of(spec) == (set(ROWS) | own) - without - {f"-{name}" for name in without}


def test_what_sets_the_bytes_is_never_tuned():
    assert not {"fixed_size", "budget", "threshold", "power_scale", "dwell"} & set(SETTINGS)


def test_points_are_shared_by_all_methods_and_lie_in_the_ranges():
    wide = [spread(k, SETTINGS) for k in range(SPREAD)]
    narrow = [spread(k, ["row_lr", "tail_lr"]) for k in range(SPREAD)]
    assert narrow == [{n: p[n] for n in ("row_lr", "tail_lr")} for p in wide]
    for name, span in SETTINGS.items():
        places = [
            math.log(point[name] / span.low) / math.log(span.high / span.low) for point in wide
        ]
        assert all(0 <= place <= 1 for place in places)
        # One point of a Sobol net in every eighth of a range; whole numbers may be rounded out.
        eighths = sorted(min(int(place * SPREAD), SPREAD - 1) for place in places)
        assert span.whole or eighths == list(range(SPREAD))


def test_settings_are_rounded_as_their_kind():
    assert rounded("init_std", 0.00123456) == 0.00123
    assert rounded("move_every", 5.4) == 5 and isinstance(rounded("move_every", 5.4), int)
