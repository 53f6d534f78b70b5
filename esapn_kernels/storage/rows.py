"""What an arena and a table share: a Parameter that optimizers hold, one of which may step it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.layout import Layout
from ..ops.update import RowStep
from .followers import Followers

__all__ = ["Rows"]


class Rows:
    """Rows in ``parameter``, which a fused optimizer may step in backward (see ``optim``)."""

    followers: Followers
    _fused: weakref.ref[Any] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter that holds the rows: what optimizers are built on."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """Where the rows lie, as the lookup takes it."""
        raise NotImplementedError

    def read(self, index: int) -> Tensor:
        """A copy of one row."""
        row_start, page_level, sizes, page = self.layout.flat
        start = int(row_start[index])
        dim = sizes[int(page_level[start // page])]
        return self.parameter.detach().reshape(-1)[start : start + dim].clone()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer``, a fused one, steps the rows from now on, and its state follows them."""
        self._fused = weakref.ref(optimizer)
        self.followers.add(optimizer)

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """The opposite of :meth:`attach`."""
        if self.fused_optimizer is optimizer:
            self._fused = None
            self.followers.discard(optimizer)

    @property
    def fused_optimizer(self) -> RowStep | None:
        """The optimizer that steps the rows in backward."""
        return None if self._fused is None else self._fused()
