"""The gate: nothing is timed whose results are not those of a float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import Fixed, Forward, Hops, Ours, Provider
from .roof import DIM, SIZES

TOLERANCE = 5e-5
"""Largest relative error of the gate: float32 lands near 1e-6, TF32 products near 3e-4."""

BF16_TOLERANCE = 4e-3
"""The same for bf16 outputs, twice what rounding an entry to nearest is off by at most, 2^-9."""

_CHECKED = 4096  # positions of a batch that are compared with the reference


class GateError(Exception):
    """A provider's outputs or gradients are not those of the reference."""


@dataclass(frozen=True)
class Rows64:
    """Distinct rows and the hops as float64 leaves.

    Attributes:
        distinct: ids, sorted, ``[U]``.
        groups: ``(level, ids, rows)``, ids distinct; together they are ``distinct``.
        hops: ``(W_j, b_j)``; none where rows are not ragged.
    """

    distinct: Tensor
    groups: list[tuple[int, Tensor, Tensor]]
    hops: Hops

    @property
    def leaves(self) -> list[Tensor]:
        return [rows for _, _, rows in self.groups] + [p for hop in self.hops for p in hop]

    def look_up(self) -> Tensor:
        """Outputs of ``distinct``, chained hop by hop: no code of the lookups compared."""
        outs = []
        for k, _, rows in self.groups:
            for weight, bias in self.hops[k:]:
                rows = rows @ weight.t() + bias
            outs.append(rows)
        return torch.cat(outs)[torch.argsort(torch.cat([mine for _, mine, _ in self.groups]))]


def rows64(provider: Ours | Fixed, distinct: Tensor) -> Rows64:
    """The provider's present values."""
    if isinstance(provider, Fixed):
        rows = provider.module.weight.detach()[distinct].double().requires_grad_()
        return Rows64(distinct, [(len(SIZES) - 1, distinct, rows)], [])
    hops = [
        (weight.double().requires_grad_(), bias.double().requires_grad_())
        for weight, bias in provider.hops()
    ]
    sizes = provider.module.sizes_of(distinct)
    groups = []
    for k, dim in enumerate(SIZES):
        mine = distinct[sizes == dim]
        rows = provider.storage.detach()[provider.places(mine, dim)]
        groups.append((k, mine, rows.double().requires_grad_()))
    return Rows64(distinct, groups, hops)


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


def draw_checked(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions to compare, and a gradient that is zero at all others."""
    positions = torch.randperm(ids.numel(), device=ids.device)[:_CHECKED]
    grad_out = torch.zeros(ids.numel(), DIM, device=ids.device)
    grad_out[positions] = torch.randn(positions.numel(), DIM, device=ids.device)
    return positions, grad_out


def make_reference(provider: Ours | Fixed, ids: Tensor) -> Reference:
    """Chains the rows hop by hop in float64, with autograd's gradients."""
    positions, grad_out = draw_checked(ids)
    distinct, inverse = torch.unique(ids[positions], return_inverse=True)
    rows = rows64(provider, distinct)
    out = rows.look_up()[inverse]
    grads = torch.autograd.grad(out, rows.leaves, grad_out[positions].double())
    flat = grads[len(rows.groups) :]
    groups = [(k, mine, g) for (k, mine, _), g in zip(rows.groups, grads, strict=False)]
    return Reference(
        positions=positions,
        out=out.detach(),
        grad_out=grad_out,
        rows=[group for group in groups if group[1].numel()],
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
    grads = provider.backward(out, reference.grad_out)
    errors = {"outputs": relative_error(out.detach()[reference.positions], reference.out)}
    written = 0
    for k, mine, expected in reference.rows:
        rows = provider.row_grads(grads, k, mine)
        errors[f"gradients of rows of size {SIZES[k]}"] = relative_error(rows, expected)
        written += int(torch.count_nonzero(rows))
    for j, hop in enumerate(zip(provider.hop_grads(grads), reference.hops, strict=True)):
        for name, x, y in zip(("weight", "bias"), *hop, strict=True):
            errors[f"gradient of the {name} of hop {j}"] = relative_error(x, y)
    worst = largest_error(provider.name, errors)
    if sum(int(torch.count_nonzero(g)) for g in provider.table_grads(grads)) != written:
        raise GateError(f"{provider.name}: gradient in rows that were not looked up")
    return worst


def check_forward(forward: Forward, ids: Tensor) -> float:
    """Compares outputs with the reference of ``forward.source``; as :func:`check`."""
    reference = make_reference(forward.source, ids)
    with torch.no_grad():
        out = forward.call(ids)
    size = out.element_size()
    if size != forward.out_itemsize:
        raise GateError(f"{forward.mode} {forward.name}: outputs of {size} bytes a number")
    error = relative_error(out[reference.positions], reference.out)
    limit = TOLERANCE if size == 4 else BF16_TOLERANCE
    return largest_error(f"{forward.mode} {forward.name}", {"outputs": error}, limit)


def largest_error(name: str, errors: dict[str, float], limit: float = TOLERANCE) -> float:
    """The largest of ``errors``.

    Raises:
        GateError: it is above ``limit``.
    """
    where, worst = max(errors.items(), key=lambda item: item[1])
    if not worst <= limit:
        raise GateError(f"{name}: {where} off by {worst:.1e} (limit {limit:.0e})")
    return worst


def relative_error(value: Tensor, expected: Tensor) -> float:
    """``||value - expected|| / ||expected||``; for NaN infinite: it fails, and sorts last."""
    error = float((value.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def equal_runs(run: Callable[[], Sequence[Tensor]], runs: int) -> int:
    """How many of ``runs`` calls give the bits of the first, itself counted."""
    first = run()
    others = (run() for _ in range(runs - 1))
    return 1 + sum(all(map(torch.equal, first, other)) for other in others)
