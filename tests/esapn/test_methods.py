"""Methods as the command line names them: presets, families with a number, own settings."""

from __future__ import annotations

import pytest

from esapn.config import CHOICES, MODES, ConfigError, SearchConfig
from esapn.methods import (
    COMMON,
    DEFAULT_METHODS,
    KNOBS,
    PRESETS,
    REFERENCES,
    method_settings,
)


@pytest.mark.parametrize("label", PRESETS)
def test_presets(label):
    family, settings = method_settings(label)
    assert settings == PRESETS[label] and family == settings["method"]
    settings["hidden"] = 1
    assert "hidden" not in PRESETS[label]


@pytest.mark.parametrize(
    ("spec", "family", "setting", "value"),
    [
        ("fixed-16", "fixed", "fixed_size", 16),
        ("fixed-222", "fixed", "fixed_size", 222),
        ("esapn-dwell-0.5", "esapn", "dwell", 0.5),
        ("always-dwell-8", "always", "dwell", 8.0),
        ("random-1e-3", "random", "promote_probability", None),
        ("random-0.02", "random", "promote_probability", 0.02),
        ("thresholds-16", "thresholds", "threshold", 16.0),
        ("power-0.5", "power", "power_scale", 0.5),
    ],
)
def test_knobs(spec, family, setting, value):
    if value is None:
        with pytest.raises(ConfigError, match="unknown method 'random-1e-3'"):
            method_settings(spec)
        return
    found, settings = method_settings(spec)
    assert (found, settings["method"]) == (family, family)
    assert settings[setting] == value and type(settings[setting]) is type(value)


def test_settings_of_its_own_win_over_those_of_the_preset():
    family, settings = method_settings("esapn-rich,policy_lr=1e-2,history=3,state=paper")
    assert family == "esapn"
    changed = {"policy_lr": 0.01, "history": 3, "state": "paper"}
    assert settings == PRESETS["esapn-rich"] | changed
    assert type(settings["history"]) is int
    assert method_settings("fixed-16,tower=plain")[1]["tower"] == "plain"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nothing", "unknown method 'nothing' (known: esapn, "),
        ("nothing-3", "unknown method 'nothing-3'"),
        ("fixed", "unknown method 'fixed'"),
        ("fixed-", "unknown method 'fixed-'"),
        ("fixed--4", "unknown method 'fixed--4'"),
        ("esapn-dwell", "unknown method 'esapn-dwell'"),
        ("fixed-x", "'x' in 'fixed-x' is no int"),
        ("fixed-1.5", "'1.5' in 'fixed-1.5' is no int"),
        ("power-many", "'many' in 'power-many' is no float"),
        ("esapn,history", "'history' in 'esapn,history' is no setting of a method"),
        ("esapn,", "'' in 'esapn,' is no setting of a method"),
        ("esapn,histories=3", "'histories=3'"),
        ("esapn,history=3.5", "'3.5' in 'esapn,history=3.5' is no int"),
        *((f"esapn,{name}=1", f"'{name}=1' in") for name in COMMON),
        ("", "''"),
        ("esapn, history=3", "'esapn, history=3' has other signs"),
        ("../esapn", "'../esapn' has other signs"),
        ("fixed-\N{FULLWIDTH DIGIT FOUR}", "has other signs"),
        ("esapn\n", "'esapn\\n' has other signs"),
    ],
)
def test_a_method_that_is_refused_is_named_on_one_line(spec, expected):
    with pytest.raises(ConfigError) as caught:
        method_settings(spec)
    message = str(caught.value)
    assert message.startswith("--methods: ") and expected in message and "\n" not in message


@pytest.mark.parametrize("mode", MODES)
def test_the_default_methods_of_a_mode(mode):
    labels = DEFAULT_METHODS[mode]
    assert len(set(labels)) == len(labels) and REFERENCES[mode] in labels
    families = set()
    for label in labels:
        family, settings = method_settings(label)
        config = SearchConfig.of_mode(mode, **settings)
        assert config.method == family and config.mode == mode
        families.add(family)
    # Counts need a budget, which is the user's.
    assert families == set(CHOICES["method"]) - {"counts"}


def test_every_knob_is_a_setting_of_its_type():
    for method, setting, kind in KNOBS.values():
        config = SearchConfig(method=method, budget="9%" if method == "counts" else "")
        assert type(getattr(config, setting)) is kind
