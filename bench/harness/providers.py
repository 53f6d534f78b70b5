"""What the lookup benchmark compares: tables, traffic and providers.

A provider is one way to answer ``ids -> [len(ids), 128]``. ``ours``, ``eager`` and ``compiled``
hold the same ragged rows and the same hops and must agree with one float64 reference; ``fixed`` is
the plain table with a full-size row per id, the cost of not being ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from esapn_kernels import ResizableEmbedding
from esapn_kernels.ops.backend import INTERPRETED, resolve_backend
from esapn_kernels.ops.chain import split_chain
from esapn_kernels.ops.lookup import Options, lookup

from .roof import DIM, SIZES, Looked
from .table import Row

TRAFFIC = ("uniform", "zipf")
ZIPF_EXPONENT = 1.05
Hops = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TableSpec:
    """Row sizes of an embedding table and the order of its ids by popularity.

    Attributes:
        name: for the report.
        sizes: size of every row, int64 ``[N]``, independent of the id.
        popular: ids, most popular first: the largest rows, in random order within a size.
    """

    name: str
    sizes: Tensor
    popular: Tensor

    def __len__(self) -> int:
        return self.sizes.numel()


def make_table_spec(name: str, rows: dict[int, int], generator: torch.Generator) -> TableSpec:
    """Draws ``rows[size]`` ids of every size; sizes are dealt out at random."""
    sizes = torch.repeat_interleave(torch.tensor(list(rows)), torch.tensor(list(rows.values())))
    sizes = sizes[torch.randperm(len(sizes), generator=generator)]
    shuffled = torch.randperm(len(sizes), generator=generator)
    largest_first = torch.sort(sizes[shuffled], descending=True, stable=True).indices
    return TableSpec(name, sizes, shuffled[largest_first])


def make_ids(table: TableSpec, traffic: str, count: int, generator: torch.Generator) -> Tensor:
    """Draws ``count`` ids: uniform, or rank ``r`` with probability proportional to ``r^-1.05``."""
    n = len(table)
    if traffic == "uniform":
        return torch.randint(n, (count,), generator=generator)
    weight = torch.arange(1, n + 1, dtype=torch.float64).pow_(-ZIPF_EXPONENT).cumsum_(0)
    draw = torch.rand(count, dtype=torch.float64, generator=generator) * weight[-1]
    return table.popular[torch.searchsorted(weight, draw, right=True).clamp_(max=n - 1)]


@dataclass(frozen=True)
class Workload:
    """One table, traffic and batch size: several batches of ids, and a gradient to send back."""

    table: TableSpec
    traffic: str
    batches: list[Tensor]
    grad: Tensor

    @property
    def count(self) -> int:
        return self.grad.shape[0]

    def batch(self, turn: int) -> Tensor:
        return self.batches[turn % len(self.batches)]

    def looked(self, sizes: Tensor | None = None, *, ragged: bool = True) -> Looked:
        """What the first batch looks up, of the table's rows or of rows of other ``sizes``."""
        sizes = self.table.sizes if sizes is None else sizes
        return Looked.of(self.batches[0].cpu(), sizes, ragged=ragged)

    def row(
        self,
        mode: str,
        provider: str,
        looked: Looked,
        model: Callable[[Looked], int],
        memory: int = 0,
        **more: Any,
    ) -> Row:
        """A row not yet measured; ``model`` gives its fewest bytes."""
        return Row(
            self.table.name,
            len(self.table),
            self.traffic,
            self.count,
            sum(looked.distinct),
            mode,
            provider,
            memory,
            bytes=model(looked),
            cold_bytes=model(looked.cold),
            **more,
        )


def make_workload(
    table: TableSpec,
    traffic: str,
    count: int,
    device: torch.device,
    generator: torch.Generator,
    number: int | None = None,
) -> Workload:
    """Draws the batches of one workload, 4 or 8 or ``number`` of them, and a gradient."""
    number = number or (4 if count >= 1 << 20 else 8)
    batches = [make_ids(table, traffic, count, generator).to(device) for _ in range(number)]
    grad = torch.randn(count, DIM, generator=generator).to(device)
    return Workload(table, traffic, batches, grad)


class Provider:
    """One way to look rows up.

    Attributes:
        name: for the report.
        parameters: what gradients are taken of.
        table_bytes: allocated for rows, locations and hops.
        grad_elements: elements of the rows' dense gradient.
        ragged: whether rows have their own sizes.
        around: context that its regions run in.
    """

    name: str
    parameters: list[Tensor]
    table_bytes: int
    grad_elements: int
    ragged = True
    around: Callable[[], Any] = nullcontext

    def __call__(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, out: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``parameters``."""
        return torch.autograd.grad(out, self.parameters, grad)

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        """Gradient of the rows ``ids``, all of ``level``, out of gradients of ``parameters``."""
        raise NotImplementedError

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        """Gradients ``(dW_j, db_j)`` of the hops."""
        raise NotImplementedError

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients that belong to rows."""
        raise NotImplementedError


def interpreted(device: torch.device) -> bool:
    """Whether ours would run interpreted kernels on ``device``, whose time says nothing."""
    return INTERPRETED and resolve_backend("auto", device) == "triton"


class Ours(Provider):
    """``ResizableEmbedding``, as a rule with the backend that ``auto`` takes.

    The benchmarks take what is not a method of the module, rows in place and the operator, from
    here.
    """

    name = "ours"

    def __init__(
        self,
        table: TableSpec,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        make: Callable[..., Any] = ResizableEmbedding,
    ) -> None:
        self.module = make(
            len(table),
            sizes=SIZES,
            initial_size=table.sizes,
            device=device,
            dtype=dtype,
            backend=backend,
        )
        self.parameters = [self.storage, self.module.chain]
        self.table_bytes = self.module.memory_report().serving
        self.grad_elements = self.storage.numel()

    def __call__(self, ids: Tensor) -> Tensor:
        out: Tensor = self.module(ids)
        return out

    @property
    def storage(self) -> Tensor:
        """All rows in one tensor, ``[elements]``: a parameter."""
        storage: Tensor = self.module.arena.storage
        return storage

    @property
    def row_start(self) -> Tensor:
        """Where every row begins in the storage, ``[N]``."""
        starts: Tensor = self.module.arena.layout.row_start
        return starts

    def places(self, ids: Tensor, dim: int) -> Tensor:
        """Where the rows of ``ids``, all of size ``dim``, lie in the storage, ``[n, dim]``."""
        start = self.row_start[ids].long()
        return start[:, None] + torch.arange(dim, device=start.device)

    def rows_of(self, flat: Tensor, ids: Tensor, dim: int) -> Tensor:
        """Rows of ``ids``, all of size ``dim``, in the storage or its gradient, ``[n, dim]``.

        They begin at multiples of their size: an index of single elements would be larger than
        the rows.
        """
        return flat.view(-1, dim)[self.row_start[ids].long() // dim]

    def hops(self) -> Hops:
        """``(W_j, b_j)`` of every hop, views without gradient."""
        return split_chain(self.module.chain.detach(), SIZES)

    def look_up(
        self, ids: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The operator without its module, which alone writes into given memory."""
        operands = ids, self.module.arena.storage, self.module.chain, self.module.arena.layout
        return lookup(*operands, Options(out_dtype=out_dtype), out=out)

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        return self.rows_of(grads[0], ids, SIZES[level])

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        return split_chain(grads[1], SIZES)

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads[:1]


def level_loop(
    ids: Tensor, level: Tensor, slot: Tensor, tables: Sequence[Tensor], hops: Hops
) -> Tensor:
    """The lookup in plain torch: for every size a mask, a table and the hops behind it."""
    level, slot = level[ids], slot[ids]
    out = tables[-1].new_empty(ids.shape[0], tables[-1].shape[1])
    for k, table in enumerate(tables):
        mask = level == k
        rows = F.embedding(slot[mask], table)
        for weight, bias in hops[k:]:
            rows = F.linear(rows, weight, bias)
        out[mask] = rows
    return out


class Eager(Provider):
    """A table per size and :func:`level_loop`, with copies of our rows and hops."""

    name = "eager"

    def __init__(self, ours: Ours) -> None:
        sizes = ours.module.sizes_of()
        level = torch.searchsorted(torch.tensor(SIZES, device=sizes.device), sizes)
        self.level = level.to(torch.int8)
        self.slot = torch.empty_like(level, dtype=torch.int32)
        self.tables = []
        for k, dim in enumerate(SIZES):
            mine = (level == k).nonzero()[:, 0]
            self.slot[mine] = torch.arange(len(mine), dtype=torch.int32, device=level.device)
            rows = ours.rows_of(ours.storage.detach(), mine, dim)
            self.tables.append(rows.requires_grad_())
        self.hops = [
            (weight.contiguous().requires_grad_(), bias.clone().requires_grad_())
            for weight, bias in ours.hops()
        ]
        self.parameters = [*self.tables, *(p for hop in self.hops for p in hop)]
        held = [*self.parameters, self.level, self.slot]
        self.table_bytes = sum(t.numel() * t.element_size() for t in held)
        self.grad_elements = sum(t.numel() for t in self.tables)

    def __call__(self, ids: Tensor) -> Tensor:
        return level_loop(ids, self.level, self.slot, self.tables, self.hops)

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        return grads[level][self.slot[ids]]

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        flat = grads[len(SIZES) :]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads[: len(SIZES)]


class Compiled(Eager):
    """:func:`level_loop` in one ``torch.compile`` graph, sharing the tables of :class:`Eager`."""

    name = "compiled"

    def __init__(self, eager: Eager) -> None:
        self.__dict__.update(eager.__dict__)

    def __call__(self, ids: Tensor) -> Tensor:
        out: Tensor = compile_loop()(ids, self.level, self.slot, self.tables, self.hops)
        return out


@cache
def compile_loop() -> Callable[..., Any]:
    """One compilation for every table and batch: their lengths are dynamic."""
    # Without it every mask is a graph break and nothing of the loop is compiled.
    dynamo.capture_dynamic_output_shape_ops = True
    return torch.compile(level_loop, dynamic=True, fullgraph=True)


class Fixed(Provider):
    """``nn.Embedding(N, 128)``."""

    name = "fixed"
    ragged = False

    def __init__(
        self,
        table: TableSpec,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        sparse: bool = False,
    ) -> None:
        self.module = nn.Embedding(len(table), DIM, device=device, dtype=dtype, sparse=sparse)
        self.parameters = [self.module.weight]
        self.grad_elements = self.module.weight.numel()
        self.table_bytes = self.module.weight.nbytes

    def __call__(self, ids: Tensor) -> Tensor:
        out: Tensor = self.module(ids)
        return out

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        return grads[0][ids]

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        return []

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads


class Deterministic(Fixed):
    """The same table under ``torch.use_deterministic_algorithms``, which here fills no memory."""

    name = "fixed det."

    def __init__(self, fixed: Fixed) -> None:
        self.__dict__.update(fixed.__dict__)

    @staticmethod
    @contextmanager
    def around() -> Iterator[None]:  # type: ignore[override]
        fill: Any = torch.utils.deterministic
        before = torch.are_deterministic_algorithms_enabled()
        filling = fill.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        fill.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            fill.fill_uninitialized_memory = filling


@dataclass(frozen=True)
class Forward:
    """A forward without gradient, of other dtypes or into memory given to it.

    Attributes:
        mode, name: for the report.
        call: ``ids -> [len(ids), 128]``.
        source: whose rows they are; its float64 reference is the gate's.
        itemsize, out_itemsize: bytes of a number in a row and in the output.
    """

    mode: str
    name: str
    call: Callable[[Tensor], Tensor]
    source: Ours | Fixed
    itemsize: int = 4
    out_itemsize: int = 4


class _Into:
    """``call(ids, out)`` into memory that is there already, one piece per number of ids."""

    def __init__(self, call: Callable[[Tensor, Tensor], Any]) -> None:
        self.call = call
        self.memory: dict[int, Tensor] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        out = self.memory.get(ids.numel())
        if out is None:
            out = self.memory[ids.numel()] = torch.empty(ids.numel(), DIM, device=ids.device)
        self.call(ids, out)
        return out


def make_forwards(table: TableSpec, ours: Ours, fixed: Fixed) -> list[Forward]:
    """The modes ``forward out=``, ``forward bf16 out`` and ``forward bf16``."""
    weight = fixed.module.weight.detach()
    low = torch.bfloat16

    def cast(ids: Tensor) -> Tensor:
        return F.embedding(ids, weight).to(low)

    if weight.is_cuda:
        cast = torch.compile(cast, dynamic=True)
    ours16 = Ours(table, weight.device, low)
    fixed16 = Fixed(table, weight.device, low)
    into_ours = _Into(ours.look_up)
    into_fixed = _Into(lambda ids, out: torch.index_select(weight, 0, ids, out=out))
    narrowed = partial(ours.look_up, out_dtype=low)
    return [
        Forward("forward out=", "ours", into_ours, ours),
        Forward("forward out=", "fixed", into_fixed, fixed),
        Forward("forward bf16 out", "ours", narrowed, ours, 4, 2),
        Forward("forward bf16 out", "fixed", cast, fixed, 4, 2),
        Forward("forward bf16", "ours", ours16, ours16, 2, 2),
        Forward("forward bf16", "fixed", fixed16, fixed16, 2, 2),
    ]
