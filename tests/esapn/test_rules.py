"""Growth without a policy: rules by hand, and what they make of a stream."""

from __future__ import annotations

import pytest
import torch

from esapn.config import SearchConfig
from esapn.data.stream import build_stream
from esapn.data.synthetic import synthetic_ratings
from esapn.rules import level_thresholds, rule_of
from esapn.run.loop import Run

CPU = torch.device("cpu")
SIZES = (2, 4, 8)


def decide(frequency: list[int], level: list[int], uniform=None, **settings) -> list[bool]:
    rule = rule_of(SearchConfig(**{"sizes": SIZES, **settings}), CPU)
    assert rule is not None
    drawn = torch.zeros(len(level)) if uniform is None else torch.tensor(uniform)
    chosen = rule(torch.tensor(frequency, dtype=torch.int32), torch.tensor(level), drawn)
    assert chosen.dtype == torch.bool
    return chosen.tolist()


@pytest.mark.parametrize("method", ["esapn", "fixed", "darts", "autoemb", "biases"])
def test_other_methods_have_no_rule(method):
    assert rule_of(SearchConfig(method=method), CPU) is None


def test_always_and_never():
    assert decide([1, 9, 900], [0, 1, 0], method="always") == [True, True, True]
    assert decide([1, 9, 900], [0, 1, 0], method="never") == [False, False, False]


def test_thresholds_by_hand():
    settings = {"method": "thresholds", "threshold": 3.0}  # 3 and 12
    assert level_thresholds(SearchConfig(sizes=SIZES, **settings)) == [3.0, 12.0]
    assert decide([1, 2, 3, 11, 12], [0] * 5, **settings) == [False, False, True, True, True]
    assert decide([1, 2, 3, 11, 12], [1] * 5, **settings) == [False, False, False, False, True]
    assert decide([3, 12, 5000], [2] * 3, **settings) == [False, False, False]


def test_thresholds_need_not_be_whole():
    settings = {"method": "thresholds", "threshold": 2.5}  # 2.5 and 10
    assert decide([2, 3], [0, 0], **settings) == [False, True]
    assert decide([9, 10], [1, 1], **settings) == [False, True]


def test_power_by_hand():
    # 4 <= f^0.5 from 16 on, 8 <= f^0.5 from 64 on
    settings = {"method": "power", "power": 0.5}
    assert decide([15, 16, 63, 64], [0] * 4, **settings) == [False, True, True, True]
    assert decide([15, 16, 63, 64], [1] * 4, **settings) == [False, False, False, True]
    # 2 f: 4 from 2 on, 8 from 4 on
    settings = {"method": "power", "power": 1.0, "power_scale": 2.0}
    assert decide([1, 2, 3, 4], [0] * 4, **settings) == [False, True, True, True]
    assert decide([1, 2, 3, 4], [1] * 4, **settings) == [False, False, False, True]


@pytest.mark.parametrize("power", [0.3, 0.7, 1.3])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_power_is_the_largest_size_below_the_curve(power, scale):
    frequency = list(range(1, 400))
    found = [
        decide(frequency, [level] * len(frequency), method="power", power=power, power_scale=scale)
        for level in range(2)
    ]
    for f, *larger in zip(frequency, *found, strict=True):
        assert larger == [scale * f**power >= size * (1 - 1e-12) for size in SIZES[1:]]


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_random_share(probability):
    uniform = torch.rand(20_000).tolist()
    many = [1] * len(uniform)
    grown = decide(many, many, uniform, method="random", promote_probability=probability)
    assert sum(grown) / len(grown) == pytest.approx(probability, abs=0.015)
    if 0 < probability < 1:
        settings = {"method": "random", "promote_probability": probability}
        assert decide([1, 1], [0, 1], [0.2499, 0.2501], **settings) == [True, False]


# In a run


def final_levels(method: str, **settings) -> tuple[dict, dict]:
    """Level of every ID, and in how many batches it came, by table."""
    stream = build_stream(synthetic_ratings(1_000, n_users=150, n_items=90), batch_size=50)
    config = SearchConfig(method=method, sizes=SIZES, hidden=4, batch_size=50, **settings)
    run = Run(config, stream)
    batches = {name: torch.zeros(n, dtype=torch.int64) for name, n in (("user", 150), ("item", 90))}
    for index in range(len(stream.bounds)):
        for name, seen in batches.items():
            seen[getattr(stream.batch(index), name).unique()] += 1
        assert run.step().isfinite().all()
    assert not list(run.search.parameters())
    return {
        field.name: field.embedding.arena.level().long() for field in run.search.fields
    }, batches


def test_never_stays_and_always_grows_with_every_batch():
    levels, _ = final_levels("never")
    assert all(level.eq(0).all() for level in levels.values())
    levels, batches = final_levels("always")
    for name, level in levels.items():
        assert torch.equal(level, batches[name].clamp(max=2))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_random_grows_a_share(probability):
    levels, batches = final_levels("random", promote_probability=probability)
    # Of three decisions the number that enlarge, cut at 2.
    few = torch.cat([levels[name][batches[name] == 3] for name in levels]).double()
    assert len(few) > 25
    p, q = probability, 1 - probability
    expected = 3 * p * q**2 + 2 * (1 - q**3 - 3 * p * q**2)
    assert few.mean().item() == pytest.approx(expected, abs=0.3 if 0 < p < 1 else 1e-12)


@pytest.mark.parametrize(
    ("method", "least", "settings"),
    [
        ("thresholds", (5, 20), {"threshold": 5.0}),
        ("power", (4, 8), {"power": 1.0}),
        ("always", (4, 16), {"dwell": 0.25}),  # a quarter of the squared size to come
    ],
)
def test_counts_rule_one_size_a_batch(method, least, settings):
    stream = build_stream(synthetic_ratings(1_000, n_users=150, n_items=90), batch_size=50)
    expected = {"user": [0] * 150, "item": [0] * 90}
    count = {name: [0] * len(level) for name, level in expected.items()}
    for index in range(len(stream.bounds)):
        batch = stream.batch(index)
        for name, level in expected.items():
            ids = getattr(batch, name).tolist()
            for i in ids:
                count[name][i] += 1
            for i in set(ids):
                deserved = sum(count[name][i] >= events for events in least)
                level[i] += deserved > level[i]
    levels, _ = final_levels(method, **settings)
    assert {name: level.tolist() for name, level in levels.items()} == expected
    assert set(expected["user"]) == {0, 1, 2}
