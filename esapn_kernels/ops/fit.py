"""Rows from outputs: what a row of a smaller size must hold so that its output is as required.

The output of a row ``e`` of level ``k`` is ``M_k e + c_k`` in R^D (see :mod:`.compose`), with
``D > d_k``: few outputs can be met exactly. :func:`nearest` takes values and meets them as well as
the level allows; :func:`drawn` takes random numbers and meets their mean and their variance.
:func:`down_hops` takes the outputs of the rows one level above, as one matrix per level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .chain import compute_dtype, full_chain
from .compose import compose, same_bytes

__all__ = ["DownHops", "LevelMap", "down_hops", "drawn", "level_maps", "nearest"]

_RIDGE = 1e-12


@dataclass(frozen=True)
class LevelMap:
    """``y = M e + c``, the map from the rows of a level to their outputs, in fp64.

    Attributes:
        matrix: ``M``, ``[D, d]``.
        offset: ``c``, ``[D]``.
        precision: of the rows; singular values of ``M`` below it, relative to the largest, count
            as zero: what a row could gain by them is less than what its rounding loses.
    """

    matrix: Tensor
    offset: Tensor
    precision: float

    @cached_property
    def inverse(self) -> Tensor:
        """``M^+``, the pseudo-inverse, ``[d, D]``."""
        return torch.linalg.pinv(self.matrix, rtol=self.precision)

    @cached_property
    def spread(self) -> float:
        """The factor ``s`` of :func:`drawn`; 0 where the hops let nothing through."""
        dim = self.matrix.shape[0]
        mean = (self.matrix @ self.inverse).sum(1).square().sum() / dim
        deviations = self.matrix.square().sum() - self.matrix.sum(1).square().sum() / dim
        return float(((dim - mean) / deviations).sqrt()) if deviations > 0 else 0.0


def level_maps(chain: Tensor, sizes: Sequence[int]) -> list[LevelMap]:
    """The maps of all levels but the last, whose rows are their outputs.

    Args:
        chain: packed hops or tails, any float dtype.
        sizes: increasing sizes ``d_0 < ... < d_{n-1}``.

    Example:
        >>> (level,) = level_maps(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
        >>> level.matrix.tolist(), level.offset.tolist()
        ([[1.0], [2.0]], [3.0, 4.0])
    """
    hops = full_chain(chain.detach(), sizes).double()
    blocks = compose(hops, sizes).split([d + 1 for d in sizes[:-1]])
    precision = torch.finfo(chain.dtype).eps
    return [LevelMap(block[:-1].t(), block[-1], precision) for block in blocks]


def nearest(outputs: Tensor, level: LevelMap) -> Tensor:
    """Rows whose outputs are nearest to ``outputs``: ``e = argmin |M e + c - t| = M^+ (t - c)``.

    Of several such rows, where ``M`` has not full rank, the shortest.

    Args:
        outputs: ``t``, ``[R, D]``, any float dtype.

    Returns:
        ``[R, d]``, fp64.

    Example:
        >>> (level,) = level_maps(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))
        >>> nearest(torch.tensor([[5.0, 8.0], [6.0, 5.0]]), level)  # on the line (3, 4) + e (1, 2)
        tensor([[2.0000],
                [1.0000]], dtype=torch.float64)
    """
    return (outputs.double() - level.offset) @ level.inverse.t()


def drawn(draft: Tensor, level: LevelMap) -> Tensor:
    """Rows from random numbers, such that their outputs have the mean and variance of these.

        e = M^+ (m 1 - c) + s (r_{1..d} - m 1)        m = (1/D) sum_j r_j
        s^2 = (D - |M M^+ 1|^2 / D) / (|M|_F^2 - |M 1|^2 / D)

    With ``r_1 ... r_D`` independent of variance ``v``, the deviations ``r - m`` have covariance
    ``v (I - 1 1^T / D)`` and none with ``m``, whose variance is ``v / D``; so the variance of the
    output, averaged over its D columns, is

        v (s^2 (|M|_F^2 - |M 1|^2 / D) + |M M^+ 1|^2 / D) / D = v

    The mean of the output is the one nearest to that of the draft. A draft of one number ``m``
    gives the row that is :func:`nearest` to it.

    Args:
        draft: ``r``, ``[R, D]``, any float dtype.

    Returns:
        ``[R, d]``, fp64.

    Example:
        >>> (level,) = level_maps(torch.tensor([1.0, 0, 2, 0, 1, 0, 0, 0, 0]), (2, 3))
        >>> rows = drawn(torch.randn(100_000, 3), level)
        >>> outputs = rows @ level.matrix.t() + level.offset
        >>> bool((outputs.square().mean() - 1).abs() < 0.02)
        True
    """
    draft = draft.double()
    mean = draft.mean(1, keepdim=True)
    deviation = draft[:, : level.matrix.shape[1]] - mean
    return nearest(mean.expand_as(draft), level) + level.spread * deviation


def down_hops(chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """The maps by which rows go one level down, to the nearest output.

        e' = argmin |M_k e' + c_k - (M_{k+1} e + c_{k+1})| = M_k^+ (M_{k+1} e + c_{k+1} - c_k)

    Outputs of level ``k`` are among those of level ``k + 1``, so several hops down are as near as
    one solve for all of them. Solved in fp64, from the normal equations with a ridge and two
    refinements that take its error away, so that hops without full rank have a solution too. The
    ridge is ``1e-12 |M_k|_F^2``, of a 16-bit chain ``eps^2 |M_k|_F^2 / d_k``: what a row gains by
    smaller singular values is less than what its rounding loses. Nothing is read on the host. Where
    both maps only scale numbers and append zeros, as padded hops and tails of zeros do, ``D_k``
    only multiplies ``e_j`` by ``1/g``.

    Args:
        chain: packed hops or tails, any float dtype.
        sizes: increasing sizes ``d_0 < ... < d_{n-1}``.

    Returns:
        One block ``D_k = [M_k^+ M_{k+1} | M_k^+ (c_{k+1} - c_k)]^T``, ``[d_{k+1} + 1, d_k]``, per
        level below the last, ``k = n - 2 ... 0``: packed as the chain of the sizes in reverse.
        fp32, of an fp64 chain fp64.

    Example:
        >>> down_hops(torch.tensor([1.0, 2.0, 3.0, 4.0]), (1, 2))  # (e_0 + 2 e_1 - 11) / 5
        tensor([ 0.2000,  0.4000, -2.2000])
    """
    return _packed(_solve(chain, sizes, range(len(sizes) - 1)), chain, sizes)


class DownHops:
    """:func:`down_hops` of one arena's chain on a CPU: of levels that rows go down to, once.

    What was solved is used again as long as the chain's numbers are the same, which are compared as
    in :class:`~.compose.ComposedCache`.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, dict[int, Tensor]] | None = None

    def __call__(self, chain: Tensor, sizes: Sequence[int], levels: Iterable[int]) -> Tensor:
        """``down_hops(chain, sizes)``, with zeros for levels that were never asked for.

        Args:
            chain: on a CPU, in plain eager code.
            sizes: the same at every call.
            levels: ``k`` of the ``D_k`` that are needed.

        Example:
            >>> chain, down = torch.tensor([1.0, 2.0, 3.0, 4.0]), DownHops()
            >>> down(chain, (1, 2), [])
            tensor([0., 0., 0.])
            >>> down(chain, (1, 2), [0])
            tensor([ 0.2000,  0.4000, -2.2000])
        """
        kept = self._kept
        if kept is None or not same_bytes(kept[0], chain):
            # What is solved for is what is compared, should another thread write to the chain.
            seen = chain.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
            self._kept = kept = seen, {}
        seen, blocks = kept
        blocks |= _solve(seen, sizes, [k for k in levels if k not in blocks])
        return _packed(blocks, chain, sizes)

    def bytes(self) -> int:
        """Bytes of what is kept."""
        if self._kept is None:
            return 0
        seen, blocks = self._kept
        return seen.nbytes + sum(block.nbytes for block in blocks.values())


def _packed(blocks: dict[int, Tensor], chain: Tensor, sizes: Sequence[int]) -> Tensor:
    """The blocks of all levels, zeros for those that are missing."""
    dtype = compute_dtype(chain.dtype)
    parts = [
        blocks[k] if k in blocks else chain.new_zeros((sizes[k + 1] + 1) * sizes[k], dtype=dtype)
        for k in range(len(sizes) - 2, -1, -1)
    ]
    return torch.cat(parts) if parts else chain.new_empty(0, dtype=dtype)


def _solve(chain: Tensor, sizes: Sequence[int], levels: Sequence[int]) -> dict[int, Tensor]:
    """``D_k`` of the levels ``k``, in one row each."""
    if not levels:
        return {}
    hops = full_chain(chain.detach(), sizes).double()
    dim = sizes[-1]
    # The last level's rows are their outputs.
    last = torch.eye(dim + 1, dim, dtype=torch.float64, device=chain.device)
    maps = [*compose(hops, sizes).split([d + 1 for d in sizes[:-1]]), last]
    eps = torch.finfo(chain.dtype).eps
    blocks = {}
    for k in levels:
        narrow, target = maps[k], maps[k + 1].clone()
        target[-1] -= narrow[-1]
        ridge = max(_RIDGE, eps**2 / (len(narrow) - 1))
        found = _solved(narrow[:-1], target, ridge).reshape(-1)
        blocks[k] = found.to(compute_dtype(chain.dtype))
    return blocks


def _solved(rows: Tensor, target: Tensor, relative: float) -> Tensor:
    """``X`` with ``X rows`` nearest to ``target``: ``M^T`` is ``rows``, ``[d, D]``."""
    gram = rows @ rows.t()
    ridge = relative * gram.diagonal().sum()
    ridge = torch.where(ridge > 0, ridge, 1.0)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky_ex(gram).L

    def step(residual: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, rows @ residual.t(), upper=False)
        return torch.linalg.solve_triangular(factor.t(), half, upper=True).t()

    found = step(target)
    for _ in range(2):
        found = found + step(target - found @ rows)
    # Without products where there is nothing to sum: by its own quotient, exactly.
    kept, gain = target.diagonal()[: len(rows)], rows.diagonal()
    plain = target.new_zeros(found.shape)
    plain.diagonal()[: len(rows)] = kept / gain
    scales = torch.count_nonzero(rows) == torch.count_nonzero(gain)
    scales &= torch.count_nonzero(target) == torch.count_nonzero(target.diagonal())
    return torch.where(scales & gain.all(), plain, found)
