"""What tests and benchmarks share: cases, the yardstick for numbers, and the byte model.

The yardstick: a result may be at most twice as far from the fp64 reference as the plain PyTorch
reference run in the same dtype, plus a floor. Nothing here needs pytest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .module import ResizableEmbedding
from .ops import backend as _backend
from .ops.layout import Layout
from .ops.lookup import lookup
from .reference import lookup_grad_reference, lookup_reference

__all__ = [
    "Case",
    "Comparison",
    "assert_matches",
    "backward_bytes",
    "lookup_bytes",
    "make_case",
    "poison_unused",
    "promote_bytes",
    "row_elements",
]


@dataclass(frozen=True)
class Case:
    """One lookup: a module with mixed row sizes, ids, and an upstream gradient."""

    module: ResizableEmbedding
    ids: Tensor
    grad_out: Tensor

    @property
    def layout(self) -> Layout:
        """Where the rows lie."""
        return self.module.arena.layout

    @property
    def hops(self) -> Tensor:
        """The packed hops; those of one size are none."""
        chain = self.module.chain
        return self.module.arena.storage.new_empty(0) if chain is None else chain

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Copies of ``(storage, chain)`` that take gradients."""
        storage, chain = (
            p.detach().to(dtype or p.dtype, copy=True).requires_grad_()
            for p in (self.module.arena.storage, self.hops)
        )
        return storage, chain

    def run(self, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """Output, storage gradient and chain gradient of the public function.

        ``backend``: ``auto`` | ``triton`` | ``native`` | ``torch`` | ``reference``.
        """
        storage, chain = self.leaves()
        out = lookup(self.ids, storage, chain, self.layout, backend=backend)
        out.backward(self.grad_out)
        assert storage.grad is not None and chain.grad is not None
        return out.detach(), storage.grad, chain.grad

    @torch.no_grad()
    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """The same three by the literal definition, computed in ``dtype``."""
        operands = (self.ids, *self.leaves(dtype), *self.layout.flat)
        out = lookup_reference(*operands)
        grads = lookup_grad_reference(self.grad_out.to(dtype), *operands)
        return (out, *grads)


def _traffic(kind: str, level: Tensor, n_ids: int, generator: torch.Generator) -> Tensor:
    num_rows = level.numel()
    if kind == "uniform":
        return torch.randint(num_rows, (n_ids,), generator=generator)
    if kind == "zipf":
        # Density 1 / rank by inverse transform; ranks are shuffled over rows of every size.
        u = torch.rand(n_ids, generator=generator, dtype=torch.float64)
        rank = ((num_rows + 1) ** u - 1).long().clamp(max=num_rows - 1)
        return torch.randperm(num_rows, generator=generator)[rank]
    if kind == "largest":
        rows = (level == level.max()).nonzero()[:, 0]
        return rows[torch.randint(len(rows), (n_ids,), generator=generator)]
    raise ValueError(f"traffic must be uniform, zipf or largest, got {kind!r}")


def make_case(
    sizes: Sequence[int],
    num_rows: int,
    n_ids: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    traffic: str = "uniform",
    *,
    mix: Sequence[float] | None = None,
    backend: str = "auto",
    init: str = "linear",
) -> Case:
    """Build a module whose rows have mixed sizes, and ids to look up.

    Args:
        sizes: increasing row sizes.
        num_rows, n_ids: rows of the table, and ids in the batch.
        dtype, device: of the parameters.
        seed: of every random number; two calls with equal arguments give equal cases.
        traffic: ``uniform`` over rows, ``zipf`` (density 1 / rank), or ``largest`` (uniform over
            the rows of the largest size in use).
        mix: relative number of rows per size; equal by default. Counts are exact up to rounding.
        backend: of the module; :meth:`Case.run` takes one of its own.
        init: kind of hops; ``linear`` ones have biases, and so have ``tails``, which are drawn too.

    Example:
        >>> case = make_case((2, 4), 10, 5, mix=(4, 1))
        >>> case.module.memory_report().rows_per_size, case.ids.shape, case.grad_out.shape
        ({2: 8, 4: 2}, torch.Size([5]), torch.Size([5, 4]))
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(mix or [1.0] * len(sizes), dtype=torch.float64)
    bounds = weights.cumsum(0) / weights.sum()
    position = (torch.arange(num_rows, dtype=torch.float64) + 0.5) / max(num_rows, 1)
    level = torch.searchsorted(bounds, position).clamp(max=len(sizes) - 1)
    level = level[torch.randperm(num_rows, generator=generator)]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    module = ResizableEmbedding(
        num_rows,
        sizes=sizes,
        initial_size=torch.tensor(sizes)[level],
        init=init,
        backend=backend,
        device=device,
        dtype=dtype,
    )
    if init == "tails" and module.chain is not None:
        with torch.no_grad():
            module.chain.uniform_(-0.5, 0.5)
    torch.set_rng_state(state)
    ids = _traffic(traffic, level, n_ids, generator) if n_ids else torch.zeros(0, dtype=torch.long)
    grad_out = torch.randn(n_ids, sizes[-1], generator=generator)
    return Case(module, ids.to(device), grad_out.to(device, dtype))


def row_elements(module: ResizableEmbedding, ids: Tensor) -> Tensor:
    """Bool ``[capacity]``: the elements of ``arena.storage`` that belong to the rows of ``ids``."""
    mask = torch.zeros_like(module.arena.storage, dtype=torch.bool)
    row_sizes = module.sizes_of(ids).reshape(-1).tolist()
    starts = module.arena.layout.row_start[ids.reshape(-1).long()].tolist()
    for start, size in zip(starts, row_sizes, strict=True):
        mask[start : start + size] = True
    return mask


@torch.no_grad()
def poison_unused(module: ResizableEmbedding, ids: Tensor) -> None:
    """Everything in ``arena.storage`` but the rows of ``ids`` becomes NaN, slack included."""
    module.arena.storage[~row_elements(module, ids)] = float("nan")


@dataclass(frozen=True)
class Comparison:
    """Errors against the fp64 reference, and the bound that the maximum had to keep."""

    max_error: float
    rms_error: float
    eager_max_error: float
    bound: float


def _floor(dtype: torch.dtype, largest: float, interpreted: bool) -> float:
    if dtype == torch.float64:
        return 1e-14 * largest
    if dtype == torch.float32:
        return 1e-6 * largest
    exponent = math.floor(math.log2(largest)) if largest > 0 else -14
    ulp = torch.finfo(dtype).eps * 2.0**exponent
    # Triton's interpreter truncates where hardware rounds: fp32 stored as bf16.
    return 2 * ulp if interpreted and dtype == torch.bfloat16 else ulp


def assert_matches(
    actual: Tensor, reference_fp64: Tensor, eager_same_dtype: Tensor, *, name: str
) -> Comparison:
    """Hold ``actual`` to twice the error of ``eager_same_dtype``, plus a floor.

    The floor is 1e-6 of the largest value in fp32, 1e-14 in fp64, and one ulp at the largest value
    in fp16 and bf16 (two in bf16 where Triton interprets).

    Raises:
        AssertionError: another shape or dtype, a value that is not finite, or an error above the
            bound, with the maximum, the RMS and the first bad ``(row, column)``.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_matches(exact.float(), exact, exact.float(), name="copy").max_error
        0.0
        >>> assert_matches(exact.float() + 1, exact, exact.float(), name="shifted")
        Traceback (most recent call last):
        ...
        AssertionError: shifted: 2 of 2 wrong, first at (0, 0): 2.0, expected 1.0; max error
        1.000e+00 > bound 2.000e-06 (eager 0.000e+00), RMS 1.000e+00
    """
    assert reference_fp64.dtype == torch.float64, "the reference must be fp64"
    assert actual.shape == reference_fp64.shape, f"{name}: {actual.shape}, {reference_fp64.shape}"
    assert actual.dtype == eager_same_dtype.dtype, f"{name}: {actual.dtype}"
    if not actual.numel():
        return Comparison(0.0, 0.0, 0.0, 0.0)
    error = (actual.double() - reference_fp64).abs()
    eager = float((eager_same_dtype.double() - reference_fp64).abs().max())
    interpreted = _backend.INTERPRETED and actual.device.type == "cpu"
    bound = 2 * eager + _floor(actual.dtype, float(reference_fp64.abs().max()), interpreted)
    largest, rms = float(error.max()), float(error.square().mean().sqrt())
    bad = ~(error <= bound)
    if bad.any():
        first = int(bad.reshape(-1).nonzero()[0, 0])
        row, column = divmod(first, actual.shape[-1])
        got, want = (float(t.reshape(-1)[first]) for t in (actual, reference_fp64))
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} wrong, first at ({row}, {column}): "
            f"{got}, expected {want}; max error {largest:.3e} > bound {bound:.3e} "
            f"(eager {eager:.3e}), RMS {rms:.3e}"
        )
    return Comparison(largest, rms, eager, bound)


def lookup_bytes(
    sizes: Sequence[int],
    counts: Sequence[int],
    itemsize: int,
    id_bytes: int = 8,
    out_itemsize: int | None = None,
    distinct: Sequence[int] | None = None,
) -> int:
    """Fewest bytes of a forward: ``sum_k count_k (id + 4 + D out) + distinct_k d_k itemsize``.

    ``counts``: ids looked up per size; 4 is the row's location, ``out`` is ``out_itemsize``.
    ``distinct``: rows among them that are read from memory; by default every lookup reads its row,
    as on a table far larger than the caches. The composed chain and the page levels stay in cache
    and count nothing.

    >>> lookup_bytes((2, 64, 128), (1, 0, 0), 4), lookup_bytes((2, 64, 128), (0, 0, 1), 4)
    (532, 1036)
    >>> lookup_bytes((2, 64, 128), (3, 0, 0), 4, distinct=(1, 0, 0))  # one row three times
    1580
    """
    out = sizes[-1] * (itemsize if out_itemsize is None else out_itemsize)
    rows = sum(d * n for d, n in zip(sizes, distinct or counts, strict=True))
    return sum(counts) * (id_bytes + 4 + out) + rows * itemsize


def backward_bytes(
    sizes: Sequence[int],
    counts: Sequence[int],
    itemsize: int,
    index_bytes: int = 8,
    grad_itemsize: int | None = None,
    distinct: Sequence[int] | None = None,
    state_bytes: int = 0,
    row_bytes: int = 0,
) -> int:
    """Fewest bytes of the row gradients, or of a fused step: ``sum_k count_k (D g + 8) +
    distinct_k (d_k (2 itemsize + 2 state) + 2 row)``.

    The output gradient is read once (``g = grad_itemsize``), the row is read (for the chain's
    gradient) and a row is written: its gradient, or with SGD fused the row itself. ``index_bytes``
    are the sorted row start and the position it came from, 4 B each. ``distinct``: rows among
    ``counts`` that are different ones, all by default. ``state_bytes`` and ``row_bytes``: optimizer
    state per element and per row, read and written (Adam: 8 and 4).

    >>> backward_bytes((2, 64, 128), (1, 0, 0), 4), backward_bytes((2, 64, 128), (0, 0, 1), 4)
    (536, 1544)
    >>> backward_bytes((2, 64, 128), (3, 0, 0), 4, distinct=(1, 0, 0), state_bytes=8, row_bytes=4)
    1616
    """
    grad = sizes[-1] * (itemsize if grad_itemsize is None else grad_itemsize)
    each = list(zip(sizes, distinct or counts, strict=True))
    rows = sum(n * (d * (2 * itemsize + 2 * state_bytes) + 2 * row_bytes) for d, n in each)
    return sum(counts) * (grad + index_bytes) + rows


def promote_bytes(
    sizes: Sequence[int],
    counts: Sequence[int],
    itemsize: int,
    id_bytes: int = 8,
    state_bytes: int = 0,
    row_bytes: int = 0,
) -> int:
    """Fewest bytes of promoting ``count_k`` distinct rows of size ``d_k`` by one size.

    ``sum_k count_k (id + 8 + 1 + d_k itemsize + d_{k+1} (itemsize + state) + row)``: its location
    is read and written (4 B each), the answer is a byte, the row is read, the larger row and its
    fresh state are written. ``state_bytes`` and ``row_bytes``: state per element and per row.

    >>> promote_bytes((2, 64, 128), (1, 0, 0), 4)
    281
    """
    hops = zip(sizes, sizes[1:], counts, strict=False)
    fixed = id_bytes + 9 + row_bytes
    return sum(n * (fixed + a * itemsize + b * (itemsize + state_bytes)) for a, b, n in hops)
