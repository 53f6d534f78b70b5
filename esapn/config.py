"""Every setting of a run, with the published value as its default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import UserError

__all__ = ["CHOICES", "MODES", "ConfigError", "SearchConfig"]

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
        "biases",
    ),
    "mode": ("paper", "tuned"),
    "order": ("shuffle", "time"),
    "device": ("auto", "cpu", "cuda"),
    "tower": ("norm", "plain"),
    "head": ("norm", "plain"),
    "row_optimizer": ("adam", "adagrad"),
    "hops": ("linear", "padded"),
    "state": ("paper", "rich"),
    "advantage": ("raw", "normalised"),
    "acting": ("sample", "argmax"),
}

# What a mode changes of the defaults. `paper` is the published algorithm and setting.
MODES: dict[str, dict[str, Any]] = {
    "paper": {},
    "tuned": {
        "init_std": 0.01,
        "tower": "plain",
        "head": "plain",
        "row_optimizer": "adagrad",
        "row_lr": 0.05,
        "hops": "padded",
    },
}


class ConfigError(UserError):
    """A setting that cannot be used; the message is one line."""


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SearchConfig:
    """One run: data, method, algorithm (paper sections 3 and 4), and where it runs.

    The defaults are mode ``paper``; :meth:`of_mode` gives another mode's.

    Raises:
        ConfigError: a value outside its range, named by its flag.

    Example:
        >>> SearchConfig(batch_size=1)
        Traceback (most recent call last):
        esapn.config.ConfigError: --batch-size must be at least 2, got 1
        >>> SearchConfig.of_mode("tuned").row_optimizer
        'adagrad'
    """

    data: str = _setting("synthetic", "'synthetic', a MovieLens name, or a file or folder")
    task: str = _setting("binary", "rating > 3.5 (MSE), or five classes (cross-entropy)")
    method: str = _setting("esapn", "size search, one fixed size, soft sizes, or a control")
    mode: str = _setting("paper", "defaults: the published setting, or the tuned one")
    order: str = _setting("shuffle", "of the stream: a seeded permutation, or by timestamp")
    order_seed: int = _setting(0, "of the shuffle and of synthetic data: one for all seeds")
    seed: int = _setting(0, "of the initialisation and the sampled actions")
    device: str = _setting("auto", "auto takes a GPU where there is one")
    events: int = _setting(200_000, "length of the synthetic stream")
    train_fraction: float = _setting(0.75, "of the events; the rest is the test part")
    batch_size: int = _setting(500, "events per step")
    sizes: tuple[int, ...] = _setting((2, 4, 8, 16, 64, 128), "candidate sizes D, increasing")
    fixed_size: int = _setting(128, "the size of every row with --method fixed")
    init_std: float = _setting(1.0, "rows start as N(0, std^2)")
    tower: str = _setting("norm", "BatchNorm and tanh on a tower's output, or the output as it is")
    head: str = _setting("norm", "inference layer: BatchNorm and tanh, or one ReLU layer")
    hidden: int = _setting(512, "width of the recommender's inference layer")
    lr: float = _setting(1e-3, "Adam, recommender")
    row_optimizer: str = _setting("adam", "of the embedding rows")
    row_lr: float = _setting(1e-3, "of the row optimizer")
    hops: str = _setting("linear", "trained W e + b; or zero-padding, optimizer state carried over")
    history: int = _setting(5, "T: losses of an ID that form its reward's baseline")
    state: str = _setting("paper", "frequency and size; or statistics of losses and gradients too")
    advantage: str = _setting("raw", "the reward as it is, or by its running mean and spread")
    acting: str = _setting(
        "sample", "rows grow by a sample of the policy, or by its likelier action"
    )
    dwell: float = _setting(0.0, "an ID may grow to size d once it was seen so many times d^2")
    entropy: float = _setting(0.0, "weight of the policy's entropy in its loss")
    policy_hidden: int = _setting(512, "width of a policy's hidden layer")
    policy_lr: float = _setting(1e-4, "Adam, policies and soft sizes")
    frequency_dim: int = _setting(32, "width of the frequency embedding in a policy's state")
    max_frequency: int = _setting(4096, "frequencies from here on share one embedding row")
    promote_probability: float = _setting(0.5, "--method random: of enlarging, at every decision")
    threshold: float = _setting(16.0, "--method thresholds: events for the 2nd size, then x 4")
    power: float = _setting(0.5, "--method power: size ~ popularity^power")
    power_scale: float = _setting(1.0, "--method power: the size of an ID seen once")
    log_every: int = _setting(20, "batches between two lines of the run's log")
    patience: int = _setting(0, "stop after so many log lines without a better loss; 0: never")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                _refuse(name, f"must be one of {', '.join(choices)}", getattr(self, name))
        least = dict.fromkeys(
            ("hidden", "history", "policy_hidden", "frequency_dim", "max_frequency", "log_every"), 1
        )
        more = {"batch_size": 2, "events": 1, "fixed_size": 1, "patience": 0}
        for name, low in {**least, **more}.items():
            if getattr(self, name) < low:
                _refuse(name, f"must be at least {low}", getattr(self, name))
        for name in ("lr", "row_lr", "policy_lr", "threshold", "power", "power_scale"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, "must be positive and finite", getattr(self, name))
        for name in ("init_std", "entropy", "dwell"):
            if not 0 <= getattr(self, name) < math.inf:
                _refuse(name, "must be finite and not negative", getattr(self, name))
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

    @classmethod
    def of_mode(cls, mode: str, **settings: Any) -> SearchConfig:
        """The mode's defaults, with ``settings`` over them."""
        return cls(**{**MODES.get(mode, {}), **settings, "mode": mode})

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Sizes that a row can have under the method."""
        return (self.fixed_size,) if self.method == "fixed" else self.sizes

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _refuse(name: str, rule: str, value: object) -> None:
    raise ConfigError(f"--{name.replace('_', '-')} {rule}, got {value}")
