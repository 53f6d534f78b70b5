"""SearchConfig: the published defaults, every refusal, and its JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest

from esapn import config as config_module
from esapn.config import CHOICES, MODES, ConfigError, SearchConfig, mode_defaults
from esapn.tune.space import ROWS, SETTINGS

PUBLISHED = {
    "sizes": (2, 4, 8, 16, 64, 128),
    "fixed_size": 128,
    "batch_size": 500,
    "train_fraction": 0.75,
    "hidden": 512,
    "policy_hidden": 512,
    "lr": 1e-3,
    "policy_lr": 1e-4,
    "history": 5,
    "frequency_dim": 32,
    "init_std": 1.0,
    "order": "shuffle",
    "method": "esapn",
    "mode": "paper",
    "tower": "norm",
    "head": "norm",
    "row_optimizer": "adam",
    "row_lr": 1e-3,
    "row_accumulator": 0.0,
    "budget": "",
    "hops": "linear",
    "tail_lr": 1e-2,
    "state": "paper",
    "advantage": "raw",
    "acting": "sample",
    "entropy": 0.0,
    "dwell": 0.0,
    "patience": 0,
    "task": "binary",
    "positive_above": 3.5,
}

REFUSED = [
    *((name, "nonsense") for name in CHOICES),
    *((name, 0) for name in ("hidden", "history", "policy_hidden", "frequency_dim")),
    *((name, 0) for name in ("max_frequency", "log_every", "events", "fixed_size", "move_every")),
    ("batch_size", 1),
    ("patience", -1),
    *(("budget", text) for text in ("3 XB", "-1", "0%")),
    *(
        (name, value)
        for name in (
            "lr",
            "row_lr",
            "tail_lr",
            "policy_lr",
            "threshold",
            "power",
            "power_scale",
            "count_scale",
        )
        for value in (0.0, -1e-3, math.nan, math.inf)
    ),
    *(
        (name, value)
        for name in ("init_std", "row_accumulator", "entropy", "dwell", "half_life")
        for value in (-0.1, math.nan, math.inf)
    ),
    ("half_life", 0.5),
    *(("promote_probability", value) for value in (-0.1, 1.1, math.nan)),
    *(("positive_above", value) for value in (-math.inf, math.nan, math.inf)),
    *(("train_fraction", value) for value in (0.0, 1.0, -0.5, math.nan)),
    *(("seed", value) for value in (-1, 2**63)),
    *(("order_seed", value) for value in (-1, 2**32)),
    *(("sizes", value) for value in ((), (0, 2), (-1, 2), (2, 2), (4, 2), (1, 5, 3))),
]


def test_defaults_are_the_published_settings():
    config = SearchConfig()
    assert {name: getattr(config, name) for name in PUBLISHED} == PUBLISHED
    assert SearchConfig.of_mode("paper") == config and MODES["paper"] == {}


def test_modes_change_defaults_and_nothing_else():
    assert set(MODES) == set(CHOICES["mode"])
    for mode, changes in MODES.items():
        plain, config = SearchConfig(mode=mode).to_json(), SearchConfig.of_mode(mode).to_json()
        changed = {name for name, value in config.items() if value != plain[name]}
        defaults = mode_defaults(mode, {"method": "esapn"})
        assert set(defaults) >= set(changes) and changed == set(defaults)
        assert {name: config[name] for name in defaults} == defaults
    given = {"method": "always", "row_lr": 0.5, "seed": 3}
    assert SearchConfig.of_mode("tuned", **given) == SearchConfig(
        **{**mode_defaults("tuned", given), **given, "mode": "tuned"}
    )
    with pytest.raises(ConfigError, match="--mode must be one of paper, tuned, got fast"):
        SearchConfig.of_mode("fast")


TUNED = {
    "fixed-2": {"row_lr": 0.5},
    "fixed-128": {"row_lr": 0.02},
    "esapn": {"row_lr": 0.03},
    "esapn-dwell": {"row_lr": 0.09},
    "counts": {"row_lr": 0.1, "count_scale": 3.0},
    "counts,hops=tails": {"row_lr": 0.2, "tail_lr": 0.003},
    "counts,hops=tails,to=16": {"row_lr": 0.4, "tail_lr": 0.004},
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "fixed", "fixed_size": 2}, "fixed-2"),
        ({"method": "fixed", "fixed_size": 15}, "fixed-2"),  # the nearest by its ratio
        ({"method": "fixed", "fixed_size": 17}, "fixed-128"),
        ({"method": "fixed"}, "fixed-128"),
        ({"method": "counts", "budget": "3%"}, "counts"),
        ({"method": "counts", "budget": "3%", "hops": "tails"}, "counts,hops=tails"),
        (
            {"method": "counts", "budget": "3%", "hops": "tails", "sizes": (2, 16)},
            "counts,hops=tails,to=16",
        ),
        ({"method": "counts", "budget": "3%", "sizes": (2, 16)}, "counts"),
        ({"method": "power", "hops": "tails"}, None),
        ({"method": "always"}, None),
        ({}, "esapn"),
        ({"method": "esapn", "hops": "tails"}, "esapn"),
        ({"method": "esapn", "dwell": 0.5}, "esapn-dwell"),
        ({"method": "esapn", "budget": "3%"}, "esapn-dwell"),
    ],
)
def test_a_method_that_was_tuned_has_settings_of_its_own(settings, expected, monkeypatch):
    shared = {"row_lr": 0.3, "init_std": 0.2}
    monkeypatch.setitem(config_module._TUNED, "binary", {"rows": shared, "methods": TUNED})
    own = {**shared, **TUNED.get(expected, {})}
    assert mode_defaults("tuned", settings) == {**MODES["tuned"], **own}
    config = SearchConfig.of_mode("tuned", **settings)
    assert {name: getattr(config, name) for name in own} == own
    assert SearchConfig.of_mode("tuned", **settings, row_lr=0.7).row_lr == 0.7
    # Another task, another loss.
    other = mode_defaults("tuned", {**settings, "task": "multiclass"})
    assert other.keys() >= {*MODES["tuned"], *ROWS} and other["init_std"] != 0.2
    # As published, whatever was tuned.
    assert mode_defaults("paper", settings) == {}
    assert SearchConfig.of_mode("paper", **settings).row_lr == SearchConfig().row_lr


def test_the_settings_found_are_in_their_ranges_and_of_known_methods():
    for task in CHOICES["task"]:
        found = config_module._TUNED[task]
        assert set(found["rows"]) == set(ROWS)
        for name, settings in [("", found["rows"]), *found["methods"].items()]:
            assert set(settings) <= set(SETTINGS)
            for key, value in settings.items():
                assert SETTINGS[key].low <= value <= SETTINGS[key].high
            method, *given = name.split(",")
            assert set(given) <= {"hops=tails", "to=16"}
            assert not method or method.partition("-")[0] in CHOICES["method"]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refusals_name_their_flag_on_one_line(name, value):
    with pytest.raises(ConfigError) as caught:
        SearchConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"--{name.replace('_', '-')} must ") and "\n" not in message
    assert message.endswith(f"got {list(value) if name == 'sizes' else value}")


def test_every_setting_with_a_range_is_refused_somewhere():
    free = {"data"}
    assert {name for name, _ in REFUSED} == {
        setting.name for setting in fields(SearchConfig)
    } - free


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 2),
        ("hidden", 1),
        ("init_std", 0.0),
        ("row_accumulator", 0.0),
        ("positive_above", -5.0),
        ("seed", 2**63 - 1),
        ("order_seed", 2**32 - 1),
        ("promote_probability", 0.0),
        ("promote_probability", 1.0),
        ("entropy", 0.0),
        ("sizes", (7,)),
        ("train_fraction", 0.01),
        *((name, choice) for name, choices in CHOICES.items() for choice in choices),
    ],
)
def test_edges_of_the_ranges_are_taken(name, value):
    more = {"budget": "9%"} if value == "counts" else {}
    assert getattr(SearchConfig(**{name: value}, **more), name) == value


@pytest.mark.parametrize(
    ("method", "sizes"), [("esapn", (1, 3)), ("darts", (1, 3)), ("fixed", (6,))]
)
def test_row_sizes(method, sizes):
    assert SearchConfig(method=method, sizes=(1, 3), fixed_size=6).row_sizes == sizes


def test_json_round_trip():
    config = SearchConfig(sizes=(1, 2, 3), lr=0.02, seed=7, task="multiclass")
    values = json.loads(json.dumps(config.to_json()))
    assert set(values) == {setting.name for setting in fields(SearchConfig)}
    assert values["sizes"] == [1, 2, 3]
    values["sizes"] = tuple(values["sizes"])
    assert SearchConfig(**values) == config


def test_saved_settings_are_completed_with_defaults_of_the_paper():
    """Whatever their mode: what every run did before a setting was added."""
    config = SearchConfig.of_mode("tuned", seed=3, row_accumulator=0.0, tail_lr=0.01)
    saved = config.to_json()
    assert SearchConfig.complete(saved) == saved
    for name in ("row_accumulator", "positive_above", "tail_lr", "budget"):
        del saved[name]
    assert SearchConfig.complete(saved) == config.to_json()
    assert SearchConfig.complete({"gone": 1, "lr": 9.0}) == SearchConfig().to_json() | {
        "gone": 1,
        "lr": 9.0,
    }


def test_settings_have_help():
    assert all(setting.metadata["help"] for setting in fields(SearchConfig))
