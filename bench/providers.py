"""What the lookup benchmark compares: tables, traffic, providers, their gate and their bytes.

A provider is one way to answer ``ids -> [len(ids), 128]``. ``ours``, ``eager`` and ``compiled``
hold the same ragged rows and the same hops and must agree with one float64 reference; ``fixed`` is
the plain table with a full-size row per id, the cost of not being ragged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esapn_kernels import ResizableEmbedding
from esapn_kernels.reference import split_chain
from esapn_kernels.testing import lookup_bytes

PAPER_ROWS = {2: 1_041, 4: 10_854, 8: 18_146, 16: 30_836, 64: 22_830, 128: 54_786}
"""Rows per size that the ESAPN paper reports for the users of ml-20m."""

SIZES = tuple(PAPER_ROWS)
DIM = SIZES[-1]
TRAFFIC = ("uniform", "zipf")
ZIPF_EXPONENT = 1.05
TOLERANCE = 5e-5
"""Largest relative error of the gate: float32 lands near 1e-6, TF32 products near 3e-4."""

_CHECKED = 4096  # ids of a batch that the gate looks at

Hops = list[tuple[Tensor, Tensor]]


class GateError(Exception):
    """A provider's outputs or gradients are not those of the reference."""


@dataclass(frozen=True)
class Table:
    """Row sizes of a table and the order of its ids by popularity.

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


def make_table(name: str, rows: dict[int, int], generator: torch.Generator) -> Table:
    """Draws a table with ``rows[size]`` rows of every size, the sizes dealt out at random."""
    sizes = torch.repeat_interleave(torch.tensor(list(rows)), torch.tensor(list(rows.values())))
    sizes = sizes[torch.randperm(len(sizes), generator=generator)]
    shuffled = torch.randperm(len(sizes), generator=generator)
    largest_first = torch.sort(sizes[shuffled], descending=True, stable=True).indices
    return Table(name, sizes, shuffled[largest_first])


def make_ids(table: Table, traffic: str, count: int, generator: torch.Generator) -> Tensor:
    """Draws ``count`` ids: uniform, or rank ``r`` with probability proportional to ``r^-1.05``."""
    n = len(table)
    if traffic == "uniform":
        return torch.randint(n, (count,), generator=generator)
    weight = torch.arange(1, n + 1, dtype=torch.float64).pow_(-ZIPF_EXPONENT).cumsum_(0)
    draw = torch.rand(count, dtype=torch.float64, generator=generator) * weight[-1]
    return table.popular[torch.searchsorted(weight, draw, right=True).clamp_(max=n - 1)]


def forward_bytes(count: int, distinct_dims: Tensor, *, ragged: bool = True) -> int:
    """Fewest bytes a float32 lookup moves: each input read once, each output written once.

    ``lookup_bytes`` of the distinct rows; an id seen before costs itself, its location if ragged,
    and its output.

    Args:
        count: number of ids, duplicates counted.
        distinct_dims: size of every distinct row looked up, ``[distinct]``.
        ragged: whether rows have a location.
    """
    if not ragged:
        return count * (8 + 4 * DIM) + 4 * int(distinct_dims.sum())
    counts = [int((distinct_dims == size).sum()) for size in SIZES]
    return lookup_bytes(SIZES, counts, 4) + (count - sum(counts)) * (8 + 4 + 4 * DIM)


def backward_bytes(
    count: int, distinct_dims: Tensor, grad_elements: int, *, ragged: bool = True
) -> int:
    """Fewest bytes of the gradient with a dense result, float32.

    Per id 8 (id) and 4 * 128 (output gradient), ragged also 4 (location); per distinct row below
    the largest size 4 * its size (read for the gradient of the hops); the gradient of the whole
    table written once.

    Args:
        count: number of ids, duplicates counted.
        distinct_dims: size of every distinct row looked up, ``[distinct]``.
        grad_elements: elements of the table's gradient.
        ragged: whether rows have a location and hops.
    """
    per_id = 8 + 4 * DIM + (4 if ragged else 0)
    rows = 4 * int(distinct_dims[distinct_dims < DIM].sum()) if ragged else 0
    return count * per_id + rows + 4 * grad_elements


class Provider:
    """One way to look rows up.

    Attributes:
        name: for the report.
        parameters: what gradients are taken of.
        table_bytes: allocated for rows, locations and hops.
        grad_elements: elements of the rows' dense gradient.
        ragged: whether rows have their own sizes.
    """

    name: str
    parameters: list[Tensor]
    table_bytes: int
    grad_elements: int
    ragged = True

    def __call__(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        """Gradient of the rows ``ids``, all of ``level``, out of gradients of ``parameters``."""
        raise NotImplementedError

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        """Gradients ``(dW_j, db_j)`` of the hops."""
        raise NotImplementedError

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients that belong to rows."""
        raise NotImplementedError


class Ours(Provider):
    """``ResizableEmbedding`` with the backend that ``auto`` takes."""

    name = "ours"

    def __init__(self, table: Table, device: torch.device) -> None:
        self.module = ResizableEmbedding(
            len(table), sizes=SIZES, initial_size=table.sizes, device=device
        )
        self.parameters = [self.module.arena.storage, self.module.chain]
        self.table_bytes = self.module.memory_report().serving
        self.grad_elements = self.module.arena.storage.numel()

    def __call__(self, ids: Tensor) -> Tensor:
        out: Tensor = self.module(ids)
        return out

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        return _rows(grads[0], self.module.arena.row_start[ids], SIZES[level])

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        return split_chain(grads[1], SIZES)

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads[:1]


def level_loop(
    ids: Tensor, level: Tensor, slot: Tensor, tables: Sequence[Tensor], hops: Hops
) -> Tensor:
    """The lookup as one would write it: for every size a mask, a table and the hops behind it."""
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
        arena = ours.module.arena
        level = arena.level()
        self.level = level.to(torch.int8)
        self.slot = torch.empty_like(level, dtype=torch.int32)
        self.tables = []
        for k, dim in enumerate(SIZES):
            mine = (level == k).nonzero()[:, 0]
            self.slot[mine] = torch.arange(len(mine), dtype=torch.int32, device=level.device)
            rows = _rows(arena.storage.detach(), arena.row_start[mine], dim)
            self.tables.append(rows.requires_grad_())
        self.hops = [
            (weight.contiguous().requires_grad_(), bias.clone().requires_grad_())
            for weight, bias in split_chain(ours.module.chain.detach(), SIZES)
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
        out: Tensor = _compiled_loop()(ids, self.level, self.slot, self.tables, self.hops)
        return out


_compiled: list[Callable[..., Any]] = []


def _compiled_loop() -> Callable[..., Any]:
    """One compilation for every table and batch: their lengths are dynamic."""
    if not _compiled:
        # Without it every mask is a graph break and nothing of the loop is compiled.
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        _compiled.append(torch.compile(level_loop, dynamic=True, fullgraph=True))
    return _compiled[0]


class Fixed(Provider):
    """``nn.Embedding(N, 128)``."""

    name = "fixed"
    ragged = False

    def __init__(self, table: Table, device: torch.device) -> None:
        self.module = nn.Embedding(len(table), DIM, device=device)
        self.parameters = [self.module.weight]
        self.grad_elements = self.module.weight.numel()
        self.table_bytes = 4 * self.grad_elements

    def __call__(self, ids: Tensor) -> Tensor:
        out: Tensor = self.module(ids)
        return out

    def row_grads(self, grads: Sequence[Tensor], level: int, ids: Tensor) -> Tensor:
        return grads[0][ids]

    def hop_grads(self, grads: Sequence[Tensor]) -> Hops:
        return []

    def table_grads(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads


def _rows(flat: Tensor, start: Tensor, dim: int) -> Tensor:
    """Rows of one size as ``[len(start), dim]``: they begin at multiples of it."""
    return flat.view(-1, dim)[start.long() // dim]


@dataclass(frozen=True)
class Reference:
    """Outputs and gradients in float64 for some positions of a batch.

    Attributes:
        positions: the positions checked, ``[checked]``.
        out: ``[checked, 128]``.
        grad_out: what is sent back, zero at all other positions, float32 ``[len(ids), 128]``.
        rows: ``(level, ids, row gradients)``, ids distinct.
        hops: gradients ``(dW_j, db_j)``.
    """

    positions: Tensor
    out: Tensor
    grad_out: Tensor
    rows: list[tuple[int, Tensor, Tensor]]
    hops: Hops


def make_reference(provider: Ours | Fixed, ids: Tensor) -> Reference:
    """Chains the rows hop by hop in float64, with autograd's gradients.

    Written on its own: nothing of the lookups that it judges is used.
    """
    positions = torch.randperm(ids.numel(), device=ids.device)[:_CHECKED]
    grad_out = torch.zeros(ids.numel(), DIM, device=ids.device)
    grad_out[positions] = torch.randn(positions.numel(), DIM, device=ids.device)
    distinct, inverse = torch.unique(ids[positions], return_inverse=True)
    hops: Hops = []
    groups = []  # level, ids, rows
    if isinstance(provider, Ours):
        arena = provider.module.arena
        chain = provider.module.chain.detach().double()
        hops = [
            (weight.clone().requires_grad_(), bias.clone().requires_grad_())
            for weight, bias in split_chain(chain, SIZES)
        ]
        sizes = provider.module.sizes_of(distinct)
        for k, dim in enumerate(SIZES):
            mine = distinct[sizes == dim]
            start = arena.row_start[mine].long()
            rows = arena.storage.detach()[start[:, None] + torch.arange(dim, device=ids.device)]
            groups.append((k, mine, rows.double().requires_grad_()))
    else:
        rows = provider.module.weight.detach()[distinct]
        groups.append((len(SIZES) - 1, distinct, rows.double().requires_grad_()))
    outs = []
    for k, _, rows in groups:
        for weight, bias in hops[k:]:
            rows = rows @ weight.t() + bias
        outs.append(rows)
    order = torch.argsort(torch.cat([mine for _, mine, _ in groups]))
    out = torch.cat(outs)[order][inverse]
    leaves = [rows for _, _, rows in groups] + [p for hop in hops for p in hop]
    grads = torch.autograd.grad(out, leaves, grad_out[positions].double())
    flat = grads[len(groups) :]
    return Reference(
        positions=positions,
        out=out.detach(),
        grad_out=grad_out,
        rows=[(k, mine, g) for (k, mine, _), g in zip(groups, grads, strict=False) if mine.numel()],
        hops=list(zip(flat[::2], flat[1::2], strict=True)),
    )


def check(provider: Provider, ids: Tensor, reference: Reference) -> float:
    """Compares a whole batch's outputs and gradients with the reference.

    Returns:
        The largest relative error ``||x - ref|| / ||ref||`` over outputs, row gradients (by size)
        and hop gradients (by hop).

    Raises:
        GateError: the error is above ``TOLERANCE``, or a row that was not looked up has a gradient.
    """
    out = provider(ids)
    grads = torch.autograd.grad(out, provider.parameters, reference.grad_out)
    errors = {"outputs": _error(out.detach()[reference.positions], reference.out)}
    written = 0
    for k, mine, expected in reference.rows:
        rows = provider.row_grads(grads, k, mine)
        errors[f"gradients of rows of size {SIZES[k]}"] = _error(rows, expected)
        written += int(torch.count_nonzero(rows))
    for j, (got, wanted) in enumerate(zip(provider.hop_grads(grads), reference.hops, strict=True)):
        for name, x, y in zip(("weight", "bias"), got, wanted, strict=True):
            errors[f"gradient of the {name} of hop {j}"] = _error(x, y)
    where, worst = max(errors.items(), key=lambda item: item[1])
    if not worst <= TOLERANCE:
        raise GateError(f"{provider.name}: {where} off by {worst:.1e} (limit {TOLERANCE:.0e})")
    if sum(int(torch.count_nonzero(g)) for g in provider.table_grads(grads)) != written:
        raise GateError(f"{provider.name}: gradient in rows that were not looked up")
    return worst


def _error(value: Tensor, expected: Tensor) -> float:
    """Relative error; infinite for NaN, so that it fails and sorts last."""
    error = float((value.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")
