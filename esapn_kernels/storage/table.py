"""Rows of one size: a module's ``weight``, as operators, optimizers and reports take rows.

    weight       Parameter [N, d], as nn.Embedding has it; the module's own
    storage      the same numbers, flat
    row_start    [0, d, 2 d, ...]        page_level  0 everywhere        computed, never stored

No row ever moves. Only what torch's own lookup cannot do (Triton, a fused optimizer) asks for the
locations; they are computed then.
"""

from __future__ import annotations

import weakref
from typing import cast

import torch
from torch import Tensor, nn

from ..ops.layout import Layout, index_dtype, page_elements
from ..ops.memory import ArenaBytes
from .followers import Followers
from .rows import Rows

__all__ = ["Table"]


class Table(Rows):
    """The rows in ``module.weight``, ``[N, d]``; ``N`` and ``d`` are those of the moment.

    Args:
        module: has the ``weight``, and owns this object. A copy of the module makes its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._layout: tuple[object, Layout] | None = None
        self.followers = Followers(self)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def parameter(self) -> nn.Parameter:
        module = self._module()
        assert module is not None
        return cast(nn.Parameter, module.weight)

    @property
    def flat(self) -> Tensor:
        """``weight`` as the operators take it, ``[N d]``; gradients flow."""
        return self.parameter.reshape(-1)

    @property
    def storage(self) -> Tensor:
        """``weight`` as the operators take it, ``[N d]``, detached."""
        return self.parameter.detach().reshape(-1)

    @property
    def num_rows(self) -> int:
        """``N``."""
        return self.parameter.shape[0]

    @property
    def sizes(self) -> tuple[int]:
        """``(d,)``."""
        return (self.parameter.shape[1],)

    @property
    def layout(self) -> Layout:
        weight = self.parameter
        made_for = weight.shape, weight.device
        if self._layout is None or self._layout[0] != made_for:
            self._layout = made_for, _lay_out(self.num_rows, self.sizes[0], weight.device)
        return self._layout[1]

    @property
    def row_size(self) -> Tensor:
        """int64 ``[1]``, the size."""
        return torch.tensor(self.sizes, device=self.parameter.device)

    def level(self, ids: Tensor | None = None) -> Tensor:
        """Level of every row of ``ids`` (of all rows), int64: 0."""
        shape = (self.num_rows,) if ids is None else ids.shape
        return torch.zeros(shape, dtype=torch.int64, device=self.parameter.device)

    def bytes(self) -> ArenaBytes:
        """Bytes of the rows, of what else the same memory holds, and of computed locations."""
        weight = self.parameter
        payload = weight.numel() * weight.element_size()
        places = () if self._layout is None else self._layout[1].flat[:2]
        locations = sum(place.untyped_storage().nbytes() for place in places)
        return ArenaBytes(payload, weight.untyped_storage().nbytes() - payload, locations, 0)


def _lay_out(rows: int, dim: int, device: torch.device) -> Layout:
    page = page_elements((dim,), rows)
    page -= page % dim  # whole rows, one behind the other over all pages
    with torch.inference_mode(False):
        start = torch.arange(rows, device=device, dtype=index_dtype(rows * dim)) * dim
        level = torch.zeros(-(-rows * dim // page), dtype=torch.int8, device=device)
    return Layout(start, level, (dim,), page)
