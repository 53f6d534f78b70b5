"""A table whose rows lie on all ranks, by the ids that all ranks know."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import check_mask, level_of
from ..distributed import Agreement
from ..module import ResizableEmbedding
from ..ops.checks import check_ids
from ..ops.memory import MemoryReport
from ..optim import FusedOptimizer
from ..storage.arena import Arena
from ..storage.packed import pack, unpack
from .block import Block
from .placement import Placement

__all__ = ["Pending", "ShardedTable"]


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
        self._changes: _Changes | None = None
        self._pending: weakref.ref[Pending] | None = None
        rows.awaits_backward = self.awaits_backward
        # How many times changes were saved since a user's mark.
        self.number = 0

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
            self._check_movable()
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
            self._check_movable()
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

    @torch.no_grad()
    def state(self, optimizer: bool = True) -> dict[str, Tensor]:
        """Sizes, rows and their ``optimizer``'s state in the order of positions; collective.

        Returns:
            ``levels`` int8 ``[N]``; ``rows`` and state that lies as they do, all rows one behind
            the other; state ``[N]`` of a number a row; each as a :class:`Block`. ``chain`` and what
            else the optimizer keeps as they are. All are copies, on the CPU.
        """
        arena, ids = self._arena, torch.arange(self.count, device=self._device)
        level = arena.level(ids).to("cpu", torch.int8)
        packed = pack(arena, arena.storage.detach(), ids)
        first, total = self._cut(packed.numel())
        found: dict[str, Tensor] = {
            "levels": self.block(level),
            "rows": Block(packed, first, total),
            "chain": _copy(self.rows.chain),
        }
        for name, held in self._optimizer_state.items() if optimizer else ():
            part: Tensor
            if name in self.optimizer.state_per_element:
                part = Block(pack(arena, held.view(-1), ids), first, total)
            elif name in self.optimizer.state_per_id:
                part = self.block(_copy(held[: self.count]))
            else:
                part = _copy(held)
            found[f"optimizer.{name}"] = part
        return found

    def levels_like(self) -> Block:
        """Memory for this rank's ``levels``."""
        return self.block(torch.zeros(self.count, dtype=torch.int8))

    def block(self, local: Tensor) -> Block:
        """This rank's part of a tensor that has a number for every row."""
        return Block(local, self.placement.first(self.rank), self.num_embeddings)

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of this rank's block."""
        yield from self.rows.parameters()
        yield from self.rows.buffers()

    def state_like(self, levels: Block) -> dict[str, Tensor]:
        """Memory for :meth:`state` of rows of ``levels``; collective."""
        numel = int(torch.tensor(self.sizes)[levels.local.long()].sum())
        first, total = self._cut(numel)

        def block(dtype: torch.dtype) -> Block:
            return Block(torch.empty(numel, dtype=dtype), first, total)

        found: dict[str, Tensor] = {
            "rows": block(self._arena.storage.dtype),
            "chain": torch.empty(self.rows.chain.shape, dtype=self.rows.chain.dtype),
        }
        for name, held in self._optimizer_state.items():
            part: Tensor
            if name in self.optimizer.state_per_element:
                part = block(held.dtype)
            elif name in self.optimizer.state_per_id:
                part = self.block(torch.empty(self.count, dtype=held.dtype))
            else:
                part = torch.empty(held.shape, dtype=held.dtype)
            found[f"optimizer.{name}"] = part
        return found

    def check_levels(self, levels: Block) -> None:
        """Raise what :meth:`load` of such rows would.

        Raises:
            ValueError: a level that is none, or more than the budget of this rank allows.
        """
        level = levels.local
        if len(level) and not 0 <= int(level.min()) <= int(level.max()) < len(self.sizes):
            raise ValueError("the checkpoint holds sizes that are none of the table's")
        self._arena.check_levels(self._levels(levels))

    def _levels(self, levels: Block) -> Tensor:
        """Of all rows of this rank's memory, which has one even where it owns none."""
        level = levels.local.long().to(self._device)
        return torch.cat([level, level.new_zeros(self.rows.num_embeddings - self.count)])

    @torch.no_grad()
    def load(self, levels: Block, state: dict[str, Tensor]) -> None:
        """Take what :meth:`state` gave of any number of ranks, cut for this one."""
        arena, ids = self._arena, torch.arange(self.count, device=self._device)
        arena.load_state_dict(arena.state_at(self._levels(levels)))
        if self._changes is not None:
            self._changes.noted.fill_(1.0)
        unpack(arena, _local(state["rows"]), arena.storage.data, ids)
        self.rows.chain.data.copy_(state["chain"])
        for name, held in self._optimizer_state.items():
            part = _local(state[f"optimizer.{name}"])
            if name in self.optimizer.state_per_element:
                unpack(arena, part, held.view(-1), ids)
            elif name in self.optimizer.state_per_id:
                held[: self.count].copy_(part)
            else:
                held.copy_(part)

    def await_backward(self) -> Pending:
        """Rows are looked up; the graph of that holds what is returned."""
        pending = Pending()
        self._pending = weakref.ref(pending)
        return pending

    def awaits_backward(self) -> bool:
        """Whether rows of this rank that move now would fail in the backward of the last lookup.

        The other ranks, whose rows are where they were, would wait for its hops there.
        """
        pending = None if self._pending is None else self._pending()
        return pending is not None and not pending.is_over

    def _check_movable(self) -> None:
        if self.awaits_backward():
            gc.collect()  # of a loss that was dropped, circles may be left
        if self.awaits_backward():
            raise RuntimeError(
                "rows were looked up and await their backward: move them after it, or drop the loss"
            )

    def mark(self, number: int = 0) -> None:
        """From now on note which rows change, four bytes a row; forget which did.

        Args:
            number: how many times changes were saved since a user's mark.
        """
        self.number = number
        if self._changes is None:
            self._changes = _Changes(self._arena)
        self._changes.noted.zero_()

    def note(self, rows: Tensor) -> None:
        """``rows`` of this rank are looked up in training, which will step them."""
        if self._changes is not None:
            self._changes.noted[rows] = 1.0

    def changed(self) -> dict[str, Tensor]:
        """What changed since the last mark, in the order of positions; collective.

        Returns:
            ``ids`` int64, their ``levels`` int8, and ``rows``, one behind the other, as blocks of
            the changed rows of all ranks; and the ``chain``.

        Raises:
            RuntimeError: there is no mark.
        """
        if self._changes is None:
            raise RuntimeError("no mark was set: tables(model).mark() begins to note changes")
        rows = self._changes.noted[: self.count].nonzero()[:, 0]
        level = self._arena.level(rows).to("cpu", torch.int8)
        ids = self.placement.ids(rows.cpu() + self.placement.first(self.rank))
        packed = pack(self._arena, self._arena.storage.detach(), rows)
        return {
            "ids": Block(ids, *self._cut(len(rows))),
            "levels": Block(level, *self._cut(len(rows))),
            "rows": Block(packed, *self._cut(packed.numel())),
            "chain": _copy(self.rows.chain),
        }

    @property
    def _arena(self) -> Any:
        return self.rows.arena

    @property
    def _device(self) -> torch.device:
        return self._arena.storage.device

    @property
    def _optimizer_state(self) -> dict[str, Tensor]:
        return self.optimizer.state.get(self._arena.parameter, {})

    def _cut(self, numel: int) -> tuple[int, int]:
        """Where this rank's part of so many numbers begins, and how many all ranks have."""
        mine = torch.tensor([numel], device=self._device)
        parts = [torch.empty_like(mine) for _ in range(self.placement.world)]
        dist.all_gather(parts, mine, group=self.group)
        counts = torch.cat(parts).tolist()
        return sum(counts[: self.rank]), sum(counts)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the ``ids`` this rank owns, and the rows of those."""
        position = self.placement.position(ids)
        row = position - self.placement.first(self.rank)
        mine = (row >= 0) & (row < self.count)
        return mine, row[mine]

    def _by_owners(self, ids: Tensor, do: Callable[[Tensor], Tensor]) -> Tensor:
        """What each id's owner says of it, int64 ``[n]``: ``do`` takes rows of this rank."""
        counts, every = self._agree.gather(ids.to(self._device))
        said = torch.zeros_like(every, dtype=torch.int64)
        mine, rows = self.local(every)
        said[mine] = do(rows).long()
        dist.all_reduce(said, group=self.group)
        first = sum(counts[: self.rank])
        return said[first : first + ids.numel()].to(ids.device)

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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.local if isinstance(tensor, Block) else tensor


class Pending:
    """A lookup whose backward has not come; it lives no longer than the graph."""

    is_over = False


class _Changes:
    """Which rows changed, 1 or 0 of each: it goes with the rows as an optimizer's state does.

    A row that is resized starts afresh there, which is 1 here.
    """

    state_per_element: Mapping[str, float] = {}
    state_per_id = {"noted": 1.0}

    def __init__(self, arena: Arena) -> None:
        noted = torch.zeros(arena.num_rows, device=arena.storage.device)
        self.state = {arena.parameter: {"noted": noted}}
        arena.followers.add(self)

    @property
    def noted(self) -> Tensor:
        """``[N]``."""
        return next(iter(self.state.values()))["noted"]
