"""What a fused optimizer does with the gradient of a row: the rules, and what they need."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["RULES", "Update"]

RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam")


@dataclass(frozen=True)
class Update:
    """One step of a fused optimizer on one arena, as the operators take it.

    Attributes:
        rule: one of ``RULES``.
        lr: fp64, 0-d, on the storage's device: a captured graph reads its present value.
        eps: added to the denominator.
        betas: Adam's; decay of the first and second moment.
        state: tensors in the arena's layout ``[capacity]``, fp32 (fp64 for fp64 rows):
            ``adagrad`` (sum,), ``adam`` (exp_avg, exp_avg_sq), else empty.
        per_id: ``[N]``: ``rowwise_adagrad`` the sum (fp32 / fp64), ``adam`` the step that last
            touched the row (int32), else ``None``.
        clock: fp64 ``[3]``: ``t`` (this step, counted from 1), ``beta1^t``, ``beta2^t``; Adam only.
    """

    rule: str
    lr: Tensor
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    state: tuple[Tensor, ...] = ()
    per_id: Tensor | None = None
    clock: Tensor | None = None
