"""The definition of every operator, hop by hop, in plain PyTorch: the oracle.

Nothing here is fast and nothing here shares code with the paths it judges. A row of level ``k`` is
``e`` in R^{d_k}; the chain of the paper is

    e_{j+1} = W_j e_j + b_j        W_j in R^{d_{j+1} x d_j},   j = k, ..., n - 2

and the lookup of an ID is its row carried to the last level. Hops given by their tails alone are

    e_{j+1} = [g_j e_j; B_j e_j + beta_j]        g_j = sqrt(d_{j+1} / d_j)

that is ``W_j = [g_j I; B_j]`` and ``b_j = [0; beta_j]``. All functions take any float dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "demote_reference",
    "lookup_grad_reference",
    "lookup_reference",
    "promote_reference",
    "split_chain",
    "update_reference",
]


def split_chain(chain: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """``(W_j, b_j)`` of the packed chain parameter, shapes ``[d_{j+1}, d_j]`` and ``[d_{j+1}]``.

    ``chain`` holds one block ``[W_j | b_j]^T`` of shape ``[d_j + 1, d_{j+1}]`` for every hop, of
    which these are views; or, shorter, one block ``[B_j | beta_j]^T`` of shape
    ``[d_j + 1, d_{j+1} - d_j]``.

    >>> (w, b), = split_chain(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
    >>> w.tolist(), b.tolist()
    ([[1.0], [2.0]], [3.0, 4.0])
    >>> (w, b), = split_chain(torch.tensor([3.0, 5.0, 7.0, 9.0, 11.0, 13.0]), (1, 4))
    >>> w.tolist(), b.tolist()
    ([[2.0], [3.0], [5.0], [7.0]], [0.0, 9.0, 11.0, 13.0])
    """
    hops = []
    offset = 0
    tails = _holds_tails(chain, sizes)
    for d_in, d_out in zip(sizes, sizes[1:], strict=False):
        if tails:
            rest = d_out - d_in
            block = chain[offset : offset + (d_in + 1) * rest].view(d_in + 1, rest)
            kept = math.sqrt(d_out / d_in) * torch.eye(d_in).to(chain)
            nothing = torch.zeros(d_in).to(chain)
            hops.append((torch.cat([kept, block[:d_in].t()]), torch.cat([nothing, block[d_in]])))
            offset += (d_in + 1) * rest
            continue
        block = chain[offset : offset + (d_in + 1) * d_out].view(d_in + 1, d_out)
        hops.append((block[:d_in].t(), block[d_in]))
        offset += (d_in + 1) * d_out
    return hops


def _holds_tails(chain: Tensor, sizes: Sequence[int]) -> bool:
    numbers = sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
    return chain.numel() < numbers


def _pack(hops: Sequence[tuple[Tensor, Tensor]], chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """``(W_j, b_j)`` as ``chain`` is packed; of the fixed part of tails nothing is kept."""
    tails = _holds_tails(chain, sizes)
    packed = [chain.new_zeros(0)]
    for (weight, bias), d_in in zip(hops, sizes, strict=False):
        block = torch.cat([weight.t(), bias[None]])
        packed.append((block[:, d_in:] if tails else block).reshape(-1))
    return torch.cat(packed)


def _row(storage: Tensor, start: int, dim: int) -> Tensor:
    return storage[start : start + dim]


def _locate(i: int, row_start: Tensor, page_level: Tensor, page: int) -> tuple[int, int]:
    start = int(row_start[i])
    return start, int(page_level[start // page])


def lookup_reference(
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> Tensor:
    """``y(x) = e_n`` for every ID, one hop after another; returns ``[*ids.shape, D]``.

    Differentiable by autograd with respect to ``storage`` and ``chain``.
    """
    hops = split_chain(chain, sizes)
    out = []
    for i in ids.reshape(-1).tolist():
        start, level = _locate(i, row_start, page_level, page)
        e = _row(storage, start, sizes[level])
        for weight, bias in hops[level:]:
            e = weight @ e + bias
        out.append(e)
    # No row at all: still a function of both, whose gradients are zeros.
    flat = torch.stack(out) if out else storage[:0].view(0, sizes[-1]) + chain[:0].sum()
    return flat.view(*ids.shape, sizes[-1])


def lookup_grad_reference(
    grad_out: Tensor,
    ids: Tensor,
    storage: Tensor,
    chain: Tensor,
    row_start: Tensor,
    page_level: Tensor,
    sizes: Sequence[int],
    page: int,
) -> tuple[Tensor, Tensor]:
    """Gradients ``(d storage, d chain)`` of :func:`lookup_reference`, written out by hand.

    Walking the hops of one ID backwards from ``g = dY``: ``dW_j += g e_j^T``, ``db_j += g``,
    ``g <- W_j^T g``; what is left at the row's own level is added to the row's gradient.
    """
    hops = split_chain(chain, sizes)
    grad_storage = torch.zeros_like(storage)
    grad_hops = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in hops]
    for i, g in zip(ids.reshape(-1).tolist(), grad_out.reshape(-1, sizes[-1]), strict=True):
        start, level = _locate(i, row_start, page_level, page)
        path = [_row(storage, start, sizes[level])]
        for weight, bias in hops[level:-1] if level < len(hops) else []:
            path.append(weight @ path[-1] + bias)
        for j in range(len(hops) - 1, level - 1, -1):
            grad_hops[j][0].add_(torch.outer(g, path[j - level]))
            grad_hops[j][1].add_(g)
            g = hops[j][0].t() @ g
        _row(grad_storage, start, sizes[level]).add_(g)
    return grad_storage, _pack(grad_hops, chain, sizes)


def promote_reference(row: Tensor, level: int, chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """The row one level up, ``W_k e + b_k``: its lookup does not change (ESAPN, SIGIR 2020)."""
    weight, bias = split_chain(chain, sizes)[level]
    return weight @ row + bias


def demote_reference(row: Tensor, level: int, chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """The row one level down whose output is nearest to the row's, by a dense solve in fp64.

    >>> chain = torch.tensor([1.0, 2.0, 3.0, 4.0])  # outputs of size 1: (3, 4) + e (1, 2)
    >>> demote_reference(torch.tensor([6.0, 5.0]), 1, chain, (1, 2))
    tensor([1.])
    """
    wide = row
    for weight, bias in split_chain(chain, sizes)[level:]:
        wide = weight @ wide + bias
    below = sizes[level - 1]
    matrix = torch.eye(below, dtype=torch.float64, device=row.device)
    offset = torch.zeros(below, dtype=torch.float64, device=row.device)
    for weight, bias in split_chain(chain.double(), sizes)[level - 1 :]:
        matrix, offset = weight @ matrix, weight @ offset + bias
    distance = wide.double() - offset
    return torch.linalg.lstsq(matrix, distance[:, None], driver="gelsd").solution[:, 0].to(row)


def update_reference(
    rule: str,
    row: Tensor,
    grad: Tensor,
    state: tuple[Tensor, ...] = (),
    *,
    lr: float,
    eps: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    step: int = 1,
    last_step: int = 0,
    l2: float = 0.0,
    decay: float = 0.0,
    clip_value: float | None = None,
    clip_row_norm: float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One row after the fused step number ``step``, and its state; nothing is changed in place.

    ``state``: ``sgd`` none; ``adagrad`` ``(s,)`` like the row; ``rowwise_adagrad`` ``(s_x,)``, one
    number; ``adam`` the moments ``(m, v)`` as step ``last_step`` left them, of which ``v`` is one
    number in ``rowwise_adam``. Adam's steps in between are those of a dense Adam that sees a zero
    gradient, but for the row, which stays. The gradient is clipped first, its numbers and then its
    norm; it takes the L2 penalty, and the row decays.

    >>> update_reference("adagrad", torch.tensor(1.0), torch.tensor(3.0), (torch.tensor(16.0),),
    ...                  lr=0.5)
    (tensor(0.7000), (tensor(25.),))
    """
    if clip_value is not None:
        grad = grad.clamp(min=-clip_value, max=clip_value)
    if clip_row_norm is not None:
        grad = grad * (clip_row_norm / ((grad * grad).sum().sqrt() + 1e-6)).clamp(max=1)
    grad, row = grad + l2 * row, (1 - lr * decay) * row
    if rule == "sgd":
        return row - lr * grad, ()
    if rule == "adagrad":
        total = state[0] + grad * grad
        return row - lr * grad / (total.sqrt() + eps), (total,)
    if rule == "rowwise_adagrad":
        total = state[0] + (grad * grad).sum() / grad.numel()
        return row - lr * grad / (total.sqrt() + eps), (total,)
    if rule in ("adam", "rowwise_adam"):
        (m, v), (beta1, beta2) = state, betas
        for now in range(last_step + 1, step + 1):
            seen = grad if now == step else torch.zeros_like(grad)
            m = beta1 * m + (1 - beta1) * seen
            square = seen * seen
            if rule == "rowwise_adam":
                square = square.sum() / grad.numel()
            v = beta2 * v + (1 - beta2) * square
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        return row - lr * m_hat / (v_hat.sqrt() + eps), (m, v)
    raise ValueError(f"unknown rule {rule!r}")
