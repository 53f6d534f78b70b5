"""The fewest bytes that each mode of the benchmark can move, of which the roof is made.

A model counts what the work itself needs: every input read once and every output written once, a
row once however often it is looked up. ``cold`` counts a row once per lookup instead, which is what
a table far larger than the caches costs. Neither counts sorting, padding, or what an implementation
reads twice. A provider with a dense gradient is charged for the dense gradient: it is how it works.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esapn_kernels.testing import backward_bytes, lookup_bytes, promote_bytes

PAPER_ROWS = {2: 1_041, 4: 10_854, 8: 18_146, 16: 30_836, 64: 22_830, 128: 54_786}
"""Rows per size that the ESAPN paper reports for the users of ml-20m."""

SIZES = tuple(PAPER_ROWS)
DIM = SIZES[-1]

STATE = {"sgd": (0, 0), "adagrad": (1, 0), "rowwise_adagrad": (0, 1), "adam": (2, 1)}
"""Numbers of optimizer state per element and per row, 4 bytes each; Adam's rows keep their last
step."""


@dataclass(frozen=True)
class Looked:
    """What a batch looks up: ids and distinct rows per size.

    Attributes:
        counts: ids per size, duplicates counted, ``[n]``.
        distinct: distinct rows per size, ``[n]``.
        ragged: whether a row has a location and hops.
    """

    counts: list[int]
    distinct: list[int]
    ragged: bool = True

    @classmethod
    def of(cls, ids: Tensor, row_sizes: Tensor, *, ragged: bool = True) -> Looked:
        """Counts ``ids`` in a table of ``row_sizes``; without ``ragged`` every row is of 128."""
        known = torch.tensor(SIZES)

        def count(some: Tensor) -> list[int]:
            sizes = row_sizes[some] if ragged else torch.full_like(some, DIM)
            level = torch.searchsorted(known, sizes)
            numbers: list[int] = torch.bincount(level, minlength=len(SIZES)).tolist()
            return numbers

        return cls(count(ids), count(ids.unique()), ragged)

    @property
    def cold(self) -> Looked:
        """The same lookups, as if every row were read anew."""
        return Looked(self.counts, self.counts, self.ragged)

    @property
    def ids(self) -> int:
        return sum(self.counts)

    @property
    def elements(self) -> int:
        """Of the distinct rows."""
        return sum(d * n for d, n in zip(SIZES, self.distinct, strict=True))


def forward_bytes(looked: Looked, itemsize: int = 4, out_itemsize: int = 4) -> int:
    """Id, location (4 B, where ragged) and output per lookup, and every distinct row."""
    moved = lookup_bytes(
        SIZES, looked.counts, itemsize, out_itemsize=out_itemsize, distinct=looked.distinct
    )
    return moved if looked.ragged else moved - 4 * looked.ids


def forward_flop(looked: Looked) -> int:
    """Multiplications and additions, a product of a row below the largest size per lookup."""
    return sum(2 * d * DIM * n for d, n in zip(SIZES[:-1], looked.counts[:-1], strict=True))


def dense_backward_bytes(looked: Looked, grad_elements: int) -> int:
    """8 B of index and the output's gradient per lookup; a whole table's gradient written.

    Rows below the largest size are read as well, for the gradient of the hops.
    """
    below = looked.elements - DIM * looked.distinct[-1]
    return looked.ids * (8 + 4 * DIM) + 4 * (below if looked.ragged else 0) + 4 * grad_elements


def sparse_backward_bytes(looked: Looked, rule: str) -> int:
    """The gradient and the optimizer's step on the rows of the batch alone."""
    element, row = STATE[rule]
    return backward_bytes(
        SIZES,
        looked.counts,
        4,
        distinct=looked.distinct,
        state_bytes=4 * element,
        row_bytes=4 * row if looked.ragged else 0,
    )


def dense_step_bytes(looked: Looked, rule: str, grad_elements: int) -> int:
    """Dense gradient, and an optimizer that reads it and reads and writes all rows and state."""
    update = (4 + 8 + 8 * STATE[rule][0]) * grad_elements
    return forward_bytes(looked) + dense_backward_bytes(looked, grad_elements) + update


def sparse_step_bytes(looked: Looked, rule: str) -> int:
    """Forward, and :func:`sparse_backward_bytes`: nothing but the rows of the batch."""
    return forward_bytes(looked) + sparse_backward_bytes(looked, rule)


def promotion_bytes(counts: list[int]) -> int:
    """``counts[k]`` distinct rows of size k one size up, Adam's state with them."""
    element, row = STATE["adam"]
    return promote_bytes(SIZES, counts, 4, state_bytes=4 * element, row_bytes=4 * row)
