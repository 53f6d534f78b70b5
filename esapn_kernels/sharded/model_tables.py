"""All sharded tables of a model, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from ..distributed import on_all_ranks
from ..grow import ByCounts, Growth
from ..ops.memory import MemoryReport
from ..share import shares
from .shards import RaggedCollection
from .table import ShardedTable

__all__ = ["Tables", "tables"]


class Tables(Mapping[str, ShardedTable]):
    """The sharded tables of a model, by name; see :func:`tables`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = [m for m in model.modules() if isinstance(m, RaggedCollection)]
        self._tables = {name: t for module in modules for name, t in module.tables.items()}
        if not self._tables:
            raise ValueError(
                "the model holds no sharded ragged table: shard it by ragged_plan and RaggedSharder"
            )

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks."""
        return next(iter(self.values())).group

    def __getitem__(self, name: str) -> ShardedTable:
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def grow(
        self, budget: int | str | None = None, *, rule: type[Growth] = ByCounts, **settings: Any
    ) -> Growth:
        """Have each rank grow and shrink the rows it owns, from how often they are looked up.

        No rank asks another; lookups of all ranks count, whether ids are deduplicated or not.

        Args:
            budget: of a rank, as of :class:`~esapn_kernels.grow.Growth`; default: the plan's
                ``max_bytes_per_rank``.
            rule, settings: a :class:`~esapn_kernels.grow.Growth`, and what it takes.

        Raises:
            ValueError, RuntimeError: as of the rule, on all ranks; no row grows.
        """
        rows = {name: table.rows for name, table in self.items()}
        growth = None
        try:
            with on_all_ranks(self.group):
                for name, most in ({} if budget is None else shares(rows, budget)).items():
                    rows[name].check_budget(most)
            with on_all_ranks(self.group):
                growth = rule(self.model, budget, **settings)
        except Exception:
            if growth is not None:
                growth.remove()
            raise
        return growth

    def mark(self) -> None:
        """From now on note which rows change, for :func:`~esapn_kernels.sharded.save_changes`.

        It takes four bytes a row. A row changes when it is looked up in training or resized.
        """
        for table in self.values():
            table.mark()

    def memory_report(self) -> dict[str, MemoryReport]:
        """Bytes of this rank's blocks."""
        return {name: table.memory_report() for name, table in self.items()}


def tables(model: nn.Module) -> Tables:
    """The sharded tables of ``model``.

    Raises:
        ValueError: it has none.
    """
    return Tables(model)
