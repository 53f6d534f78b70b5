"""What a fused optimizer does with the gradient of a row: the rules, and what they need.

The rules are written out in ``cpu/update.py`` and, inside the kernels, in ``gpu/update.py`` and
``csrc/update.h``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["RULES", "CollectedRows", "RowStep", "Update", "is_shaped", "rule_numbers"]

RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam")

_PLAIN = (0.0, 1.0, math.inf, math.inf)
"""The last four of :func:`rule_numbers` where none of them changes a step."""


@dataclass(frozen=True)
class Update:
    """One step of a fused optimizer on one arena, as the operators take it.

    Attributes:
        rule: one of ``RULES``.
        numbers: fp64 ``[11]``, on the storage's device, what :func:`rule_numbers` gives: kernels
            read the present values, so that a schedule compiles nothing anew and a captured graph
            follows it.
        state: tensors in the arena's layout ``[capacity]``, fp32 (fp64 for fp64 rows):
            ``adagrad`` (sum,), ``adam`` (exp_avg, exp_avg_sq), ``rowwise_adam`` (exp_avg,), else
            empty.
        row_sums: fp32 (fp64 for fp64 rows) ``[N]``, one number a row: ``rowwise_adagrad`` the sum,
            ``rowwise_adam`` the second moment, else ``None``.
        last_step: int32 ``[N]``, the step that last touched the row; both Adams, else ``None``.
        clock: fp64 ``[3]``: ``t`` (the last step, counted from 1), ``beta1^t``, ``beta2^t``, which
            the operator moves on to this step; both Adams.
        shaped: whether the gradient is clipped, or rows decay. Where not, the last four of
            ``numbers`` are not read.
    """

    rule: str
    numbers: Tensor
    state: tuple[Tensor, ...] = ()
    row_sums: Tensor | None = None
    last_step: Tensor | None = None
    clock: Tensor | None = None
    shaped: bool = False

    def tick(self) -> None:
        """Move the clock on to this step, where there is one: on a GPU the first kernel does."""
        if self.clock is not None:
            self.clock.mul_(self.numbers.narrow(0, 0, 3))
            self.clock.narrow(0, 0, 1).add_(1)


class CollectedRows(NamedTuple):
    """Gradients of rows that lookups met, for a step later on.

    That of ``ids[r]`` is ``values[place[r] : place[r] + d]``, ``d`` the size of ``level[r]``.

    Attributes:
        ids: int64 ``[R]``; -1 is no row.
        level: int8 ``[R]``.
        place: int64 ``[R]``.
        values: flat, in the dtype of the sums.
        full_width: row ``r`` has its place at ``r D``, and zeros behind its own numbers. Native
            kernels leave no gap between rows instead.
    """

    ids: Tensor
    level: Tensor
    place: Tensor
    values: Tensor
    full_width: bool


def rule_numbers(
    lr: float,
    eps: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    l2: float = 0.0,
    decay: float = 0.0,
    clip_value: float = math.inf,
    clip_row_norm: float = math.inf,
) -> tuple[float, ...]:
    """What a rule is set to, ``(1, beta1, beta2, log2 beta1, log2 beta2, lr, eps)`` and then
    ``(l2, 1 - lr decay, clip_value, clip_row_norm)``.

    The first three are what a step multiplies Adam's clock by.

    >>> rule_numbers(0.1, betas=(0.5, 0.25))
    (1.0, 0.5, 0.25, -1.0, -2.0, 0.1, 0.0, 0.0, 1.0, inf, inf)
    """
    # exp2 of any multiple of the last is 0, as a power of 0 is.
    logs = [math.log2(beta) if beta > 0 else -1e30 for beta in betas]
    return (1.0, *betas, *logs, lr, eps, l2, 1 - lr * decay, clip_value, clip_row_norm)


def is_shaped(numbers: tuple[float, ...]) -> bool:
    """Whether :func:`rule_numbers` clips gradients, or lets rows decay.

    >>> is_shaped(rule_numbers(0.1)), is_shaped(rule_numbers(0.1, clip_value=2.0))
    (False, True)
    """
    return numbers[-len(_PLAIN) :] != _PLAIN


class RowStep(Protocol):
    """What the storage and the lookup know of a fused optimizer."""

    @property
    def deferred(self) -> bool:
        """Whether backward collects the rows' gradients, rather than stepping the rows."""

    @property
    def state_per_element(self) -> Mapping[str, float]:
        """State of the Parameter's shape: its names and what it starts as."""

    @property
    def state_per_id(self) -> Mapping[str, float]:
        """State ``[num_rows]``: its names and what it starts as."""

    def begin_step(self, parameter: Tensor) -> Update:
        """Count one step of the rows in ``parameter`` and say what it does to a row."""
