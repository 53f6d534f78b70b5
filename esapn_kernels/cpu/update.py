"""Rules of the fused optimizers on rows of one size: a few torch calls."""

from __future__ import annotations

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

    with ``a = t - last_step[x]``, the steps since the row was last touched, this one included; then
    ``last_step[x] = t``.

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
    *_, lr, eps = update.numbers.tolist()
    if update.rule == "sgd":
        direction = grad
    elif update.rule == "adagrad":
        table = row_table(update.state[0], dim)
        total = table.index_select(0, start).addcmul_(grad, grad)
        table.index_copy_(0, start, total)
        direction = grad / total.sqrt_().add_(eps)
    elif update.rule == "rowwise_adagrad":
        assert update.per_id is not None
        total = update.per_id.index_select(0, ids) + grad.square().mean(1)
        update.per_id.index_copy_(0, ids, total.to(update.per_id.dtype))
        direction = grad / total.sqrt_().add_(eps)[:, None]
    elif update.rule == "adam":
        direction = _adam_direction(update, start, ids, grad)
    else:
        raise ValueError(f"rule must be one of {RULES}, got {update.rule!r}")
    table = row_table(storage, dim)
    row = table.index_select(0, start).to(grad.dtype).sub_(direction * lr)
    table.index_copy_(0, start, row.to(storage.dtype))


def _adam_direction(update: Update, start: Tensor, ids: Tensor, g: Tensor) -> Tensor:
    """Decayed moments take the gradient and are stored; returns their corrected quotient."""
    assert update.clock is not None and update.per_id is not None
    _, *betas, _, _, _, eps = update.numbers.tolist()
    t = update.clock[0]
    age = t - update.per_id.index_select(0, ids)
    update.per_id[ids] = t.to(update.per_id.dtype)
    moments = []
    for state, beta, new in zip(update.state, betas, (g, g * g), strict=True):
        table = row_table(state, g.shape[1])
        # In fp64, and one number per row: the error of beta^age grows with age.
        decay = torch.pow(beta, age).to(g.dtype)[:, None]
        moment = table.index_select(0, start).mul_(decay).add_(new, alpha=1 - beta)
        table.index_copy_(0, start, moment)
        moments.append(moment)
    first, second = 1 - update.clock[1:]
    m, v = moments
    return m.div_(first).div_(v.div_(second).sqrt_().add_(eps))
