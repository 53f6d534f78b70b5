"""Data parallelism: tables that stay the same on every rank while their rows change size.

``DistributedDataParallel`` lays out its buckets once and broadcasts rank 0's buffers, and FSDP2
shards a Parameter by its shape; storage that grows, and locations that say where rows are, suit
neither. So the tables are left out of both and kept equal here: their gradients are averaged, and
every promotion and demotion is one that all ranks make together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .module import ResizableEmbedding
from .storage.arena import Arena

__all__ = ["Agreement", "on_all_ranks", "replicate"]


def replicate(
    model: nn.Module, process_group: dist.ProcessGroup | None = None
) -> set[nn.Parameter]:
    """Keep the :class:`~esapn_kernels.ResizableEmbedding` tables of ``model`` equal on all ranks.

    Call it on every rank, before the model is wrapped:

        replicate(model);  model = DistributedDataParallel(model)
        fully_shard(model, ignored_params=replicate(model))

    It sends rank 0's tables, sizes included, to all ranks, and from then on

    - averages the gradients of rows and hops over the ranks, in backward;
    - makes ``promote``, ``demote`` and ``resize`` collective: every rank calls them equally often,
      each with ids of its own (or none), and all ranks resize the rows that any of them names;
    - has DDP pass over the tables' parameters and buffers.

    Args:
        model: holds the tables, also in bags and collections.
        process_group: of the ranks; default: all.

    Returns:
        The tables' parameters, for ``fully_shard(..., ignored_params=...)``.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised; a table has a fused optimizer
            (``optim``), has a sparse gradient or ``max_norm``; a table is replicated already, or
            wrapped in DDP; the ranks' tables differ in more than their numbers and present sizes.
        ValueError: ``model`` has no table.

    Notes:
        As in DDP without ``find_unused_parameters``, every rank must look up every table in every
        backward. If one rank refuses its arguments to one of these calls, all raise and
        nothing changes.
        ``resize`` takes the same size on all ranks; ``compact``, ``reserve``, ``reset_parameters``
        and ``load_state_dict`` are called alike on all. A copy of a replica is none. Gathering the
        ids of a promotion waits for the device.

    Example:
        >>> replicate(ResizableEmbedding(10, sizes=(2, 4)))
        Traceback (most recent call last):
        ...
        RuntimeError: replicate needs torch.distributed: call init_process_group first
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("replicate needs torch.distributed: call init_process_group first")
    tables = {n: m for n, m in model.named_modules() if isinstance(m, ResizableEmbedding)}
    if not tables:
        raise ValueError("the model holds no ResizableEmbedding")
    for name, table in tables.items():
        _refuse(name or type(table).__name__, table)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and set(tables.values()) & set(
            module.modules()
        ):
            raise RuntimeError("replicate the model before DistributedDataParallel wraps it")
    kinds: list[object] = [None] * dist.get_world_size(process_group)
    mine = [(name, *_kind(table)) for name, table in tables.items()]
    dist.all_gather_object(kinds, mine, group=process_group)
    if any(kind != mine for kind in kinds):
        raise RuntimeError(
            "the ranks' tables differ in number of rows, candidate sizes, dtype, max_elements, "
            "budget, the kind of hops or in what is frozen"
        )

    parameters: set[nn.Parameter] = set()
    for table in tables.values():
        _send(table, process_group)
        table.agree = Agreement(process_group)
        for parameter in table.parameters():
            # A frozen one takes no hook, and may be thawed later.
            requires_grad = parameter.requires_grad
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(_Averaging(process_group))
            parameter.requires_grad_(requires_grad)
            parameters.add(parameter)
    ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", []), *_names(tables)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return parameters


def _refuse(name: str, table: ResizableEmbedding) -> None:
    if table.agree is not None:
        raise RuntimeError(f"{name} is replicated already")
    if table.arena.fused_optimizer is not None:
        raise RuntimeError(
            f"{name} has a fused optimizer, whose gradients are not averaged: use an optimizer of "
            "torch.optim"
        )
    if table.sparse:
        raise RuntimeError(f"{name} has sparse gradients, which are not averaged: use sparse=False")
    if table.max_norm is not None:
        raise RuntimeError(
            f"{name} has max_norm, by which every rank writes to rows of its own ids"
        )


def _kind(table: ResizableEmbedding) -> tuple[object, ...]:
    """What must be equal on all ranks before rank 0's numbers are sent."""
    flags = [parameter.requires_grad for parameter in table.parameters()]
    rows = table.arena
    limit = rows.max_elements if isinstance(rows, Arena) else None
    hops = 0 if table.chain is None else table.chain.numel()
    limits = limit, table.budget
    return rows.num_rows, table.sizes, str(rows.parameter.dtype), limits, hops, flags


def _names(tables: dict[str, ResizableEmbedding]) -> Iterator[str]:
    for name, table in tables.items():
        for key, _ in [*table.named_parameters(), *table.named_buffers()]:
            yield f"{name}.{key}" if name else key


def _send(table: ResizableEmbedding, group: dist.ProcessGroup | None) -> None:
    """Give every rank the table of rank 0, whose shapes may differ."""
    source = 0 if group is None else dist.get_global_rank(group, 0)
    state = table.state_dict()
    shapes = [{key: (tuple(value.shape), value.dtype) for key, value in state.items()}]
    dist.broadcast_object_list(shapes, src=source, group=group)
    for key, (shape, dtype) in shapes[0].items():
        if dist.get_rank() != source:
            state[key] = torch.empty(shape, dtype=dtype, device=state[key].device)
        dist.broadcast(state[key], src=source, group=group)
    if dist.get_rank() != source:
        table.load_state_dict(state)
    if isinstance(table.arena, Arena):
        # Rows freed in another order would take other places, and the arenas grow apart.
        table.arena.forget_free_places()


@contextlib.contextmanager
def on_all_ranks(group: dist.ProcessGroup | None) -> Iterator[None]:
    """What one rank raises all raise; collective.

    Raises:
        RuntimeError: another rank raised; it says what.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    said: list[str | None] = [None] * dist.get_world_size(group)
    text = None if failure is None else str(failure) or type(failure).__name__
    dist.all_gather_object(said, text, group=group)
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            raise RuntimeError(f"rank {rank}: {text}")


class _Averaging:
    """Hook: the mean of a gradient over the ranks. What is a mean already stays as it is."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=self.group)
        parameter.grad /= dist.get_world_size(self.group)


class Agreement:
    """The ids that all ranks give, in the order of the ranks, on every rank."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __call__(self, ids: Tensor, refused: bool = False) -> Tensor:
        """As :meth:`gather`, the ids alone."""
        return self.gather(ids, refused)[1]

    def gather(self, ids: Tensor, refused: bool = False) -> tuple[list[int], Tensor]:
        """How many ids each rank gave, and all of them, int64.

        Args:
            ids: ``[n]``, any ``n``.
            refused: this rank raises, and so must all of them.

        Raises:
            RuntimeError: a rank refused.
        """
        count = torch.tensor([-1 if refused else ids.numel()], device=ids.device)
        numbers = torch.cat(self._gathered(count)).tolist()
        if min(numbers) < 0:
            raise RuntimeError(
                "another rank raised an error in the call that this one made: nothing was changed"
            )
        padded = ids.new_zeros(max(numbers), dtype=torch.int64)
        padded[: ids.numel()] = ids
        parts = zip(self._gathered(padded), numbers, strict=True)
        return numbers, torch.cat([part[:number] for part, number in parts])

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return parts

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return type(None), ()  # a copy of a replica is none
