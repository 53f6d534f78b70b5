"""Growth without a policy: the controls that a search has to beat.

A rule says which IDs go to the next size, from how often they were seen and the size they have.

    always       enlarge                              never   keep
    random       enlarge with probability p
    thresholds   level k from t 4^(k-1) events on     (t, 4 t, 16 t, ...)
    power        the largest size <= s f^alpha        (mixed dimensions, on running counts)

Source: size ~ popularity^alpha is Ginart et al., "Mixed Dimension Embeddings", ISIT 2021, there on
counts that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import SearchConfig

__all__ = ["Rule", "level_thresholds", "rule_of"]

# (frequency [B], level [B], uniform [B]) -> bool [B]
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def level_thresholds(config: SearchConfig) -> list[float]:
    """Events from which on an ID deserves each level above the first.

    >>> level_thresholds(SearchConfig(method="thresholds", threshold=16))
    [16.0, 64.0, 256.0, 1024.0, 4096.0]
    >>> level_thresholds(SearchConfig(method="power", sizes=(2, 4, 8), power=0.5, power_scale=1.0))
    [16.0, 64.0]
    """
    sizes: Sequence[int] = config.sizes[1:]
    if config.method == "thresholds":
        return [config.threshold * 4.0**k for k in range(len(sizes))]
    return [(size / config.power_scale) ** (1 / config.power) for size in sizes]


def rule_of(config: SearchConfig, device: torch.device) -> Rule | None:
    """The rule of ``config.method``; None for methods that are not rules."""
    if config.method == "always":
        return lambda frequency, level, uniform: torch.ones_like(level, dtype=torch.bool)
    if config.method == "never":
        return lambda frequency, level, uniform: torch.zeros_like(level, dtype=torch.bool)
    if config.method == "random":
        return lambda frequency, level, uniform: uniform < config.promote_probability
    if config.method in ("thresholds", "power"):
        least = torch.tensor(level_thresholds(config), dtype=torch.float64, device=device)
        return lambda frequency, level, uniform: (
            torch.bucketize(frequency.double(), least, right=True) > level
        )
    return None
