"""The methods of a comparison: a preset, or a preset with settings of its own.

esapn   fixed-16   esapn-dwell-0.5   esapn,history=3   fixed-16,tower=plain   counts-25%
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from .config import ConfigError, SearchConfig

__all__ = ["COMMON", "DEFAULT_METHODS", "KNOBS", "PRESETS", "REFERENCES", "method_settings"]

# Label to settings.
PRESETS: dict[str, dict[str, Any]] = {
    "esapn": {"method": "esapn"},
    "esapn-rich": {"method": "esapn", "state": "rich"},
    "esapn-normalised": {"method": "esapn", "advantage": "normalised"},
    "esapn-entropy": {"method": "esapn", "entropy": 0.01},
    "esapn-argmax": {"method": "esapn", "acting": "argmax"},
    "darts": {"method": "darts"},
    "autoemb": {"method": "autoemb"},
    "always": {"method": "always"},
    "never": {"method": "never"},
    "biases": {"method": "biases"},
    # FIXED of the authors' code: as wide as all sizes together, towers without BatchNorm and tanh.
    "fixed-222-plain": {"method": "fixed", "fixed_size": 222, "tower": "plain"},
}
# Label without what stands behind it, as in fixed-16, to the method, the setting that this is, and
# its type.
KNOBS: dict[str, tuple[str, str, type]] = {
    "esapn-dwell": ("esapn", "dwell", float),
    "always-dwell": ("always", "dwell", float),
    "fixed": ("fixed", "fixed_size", int),
    "random": ("random", "promote_probability", float),
    "thresholds": ("thresholds", "threshold", float),
    "power": ("power", "power_scale", float),
    "counts": ("counts", "budget", str),
}
DEFAULT_METHODS = {
    "paper": (
        "esapn",
        "fixed-128",
        "fixed-222-plain",
        "darts",
        "autoemb",
        "always",
        "never",
        "random-0.5",
        "thresholds-16",
        "power-1",
        "biases",
    ),
    "tuned": (
        "esapn-dwell-0.5",
        "esapn-dwell-1",
        "esapn-dwell-0.25",
        "esapn",
        "fixed-4",
        "fixed-8",
        "fixed-16",
        "fixed-64",
        "fixed-128",
        "darts",
        "autoemb",
        "always",
        "always-dwell-0.5",
        "never",
        "random-0.02",
        "random-0.005",
        "thresholds-32",
        "thresholds-16",
        "thresholds-8",
        "thresholds-4",
        "power-0.5",
        "power-1",
        "power-2",
        "biases",
    ),
}
REFERENCES = {"paper": "esapn", "tuned": "esapn-dwell-0.5"}
# Settings of the whole comparison, or of what it varies itself: no method may change them.
COMMON = (
    *("data", "events", "task", "mode", "method", "order", "order_seed", "seed", "device"),
    *("positive_above", "train_fraction", "batch_size", "sizes", "log_every", "patience"),
)


def method_settings(spec: str) -> tuple[str, dict[str, Any]]:
    """The family and the settings of a method named on the command line.

    Args:
        spec: a preset or a family with its number, then ``,setting=value`` any number of times.

    Raises:
        ConfigError: an unknown method or setting, or a value of another type than the setting's.

    Example:
        >>> method_settings("fixed-16")
        ('fixed', {'method': 'fixed', 'fixed_size': 16})
        >>> method_settings("esapn,history=3")[1]
        {'method': 'esapn', 'history': 3}
    """
    if not re.fullmatch(r"[\w.,=+%-]+", spec, re.ASCII):
        # The label is part of a file's name.
        raise ConfigError(f"--methods: {spec!r} has other signs than letters, digits and _.,=+%-")
    name, *own = spec.split(",")
    label, _, number = name.rpartition("-")
    if name in PRESETS:
        settings = dict(PRESETS[name])
    elif label in KNOBS and number:
        method, setting, kind = KNOBS[label]
        settings = {"method": method, setting: _number(spec, number, kind)}
    else:
        known = ", ".join([*PRESETS, *(f"{k}-N" for k in KNOBS)])
        raise ConfigError(f"--methods: unknown method '{name}' (known: {known})")
    defaults = {f.name: getattr(SearchConfig(), f.name) for f in fields(SearchConfig)}
    for pair in own:
        key, equals, text = pair.partition("=")
        if not equals or key not in defaults or key in COMMON:
            raise ConfigError(f"--methods: '{pair}' in '{spec}' is no setting of a method")
        settings[key] = _number(spec, text, type(defaults[key]))
    return settings["method"], settings


def _number(spec: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--methods: '{text}' in '{spec}' is no {kind.__name__}") from None
