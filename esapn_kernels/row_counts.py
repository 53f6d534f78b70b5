"""Decayed counts of a table's ids, and the sizes that they are worth within a budget.

    count    u(x) += 2^(t / half_life) for every lookup, t lookups so far: no other count decays
    sizes    d(x) = the largest size <= s sqrt(u(x))        the smallest where there is none
    fit      the largest s, up to a given one, whose rows fit the pages, from a histogram of u

A bin of the histogram is the exponent of u and the first three bits of its fraction, so eight bins
double u and no logarithm is rounded. ``s`` is one of those at which a bin begins to have the second
size.

Source: decay by growing weights: Cormode et al., "Forward Decay", ICDE 2009.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .storage.arena import Arena

__all__ = ["RowCounts"]

_BINS = 2048
_SHIFT = 20
"""Bits of a float32 beside its sign, exponent and the first three of its fraction."""

_FIRST = 8
"""The bin of the smallest normal number; what is below was never looked up, or is forgotten."""

_LARGEST = 60.0
"""Beyond 2^60 the weight of a lookup and all counts are divided."""


class RowCounts:
    """Counts ``u`` of an arena's rows, and from which count on rows have which size.

    ``u`` is a decayed count times ``2^log_weight``, the weight that a lookup has at present.

    Args:
        arena: the rows.
        half_life: a lookup counts half after so many lookups.
        padding: whether there is a padding row, of the largest size and never counted.
    """

    def __init__(self, arena: Arena, half_life: float = math.inf, padding: bool = False) -> None:
        device, sizes = arena.storage.device, arena.sizes
        self.arena, self.half_life, self.padding = arena, half_life, padding
        self.u = torch.zeros(arena.num_rows, device=device)
        self.log_weight = 0.0
        self.histogram = self._count_bins()
        # Of every level but the first; at first no row is large enough for any.
        self.least = torch.full((len(sizes) - 1,), math.inf, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the counts, of their histogram and of where sizes begin."""
        return self.u.nbytes + self.histogram.nbytes + self.least.nbytes

    def _bins(self, u: Tensor) -> Tensor:
        return u.view(torch.int32) >> _SHIFT

    def _count_bins(self) -> Tensor:
        return torch.bincount(self._bins(self.u), minlength=_BINS).int()

    def add(self, ids: Tensor, counts: Tensor) -> None:
        """The rows ``ids``, distinct, were looked up ``counts`` times."""
        before = self.u[ids]
        after = before + counts * 2.0**self.log_weight
        self.u[ids] = after
        one = torch.ones_like(ids, dtype=torch.int32)
        self.histogram.index_add_(0, self._bins(after), one)
        self.histogram.index_add_(0, self._bins(before), -one)
        if self.half_life < math.inf:
            self.log_weight += int(counts.sum()) / self.half_life
            if self.log_weight > _LARGEST:
                self._rescale()

    def _rescale(self) -> None:
        """Divide by a power of two, which rounds nothing but what is forgotten."""
        octaves = math.floor(self.log_weight)
        self.u *= 2.0**-octaves
        # A size begins above 0, where forgotten rows are; in float64, for 0 times infinity is none.
        least = (self.least.double() * 2.0 ** -min(octaves, 1000)).float()
        self.least = least.clamp(min=torch.finfo(least.dtype).tiny)
        self.log_weight -= octaves
        self.histogram = self._count_bins()

    def fit(self, reserve: float, scale: float = math.inf) -> None:
        """Find the largest ``s`` whose rows fit all pages but the part ``reserve`` of them.

        Counts below ``(size / scale)^2``, decayed, are worth no row of a size.
        """
        arena = self.arena
        pages = arena.page_level.numel() - 1
        room = pages - max(math.ceil(pages * reserve), arena.kept_pages)
        begin = torch.arange(_BINS, dtype=torch.int32, device=arena.storage.device) << _SHIFT
        begin = begin.view(torch.float32).nan_to_num(math.inf, math.inf)
        # By the bin from which on rows have the second size, that from which on they have a size.
        ratio = [(size / arena.sizes[1]) ** 2 for size in arena.sizes[1:]]
        edges = begin.double()
        wanted = edges[_FIRST:, None] * torch.tensor(ratio, dtype=edges.dtype, device=edges.device)
        first = torch.searchsorted(edges, wanted)
        # Ids from every bin on; beyond the last none.
        above = self.histogram.flip(0).cumsum(0).flip(0)
        above = torch.cat([above, above.new_zeros(1)])
        larger = above[first]
        every = torch.full_like(larger[:, :1], arena.num_rows - self.padding)
        rows = torch.cat([every, larger], dim=1)
        rows[:, :-1] -= larger
        rows[:, -1] += self.padding
        per_page = torch.tensor(arena.rows_per_page, device=rows.device)
        fits = (-(-rows // per_page)).sum(1) <= room
        least = begin[first[fits.int().argmax()].clamp(max=_BINS - 1)]
        weight = 2.0**self.log_weight
        floor = [(size / scale) ** 2 * weight for size in arena.sizes[1:]]
        least = torch.maximum(least, torch.tensor(floor, device=least.device))
        self.least = torch.where(fits.any(), least, math.inf)

    def levels(self, ids: Tensor, times: float = 1.0) -> Tensor:
        """Levels that rows are worth whose counts are so many ``times`` those of ``ids``."""
        return torch.bucketize(self.u[ids] * times, self.least, right=True)

    def state_dict(self) -> dict[str, Any]:
        """What the counts go on from."""
        return {"u": self.u.clone(), "log_weight": self.log_weight, "least": self.least.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self.u.copy_(state["u"])
        self.least.copy_(state["least"])
        self.log_weight = state["log_weight"]
        self.histogram = self._count_bins()

    def decayed(self) -> Tensor:
        """The counts as they are now, float64 ``[N]``, whatever a lookup weighs."""
        return self.u.double() * 2.0**-self.log_weight

    def load_decayed(
        self, counts: Tensor, least: list[float] | None, log_weight: float = 0.0
    ) -> None:
        """Take what :meth:`decayed` gave, maybe of other rows.

        Args:
            counts: ``[N]``.
            least: where sizes begin, as :meth:`decayed_least` gave; default: until the next
                :meth:`fit` no row is worth more than the smallest.
            log_weight: what a lookup weighs; where it is as before, so are all numbers to the bit.
        """
        self.u.copy_(counts * 2.0**log_weight)
        self.log_weight = log_weight
        found = [math.inf] * len(self.least) if least is None else least
        self.least.copy_(torch.tensor(found, dtype=torch.float64) * 2.0**log_weight)
        self.histogram = self._count_bins()

    def decayed_least(self) -> list[float]:
        """From which counts, as :meth:`decayed` gives them, rows have which size."""
        return (self.least.double() * 2.0**-self.log_weight).tolist()
