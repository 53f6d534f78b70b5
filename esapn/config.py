"""Every setting of a run, with the published value as its default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CHOICES", "ConfigError", "SearchConfig"]

CHOICES = {
    "task": ("binary", "multiclass"),
    "method": ("esapn", "fixed"),
    "mode": ("paper",),
    "order": ("shuffle", "time"),
    "tower": ("norm", "plain"),
    "device": ("auto", "cpu", "cuda"),
}


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line."""


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SearchConfig:
    """One run: data, method, algorithm (paper sections 3 and 4), and where it runs.

    Raises:
        ConfigError: a value outside its range, named by its flag.

    Example:
        >>> SearchConfig(batch_size=1)
        Traceback (most recent call last):
        esapn.config.ConfigError: --batch-size must be at least 2, got 1
    """

    data: str = _setting("synthetic", "'synthetic', or a file or folder of ratings")
    task: str = _setting("binary", "rating > 3.5 (MSE), or five classes (cross-entropy)")
    method: str = _setting("esapn", "size search, or one fixed size")
    mode: str = _setting("paper", "the published algorithm")
    order: str = _setting("shuffle", "of the stream: a seeded permutation, or by timestamp")
    seed: int = _setting(0, "of the order, the initialisation and the sampled actions")
    device: str = _setting("auto", "auto takes a GPU where there is one")
    events: int = _setting(200_000, "length of the synthetic stream")
    train_fraction: float = _setting(0.75, "of the events; the rest is the test part")
    batch_size: int = _setting(500, "events per step")
    sizes: tuple[int, ...] = _setting((2, 4, 8, 16, 64, 128), "candidate sizes D, increasing")
    fixed_size: int = _setting(128, "the size of every row with --method fixed")
    init_std: float = _setting(1.0, "rows start as N(0, std^2)")
    tower: str = _setting("norm", "BatchNorm and tanh on a tower's output, or the output as it is")
    hidden: int = _setting(512, "width of the recommender's inference layer")
    lr: float = _setting(1e-3, "Adam, recommender")
    history: int = _setting(5, "T: losses of an ID that form its reward's baseline")
    policy_hidden: int = _setting(512, "width of a policy's hidden layer")
    policy_lr: float = _setting(1e-4, "Adam, policies")
    frequency_dim: int = _setting(32, "width of the frequency embedding in a policy's state")
    max_frequency: int = _setting(4096, "frequencies from here on share one embedding row")
    log_every: int = _setting(20, "batches between two lines of the run's log")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                _refuse(name, f"must be one of {', '.join(choices)}", getattr(self, name))
        least = dict.fromkeys(
            ("hidden", "history", "policy_hidden", "frequency_dim", "max_frequency", "log_every"), 1
        )
        for name, low in {**least, "batch_size": 2, "events": 1, "fixed_size": 1}.items():
            if getattr(self, name) < low:
                _refuse(name, f"must be at least {low}", getattr(self, name))
        for name in ("lr", "policy_lr"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, "must be positive and finite", getattr(self, name))
        if not 0 <= self.init_std < math.inf:
            _refuse("init_std", "must be finite and not negative", self.init_std)
        if not 0 < self.train_fraction < 1:
            _refuse("train_fraction", "must lie between 0 and 1", self.train_fraction)
        if not 0 <= self.seed < 2**63:
            _refuse("seed", "must lie between 0 and 2^63 - 1", self.seed)
        increasing = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or self.sizes[0] < 1 or not increasing:
            _refuse("sizes", "must be positive and strictly increasing", list(self.sizes))

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Sizes that a row can have under the method."""
        return self.sizes if self.method == "esapn" else (self.fixed_size,)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _refuse(name: str, rule: str, value: object) -> None:
    raise ConfigError(f"--{name.replace('_', '-')} {rule}, got {value}")
