"""Every setting of a run, with the published value as its default, and the modes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .errors import UserError
from .jsonfile import load_json

__all__ = [
    "BY_METHOD",
    "CHOICES",
    "GROUPS",
    "MODES",
    "ConfigError",
    "SearchConfig",
    "mode_defaults",
    "tuned_name",
]

CHOICES = {
    "task": ("binary", "multiclass"),
    "method": (
        "esapn",
        "fixed",
        "darts",
        "autoemb",
        "always",
        "never",
        "random",
        "thresholds",
        "power",
        "counts",
        "biases",
    ),
    "mode": ("paper", "tuned"),
    "order": ("shuffle", "time"),
    "device": ("auto", "cpu", "cuda"),
    "tower": ("norm", "plain"),
    "head": ("norm", "plain"),
    "row_optimizer": ("adam", "adagrad"),
    "hops": ("linear", "padded", "tails"),
    "state": ("paper", "rich"),
    "advantage": ("raw", "normalised"),
    "acting": ("sample", "argmax"),
}

# Found on parts to train on; what made the file is in it. See docs/tuning.md.
_TUNED = load_json(Path(__file__).with_name("tuned.json"))
BY_METHOD = {
    "tuned": frozenset().union(
        *(settings for task in CHOICES["task"] for settings in _TUNED[task]["methods"].values())
    )
}
"""The settings that a mode changes in a way of its own for every task and method."""

# What a mode changes of the defaults; those of `paper` are the published algorithm's.
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tuned": {
        "tower": "plain",
        "head": "plain",
        "row_optimizer": "adagrad",
        "hops": "padded",
    },
}


class ConfigError(UserError):
    """A setting or an argument that cannot be used; one line."""


# The groups of settings, as ``search --help`` shows them.
GROUPS = ("data", "model", "sizes", "policy", "run")


def _setting(group: str, default: Any, text: str, metavar: str | None = None) -> Any:
    """A field with what its flag needs: group, help and the name of its value (or its choices)."""
    about = {"group": group, "help": text, "metavar": metavar}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=about)
    return field(default=default, metadata=about)


_METHODS = (
    "esapn: the search; fixed: one size; darts, autoemb: soft sizes; "
    "always, never, random, thresholds, power: growth by a rule; "
    "counts: growth and shrinking within a budget; biases: no rows"
)
_data, _model, _sizes, _policy, _run = (partial(_setting, group) for group in GROUPS)


@dataclass(frozen=True)
class SearchConfig:
    """The settings of one run: data, model, sizes, policy (paper sections 3 and 4) and the run.

    The defaults are those of mode ``paper``; :meth:`of_mode` gives another mode's.

    Raises:
        ConfigError: a value outside its range, named by its flag.

    Example:
        >>> SearchConfig(batch_size=1)
        Traceback (most recent call last):
        esapn.config.ConfigError: --batch-size must be at least 2, got 1
        >>> SearchConfig.of_mode("tuned").row_optimizer
        'adagrad'
    """

    data: str = _data("synthetic", "synthetic, a MovieLens name, a file or a folder", "DATA")
    task: str = _data("binary", "high ratings or not (MSE), or five classes (cross-entropy)")
    positive_above: float = _data(
        3.5, "--task binary: ratings above it are the positive class", "RATING"
    )
    order: str = _data("shuffle", "of the stream: a seeded permutation, or by timestamp")
    order_seed: int = _data(0, "of the shuffle and of synthetic data", "SEED")
    events: int = _data(200_000, "length of the synthetic stream", "EVENTS")
    train_fraction: float = _data(0.75, "of the events; the rest is the test part", "SHARE")
    batch_size: int = _data(500, "in a batch", "EVENTS")

    mode: str = _model("paper", "a set of defaults: published ones, or tuned ones")
    init_std: float = _model(1.0, "rows start as N(0, STD^2)", "STD")
    tower: str = _model("norm", "a tower's output: BatchNorm and tanh, or as it is")
    head: str = _model("norm", "inference layer: BatchNorm and tanh, or one ReLU layer")
    hidden: int = _model(512, "width of the inference layer", "WIDTH")
    lr: float = _model(1e-3, "Adam's, for all but rows, tails, policies and soft sizes", "RATE")
    row_optimizer: str = _model("adam", "optimizer of the embedding rows")
    row_lr: float = _model(1e-3, "of the row optimizer", "RATE")
    row_accumulator: float = _model(
        0.0, "--row-optimizer adagrad: its sums of squares start here", "S0"
    )

    method: str = _sizes("esapn", _METHODS, "METHOD")
    sizes: tuple[int, ...] = _sizes((2, 4, 8, 16, 64, 128), "candidate sizes, increasing", "D")
    fixed_size: int = _sizes(128, "size of every row with --method fixed", "D")
    budget: str = _sizes("", "rows, locations and hops take at most so much: '8 MB', '3%'", "BYTES")
    hops: str = _sizes("linear", "trained W e + b; or e, and zeros or learnt B e + b appended")
    tail_lr: float = _sizes(1e-2, "Adam's, for the B and b of --hops tails", "RATE")
    dwell: float = _sizes(0.0, "IDs grow to size d once they were seen C d^2 times", "C")
    promote_probability: float = _sizes(
        0.5, "--method random: chance to enlarge at a decision", "P"
    )
    threshold: float = _sizes(
        16.0, "--method thresholds: for the 2nd size; x 4 for each next one", "EVENTS"
    )
    power: float = _sizes(0.5, "--method power: size ~ popularity^POWER", "POWER")
    power_scale: float = _sizes(1.0, "--method power: size of an ID seen once", "D")
    half_life: float = _sizes(
        0.0, "--method counts: an event counts half after so many; 0: for ever", "EVENTS"
    )
    count_scale: float = _sizes(
        2.0, "--method counts: size of an ID seen once, at most; less where room is short", "D"
    )
    move_every: int = _sizes(20, "--method counts: between two moves of rows", "BATCHES")

    state: str = _policy("paper", "frequency and size; or statistics of an ID's events")
    history: int = _policy(5, "losses of an ID in its reward's baseline", "T")
    advantage: str = _policy("raw", "the reward as it is, or by its mean and deviation")
    acting: str = _policy("sample", "rows grow by a sample, or by the likelier action")
    entropy: float = _policy(0.0, "weight of the policy's entropy in its loss", "WEIGHT")
    policy_hidden: int = _policy(512, "width of a policy's hidden layer", "WIDTH")
    policy_lr: float = _policy(1e-4, "Adam's, for policies and soft sizes", "RATE")
    frequency_dim: int = _policy(
        32, "width of the frequency embedding in a policy's state", "WIDTH"
    )
    max_frequency: int = _policy(4096, "frequencies from here on share one embedding row", "EVENTS")

    seed: int = _run(0, "of the initialisation and the sampled actions", "SEED")
    device: str = _run("auto", "auto takes a GPU where there is one")
    log_every: int = _run(20, "between two lines of the run's log", "BATCHES")
    patience: int = _run(0, "of the log without a better loss, then stop; 0: never", "LINES")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                _refuse(name, f"must be one of {', '.join(choices)}", getattr(self, name))
        least = dict.fromkeys(
            (
                *("hidden", "history", "policy_hidden", "frequency_dim", "max_frequency"),
                *("log_every", "move_every"),
            ),
            1,
        )
        more = {"batch_size": 2, "events": 1, "fixed_size": 1, "patience": 0}
        for name, low in {**least, **more}.items():
            if getattr(self, name) < low:
                _refuse(name, f"must be at least {low}", getattr(self, name))
        rates = ("lr", "row_lr", "tail_lr", "policy_lr")
        for name in (*rates, "threshold", "power", "power_scale", "count_scale"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, "must be positive and finite", getattr(self, name))
        for name in ("init_std", "row_accumulator", "entropy", "dwell", "half_life"):
            if not 0 <= getattr(self, name) < math.inf:
                _refuse(name, "must be finite and not negative", getattr(self, name))
        if 0 < self.half_life < 1:
            _refuse("half_life", "must be 0 or at least 1", self.half_life)
        if not math.isfinite(self.positive_above):
            _refuse("positive_above", "must be finite", self.positive_above)
        if not 0 < self.train_fraction < 1:
            _refuse("train_fraction", "must lie between 0 and 1", self.train_fraction)
        if not 0 <= self.promote_probability <= 1:
            _refuse("promote_probability", "must lie between 0 and 1", self.promote_probability)
        for name, bits in (("seed", 63), ("order_seed", 32)):
            if not 0 <= getattr(self, name) < 2**bits:
                _refuse(name, f"must lie between 0 and 2^{bits} - 1", getattr(self, name))
        increasing = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or self.sizes[0] < 1 or not increasing:
            _refuse("sizes", "must be positive and strictly increasing", list(self.sizes))
        if self.method == "counts" and not self.budget:
            raise ConfigError("--method counts needs --budget: its rows fill it")
        if self.method == "counts" and len(self.sizes) == 1:
            _refuse("sizes", "must be several for --method counts", list(self.sizes))
        if self.budget:
            if self.method in ("darts", "autoemb", "biases"):
                _refuse("budget", "is for methods whose rows have sizes of their own", self.method)
            # Here, as it imports torch: help and mistakes on the command line come without.
            from esapn_kernels.budget import budget_bytes

            try:
                budget_bytes(self.budget, 1 << 60)
            except ValueError:
                _refuse("budget", "must be bytes as '8 MB' or a share as '3%'", self.budget)

    @classmethod
    def of_mode(cls, mode: str, **settings: Any) -> SearchConfig:
        """The mode's defaults for the method, with ``settings`` over them."""
        defaults = mode_defaults(mode, settings)
        return cls(**{**defaults, **settings, "mode": mode})

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Sizes that a row can have under the method."""
        return (self.fixed_size,) if self.method == "fixed" else self.sizes

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def complete(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that :meth:`to_json` gave once, with the defaults of those added since.

        A setting that is added has as its default what every run did before, in any mode.

        Example:
            >>> SearchConfig.complete({"seed": 7})["row_accumulator"]
            0.0
        """
        return {**cls().to_json(), **saved}


def mode_defaults(mode: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a mode changes of the defaults, given a run's task, method and other settings.

    Tasks have losses of their own, and so their gradients other sizes. Methods that were tuned have
    settings of their own; one size has those of the nearest width.

    Example:
        >>> mode_defaults("paper", {"method": "fixed"})
        {}
        >>> mode_defaults("tuned", {"method": "fixed", "fixed_size": 16})["hops"]
        'padded'
    """
    return {**MODES.get(mode, {}), **(_tuned(settings) if mode == "tuned" else {})}


def tuned_name(settings: Mapping[str, Any]) -> str:
    """The name under which ``tuned.json`` has a run's method.

    A search that is held back, by ``dwell`` or by ``budget``, has other rows than a free one, and
    so other settings.

    Example:
        >>> tuned_name({"method": "fixed", "fixed_size": 16})
        'fixed-16'
        >>> tuned_name({"method": "esapn", "dwell": 0.5, "hops": "tails"})
        'esapn-dwell,hops=tails'
    """
    name = settings.get("method", SearchConfig.method)
    if name == "fixed":
        return f"fixed-{settings.get('fixed_size', SearchConfig.fixed_size)}"
    if name == "esapn" and (settings.get("dwell") or settings.get("budget")):
        name = "esapn-dwell"
    return name + (",hops=tails" if settings.get("hops") == "tails" else "")


def _tuned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the method with its hops and largest size, or less of that; of one size, the nearest."""
    task = _TUNED.get(settings.get("task", SearchConfig.task), {"rows": {}, "methods": {}})
    tuned: dict[str, dict[str, Any]] = task["methods"]
    name = tuned_name(settings)
    plain = name.partition(",")[0]
    if settings.get("method") == "fixed":
        size = max(settings.get("fixed_size", SearchConfig.fixed_size), 1)
        widths = [int(key.removeprefix("fixed-")) for key in tuned if key.startswith("fixed-")]
        plain = f"fixed-{min(widths, key=lambda w: abs(math.log(w / size)), default=size)}"
    widest = (settings.get("sizes") or SearchConfig().sizes)[-1]
    names = (f"{name},to={widest}", name, plain)
    return {**task["rows"], **next((tuned[n] for n in names if n in tuned), {})}


def _refuse(name: str, rule: str, value: object) -> None:
    raise ConfigError(f"--{name.replace('_', '-')} {rule}, got {value}")
