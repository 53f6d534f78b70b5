"""Rules of the fused optimizers on rows of one size: a few torch calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.layout import row_table
from ..ops.update import RULES, Update

__all__ = ["update_rows"]


def update_rows(update: Update, storage: Tensor, start: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Step distinct rows of one size by ``update``'s rule, rows and state in place.

        sgd              e -= lr g
        adagrad          s += g^2              e -= lr g / (sqrt(s) + eps)
        rowwise_adagrad  s_x += mean(g^2)      e -= lr g / (sqrt(s_x) + eps)
        adam             m = beta1^a m + (1 - beta1) g,   v = beta2^a v + (1 - beta2) g^2
                         e -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

        rowwise_adam     m as adam,   v_x = beta2^a v_x + (1 - beta2) mean(g^2)
                         e -= lr (m / (1 - beta1^t)) / (sqrt(v_x / (1 - beta2^t)) + eps)

    with ``a = t - last_step[x]``, the steps since the row was last touched, this one included; then
    ``last_step[x] = t``. Before, where ``update.shaped``, one after the other:

        clip_value       g = min(max(g, -clip_value), clip_value)
        clip_row_norm    g *= min(1, clip_row_norm / (norm(g) + 1e-6))
        l2               g += l2 e
        decay            e *= 1 - lr decay

    Args:
        update: the rule and its state; the clock stands at this step already.
        storage: all rows, flat ``[capacity]``; the rows are rounded to its dtype when stored.
        start: int64 ``[U]``, first elements of the rows, in any alignment.
        ids: int64 ``[U]``, whose rows they are; distinct.
        grad: ``[U, d]``, each row's gradient summed over its occurrences, in the compute dtype
            (fp32; fp64 for fp64 rows); left as it is.

    Example:
        >>> from esapn_kernels.ops.update import rule_numbers
        >>> rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> step = Update("sgd", torch.tensor(rule_numbers(lr=0.5), dtype=torch.float64))
        >>> update_rows(step, rows, torch.tensor([1]), torch.tensor([0]), torch.ones(1, 2))
        >>> rows
        tensor([1.0000, 1.5000, 2.5000, 4.0000])
    """
    storage, dim = storage.detach(), grad.shape[1]
    lr, eps, *shape = update.numbers[5:].tolist()
    rows = row_table(storage, dim)
    row = rows.index_select(0, start).to(grad.dtype)
    if update.shaped:
        grad = _shaped(row, grad, *shape)
    if update.rule == "sgd":
        direction = grad
    elif update.rule == "adagrad":
        table = row_table(update.state[0], dim)
        total = table.index_select(0, start).addcmul_(grad, grad)
        table.index_copy_(0, start, total)
        direction = grad / total.sqrt_().add_(eps)
    elif update.rule == "rowwise_adagrad":
        assert update.row_sums is not None
        total = update.row_sums.index_select(0, ids) + grad.square().mean(1)
        update.row_sums.index_copy_(0, ids, total.to(update.row_sums.dtype))
        direction = grad / total.sqrt_().add_(eps)[:, None]
    elif update.rule in ("adam", "rowwise_adam"):
        direction = _adam_direction(update, start, ids, grad)
    else:
        raise ValueError(f"rule must be one of {RULES}, got {update.rule!r}")
    row.sub_(direction * lr)
    rows.index_copy_(0, start, row.to(storage.dtype))


def _shaped(
    row: Tensor, grad: Tensor, l2: float, shrink: float, clip_value: float, clip_row_norm: float
) -> Tensor:
    """The gradient as the rule takes it; ``row`` decays in place."""
    if clip_value < math.inf:
        grad = grad.clamp(-clip_value, clip_value)
    if clip_row_norm < math.inf:
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        grad = grad * (clip_row_norm / norm.add_(1e-6)).clamp_(max=1)
    if l2:
        grad = grad.add(row, alpha=l2)
    row.mul_(shrink)
    return grad


def _adam_direction(update: Update, start: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    """Decayed moments take the gradient and are stored; returns their corrected quotient."""
    assert update.clock is not None and update.last_step is not None
    _, beta1, beta2, _, _, _, eps, *_ = update.numbers.tolist()
    t = update.clock[0]
    age = t - update.last_step.index_select(0, ids)
    update.last_step[ids] = t.to(update.last_step.dtype)

    def moved(held: Tensor, places: Tensor, beta: float, new: Tensor) -> Tensor:
        # In fp64, and one number per row: the error of beta^age grows with age.
        decay = torch.pow(beta, age).to(g.dtype)
        decay = decay[:, None] if held.dim() == 2 else decay
        moment = held.index_select(0, places).mul_(decay).add_(new, alpha=1 - beta)
        held.index_copy_(0, places, moment)
        return moment

    m = moved(row_table(update.state[0], g.shape[1]), start, beta1, g)
    if update.row_sums is None:
        v = moved(row_table(update.state[1], g.shape[1]), start, beta2, g * g)
    else:
        v = moved(update.row_sums, ids, beta2, g.square().mean(1))[:, None]
    first, second = 1 - update.clock[1:]
    return m.div_(first).div_(v.div_(second).sqrt_().add_(eps))
