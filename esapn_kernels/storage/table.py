"""Rows of one size: a module's ``weight``, as operators, optimizers and reports take rows.

    weight       Parameter [N, d], as nn.Embedding has it; the module's own
    storage      the same numbers, flat
    row_start    [0, d, 2 d, ...]        page_level  0 everywhere        computed, never stored

No row ever moves. The locations are computed for what torch's own lookup cannot do: Triton, a fused
optimizer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import is_eager
from ..ops.layout import Layout, index_dtype, page_elements
from ..ops.memory import ArenaBytes
from .followers import Followers
from .rows import Rows

__all__ = ["Table"]


class Table(Rows):
    """The rows in ``module.weight``, ``[N, d]``; ``N`` and ``d`` are those of the moment.

    Args:
        module: has the ``weight``, and owns this object.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._layout: tuple[object, Layout] | None = None
        self.followers = Followers(self)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the module makes its own.
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Table | None:
        # Parametrized modules copy their attributes, without the module's __setstate__.
        module = memo.get(id(self._module()))
        return None if module is None else Table(module)

    @property
    def parameter(self) -> Any:
        """``weight``, an ``nn.Parameter``; ``None`` where it is computed (pruned, parametrized)."""
        module: Any = self._module()
        return None if module is None else module._parameters.get("weight")

    @property
    def weight(self) -> Tensor:
        """``[N, d]``, also where it is computed, by a parametrization."""
        module: Any = self._module()
        weight: Tensor = module.weight
        return weight

    @property
    def storage(self) -> Tensor:
        """``weight`` as the operators take it, ``[N d]``, detached."""
        return self.weight.detach().reshape(-1)

    @property
    def num_rows(self) -> int:
        """``N``."""
        return self.weight.shape[0]

    @property
    def sizes(self) -> tuple[int]:
        """``(d,)``."""
        return (self.weight.shape[1],)

    @property
    def layout(self) -> Layout:
        weight = self.weight
        made_for = weight.shape, weight.device
        if self._layout is not None and self._layout[0] == made_for:
            return self._layout[1]
        layout = _lay_out(weight)
        if is_eager():  # the tensors of traced code are no numbers
            self._layout = made_for, layout
        return layout

    @property
    def row_size(self) -> Tensor:
        """int64 ``[1]``, the size."""
        return torch.tensor(self.sizes, device=self.weight.device)

    def level(self, ids: Tensor | None = None) -> Tensor:
        """Level of every row of ``ids`` (of all rows), int64: 0."""
        weight = self.weight
        shape = weight.shape[:1] if ids is None else ids.shape
        return torch.zeros(shape, dtype=torch.int64, device=weight.device)

    def count_rows(self) -> list[int]:
        """How many rows every size has."""
        return [self.num_rows]

    def bytes(self) -> ArenaBytes:
        """Bytes of the rows, of what else the same memory holds, and of computed locations."""
        weight = self.weight
        payload = weight.numel() * weight.element_size()
        places = () if self._layout is None else self._layout[1].flat[:2]
        locations = sum(place.untyped_storage().nbytes() for place in places)
        return ArenaBytes(payload, weight.untyped_storage().nbytes() - payload, locations, 0)


def _lay_out(weight: Tensor) -> Layout:
    (rows, dim), device = weight.shape, weight.device
    page = page_elements((dim,), rows)
    with torch.inference_mode(False):
        start = torch.arange(rows, device=device, dtype=index_dtype(rows * dim)) * dim
        level = torch.zeros(-(-rows * dim // page), dtype=torch.int8, device=device)
    return Layout(start, level, (dim,), page)
