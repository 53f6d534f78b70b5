"""A table whose rows lie on all ranks, by the ids that all ranks know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import check_mask, level_of
from ..distributed import Agreement
from ..module import ResizableEmbedding
from ..ops.checks import check_ids
from ..ops.memory import MemoryReport
from ..optim import FusedOptimizer
from .placement import Placement

__all__ = ["ShardedTable"]


class ShardedTable:
    """A table of ``num_embeddings`` rows, of which each rank owns a block.

    Attributes:
        rows: this rank's block, by row.
        optimizer: steps it in backward.
        placement: who owns what.

    Notes:
        Methods that take ids are collective: every rank calls them equally often, each with ids of
        its own or none. If one rank refuses its arguments all raise and nothing changes.
    """

    def __init__(
        self,
        rows: ResizableEmbedding,
        optimizer: FusedOptimizer,
        placement: Placement,
        group: dist.ProcessGroup,
    ) -> None:
        self.rows, self.optimizer, self.placement, self.group = rows, optimizer, placement, group
        self._agree = Agreement(group)

    @property
    def num_embeddings(self) -> int:
        return self.placement.num_rows

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.rows.sizes

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """How many rows this rank owns."""
        return self.placement.count(self.rank)

    def promote(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """:meth:`~esapn_kernels.ResizableEmbedding.promote` by the rows' owners.

        Args:
            ids: any shape, int32 or int64; those of all ranks together are promoted, once each.
            mask: bool, shape of ``ids``; default: all.

        Returns:
            Bool, shape of ``ids``: True where the row was enlarged by this call of all ranks.

        Raises:
            IndexError, RuntimeError, ValueError: as there, or another rank raised; nothing is
                changed.
        """
        return self._hop(ids, mask, down=False)

    def demote(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """:meth:`~esapn_kernels.ResizableEmbedding.demote` by the rows' owners; as
        :meth:`promote`."""
        return self._hop(ids, mask, down=True)

    def _hop(self, ids: Tensor, mask: Tensor | None, *, down: bool) -> Tensor:
        with self._checks_on_all_ranks():
            check_ids(ids, self.num_embeddings)
            if mask is not None:
                check_mask(mask, ids)
        move = self.rows.demote if down else self.rows.promote
        chosen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        moved = torch.zeros_like(chosen)
        moved[chosen] = self._by_owners(ids[chosen], move).bool()
        return moved

    def resize(self, ids: Tensor, size: int) -> Tensor:
        """:meth:`~esapn_kernels.ResizableEmbedding.resize` by the rows' owners; all ranks give the
        same ``size``."""
        with self._checks_on_all_ranks():
            check_ids(ids, self.num_embeddings)
            level_of(size, self.sizes)
        return (
            self._by_owners(ids.reshape(-1), lambda mine: self.rows.resize(mine, size))
            .bool()
            .view(ids.shape)
        )

    def sizes_of(self, ids: Tensor) -> Tensor:
        """Sizes of the rows of ``ids``, int64 of the same shape."""
        with self._checks_on_all_ranks():
            check_ids(ids, self.num_embeddings)
        return self._by_owners(ids.reshape(-1), self.rows.sizes_of).view(ids.shape)

    def memory_report(self) -> MemoryReport:
        """Bytes of this rank's block."""
        return self.rows.memory_report()

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the ``ids`` this rank owns, and the rows of those."""
        position = self.placement.position(ids)
        row = position - self.placement.first(self.rank)
        mine = (row >= 0) & (row < self.count)
        return mine, row[mine]

    def _by_owners(self, ids: Tensor, do) -> Tensor:  # type: ignore[no-untyped-def]
        """What each id's owner says of it, int64 ``[n]``: ``do`` takes rows of this rank."""
        counts, every = self._agree.gather(ids)
        said = torch.zeros_like(every, dtype=torch.int64)
        mine, rows = self.local(every)
        said[mine] = do(rows).long()
        dist.all_reduce(said, group=self.group)
        first = sum(counts[: self.rank])
        return said[first : first + ids.numel()]

    @contextlib.contextmanager
    def _checks_on_all_ranks(self) -> Iterator[None]:
        """Checks of arguments: a rank that raises tells the others, which wait for its ids."""
        try:
            yield
        except Exception:
            device = self.rows.arena.storage.device
            with contextlib.suppress(RuntimeError):
                self._agree.gather(torch.empty(0, device=device), refused=True)
            raise
