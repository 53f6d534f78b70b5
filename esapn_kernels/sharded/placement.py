"""Which rank owns an id, and which of its rows it is.

    position    p(x) = (a x + b) mod N      a: nearest to 0.618 N of those without a factor of N
    owner       r with floor(r N / W) <= p(x) < floor((r + 1) N / W)
    row         p(x) - floor(r N / W)

``p`` is a bijection of ``[0, N)``. Ids that follow each other, as the most frequent ones often do,
lie the golden ratio apart, so that every rank has as many of them as any other; ``b`` depends on
the name of the table, so that the first ids of several tables lie on several ranks. ``p`` knows
nothing of the number of ranks ``W``: what is saved in the order of positions is cut anew for any
other.

Source: multiplicative hashing by the golden ratio: Knuth, "The Art of Computer Programming" 3, 6.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from zlib import crc32

from torch import Tensor

__all__ = ["Placement"]

_MOST_ROWS = 3_000_000_000
"""Beyond it ``a x`` may not fit 64 bits."""


@dataclass(frozen=True)
class Placement:
    """Where the rows of the table ``name``, of ``num_rows`` ids, lie on ``world`` ranks.

    Raises:
        ValueError: no row, or more than 3e9.

    Example:
        >>> import torch
        >>> place = Placement(10, world=2)
        >>> ids = torch.arange(10)
        >>> place.owner(place.position(ids)).tolist()
        [0, 1, 0, 0, 1, 1, 0, 1, 1, 0]
        >>> torch.equal(place.ids(place.position(ids)), ids)
        True
    """

    num_rows: int
    world: int
    name: str = ""
    factor: int = field(init=False)
    offset: int = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_rows <= _MOST_ROWS:
            raise ValueError(f"a sharded table has 1 to 3e9 rows, got {self.num_rows}")
        object.__setattr__(self, "factor", golden_factor(self.num_rows))
        object.__setattr__(self, "offset", crc32(self.name.encode()) * self.num_rows >> 32)

    def position(self, ids: Tensor) -> Tensor:
        """Positions of the ids, int64, of the same shape."""
        return (ids.long() * self.factor + self.offset) % self.num_rows

    def ids(self, position: Tensor) -> Tensor:
        """The ids at the positions."""
        inverse = pow(self.factor, -1, self.num_rows)
        return ((position - self.offset) % self.num_rows * inverse) % self.num_rows

    def first(self, rank: int) -> int:
        """The first position of a rank; that of rank ``world`` is the number of rows."""
        return rank * self.num_rows // self.world

    def count(self, rank: int) -> int:
        """How many rows a rank owns."""
        return self.first(rank + 1) - self.first(rank)

    def owner(self, position: Tensor) -> Tensor:
        """The rank that owns each position."""
        return ((position + 1) * self.world - 1) // self.num_rows

    @property
    def block(self) -> int:
        """The most rows that a rank owns."""
        return -(-self.num_rows // self.world)

    def code(self, ids: Tensor) -> Tensor:
        """``owner block + row``: ids as numbers in blocks of one length, which go by rank."""
        position = self.position(ids)
        owner = self.owner(position)
        return owner * self.block + position - owner * self.num_rows // self.world


def golden_factor(num_rows: int) -> int:
    """The number nearest to ``0.618 num_rows`` that shares no factor with it.

    >>> [golden_factor(n) for n in (1, 2, 10, 1000)]
    [1, 1, 7, 619]
    """
    start = max(round(num_rows * (math.sqrt(5) - 1) / 2), 1)
    for distance in range(num_rows + 1):
        for factor in (start + distance, start - distance):
            if factor > 0 and math.gcd(factor, num_rows) == 1:
                return factor
    raise AssertionError("1 shares no factor with any number")
