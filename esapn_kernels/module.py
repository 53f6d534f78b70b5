"""``ResizableEmbedding``: an embedding whose rows have their own sizes and grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import companions
from .arena import Arena
from .compose import chain_numel
from .lookup import check_ids, lookup
from .reference import split_chain

__all__ = ["MemoryReport", "ResizableEmbedding"]

_DEFAULT_SIZES = (2, 4, 8, 16, 64, 128)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes really allocated, and what a table of one size would take.

    ``serving`` (what inference needs) = ``payload`` + ``slack`` + ``locations`` + ``chain``;
    ``fixed`` = ``num_embeddings * d_n * itemsize``, the plain ``nn.Embedding``. Only training takes
    ``optimizer`` (state that follows the rows) and ``scratch`` (4 bytes per row once rows have
    moved on a GPU).
    """

    payload: int
    slack: int
    locations: int
    chain: int
    optimizer: int
    scratch: int
    fixed: int
    rows_per_size: dict[int, int]

    @property
    def serving(self) -> int:
        return self.payload + self.slack + self.locations + self.chain

    @property
    def ratio(self) -> float:
        """``serving / fixed``."""
        return self.serving / self.fixed if self.fixed else 0.0

    def __str__(self) -> str:
        rows = "  ".join(f"{size}: {count:,}" for size, count in self.rows_per_size.items())
        parts = [
            "payload",
            "slack",
            "locations",
            "chain",
            "serving",
            "fixed",
            "optimizer",
            "scratch",
        ]
        lines = [f"{name:<10}{getattr(self, name):>15,} B" for name in parts]
        return "\n".join([f"rows by size  {rows}", *lines, f"serving / fixed = {self.ratio:.2%}"])


class ResizableEmbedding(nn.Module):
    """Embedding with a size per row; every lookup is carried to the largest size.

        y(x) = W_{n-1} (... (W_k e_x + b_k) ...) + b_{n-1}        e_x in R^{d_k},  y(x) in R^{d_n}

    A row is stored at its own size only. ``promote`` replaces ``e`` by ``W_k e + b_k``, so the
    output does not change at that moment. The row values train through ``arena.storage``, one flat
    Parameter whose identity never changes, the hops through ``chain``, their packed Parameter.

    Args:
        num_embeddings: number of rows ``N``.
        embedding_dim: output width; the largest of ``sizes``, and may be left out.
        sizes: strictly increasing candidate sizes ``d_1 < ... < d_n``.
        initial_size: size of every row at the start (default: the smallest), or an integer tensor
            ``[N]`` of sizes.
        init_std: rows start as N(0, init_std^2); 1.0 is ``nn.Embedding``'s own. The hops start as
            ``nn.Linear`` does, uniform in ``+-1/sqrt(d_k)``.
        backend: ``auto`` | ``triton`` | ``torch`` | ``reference``; ``auto`` takes Triton on a GPU
            and torch elsewhere.
        out_dtype: of the output, rounded once from fp32 sums; default: that of the rows.
        max_elements: the rows never take more than so many numbers (whole pages of them). Then a
            row that cannot grow stays: on a CPU ``promote`` raises before anything moves, on a GPU
            its mask says so. Default: no limit.
        device, dtype: of the parameters; fp32, bf16, fp16 or fp64.

    Raises:
        ValueError: sizes not strictly increasing positive integers, an ``embedding_dim`` that is
            not the largest size, an unknown initial size or backend.

    State dict: ``arena.storage``, ``chain`` and the arena's location and free-list buffers; tensors
    only. A module whose rows have other sizes loads it and takes its sizes. Optimizer state of
    resized rows starts afresh, see ``esapn_kernels.companions``. Resize between
    ``optimizer.step()`` and the next forward; between forward and backward it raises at backward.

    Source: Liu et al., "Automated Embedding Size Search in Deep Recommender Systems", SIGIR 2020.

    Example:
        >>> import torch
        >>> emb = ResizableEmbedding(1000, sizes=(2, 4, 8))
        >>> ids = torch.tensor([[3, 7, 3], [1, 0, 999]])
        >>> emb(ids).shape
        torch.Size([2, 3, 8])
        >>> before = emb(ids)
        >>> emb.promote(torch.tensor([3, 999]))
        tensor([True, True])
        >>> emb.sizes_of(ids).tolist()
        [[4, 2, 4], [2, 2, 4]]
        >>> torch.allclose(emb(ids), before, atol=1e-6)
        True
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int | None = None,
        *,
        sizes: Sequence[int] | None = None,
        initial_size: int | Tensor | None = None,
        init_std: float = 1.0,
        backend: str = "auto",
        out_dtype: torch.dtype | None = None,
        max_elements: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes = _check_sizes(_default_sizes(embedding_dim) if sizes is None else sizes)
        if embedding_dim not in (None, self.sizes[-1]):
            raise ValueError(
                f"embedding_dim must be the largest size, {self.sizes[-1]}, got {embedding_dim}"
            )
        if num_embeddings < 0:
            raise ValueError(f"num_embeddings must not be negative, got {num_embeddings}")
        if backend not in ("auto", "triton", "torch", "reference"):
            raise ValueError(f"backend must be auto, triton, torch or reference, got {backend!r}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = self.sizes[-1]
        self.init_std = init_std
        self.backend = backend
        self.out_dtype = out_dtype
        self.arena = Arena(
            num_embeddings,
            self.sizes,
            level=self._initial_level(initial_size),
            max_elements=max_elements,
            device=device,
            dtype=dtype,
        )
        self.chain = nn.Parameter(torch.empty(chain_numel(self.sizes), device=device, dtype=dtype))
        self.reset_parameters()

    def _initial_level(self, size: int | Tensor | None) -> int | Tensor:
        if size is None:
            return 0
        if not isinstance(size, Tensor):
            return self._level_of(size)
        if size.shape != (self.num_embeddings,):
            raise ValueError(
                f"initial_size must be one size or [{self.num_embeddings}] sizes, "
                f"got shape {list(size.shape)}"
            )
        known = torch.tensor(self.sizes, device=size.device)
        level = torch.searchsorted(known, size.contiguous()).clamp(max=len(self.sizes) - 1)
        if not torch.equal(known[level], size.to(known.dtype)):
            raise ValueError(f"initial_size holds sizes that are not among {list(self.sizes)}")
        return level.to(torch.int8)

    def _level_of(self, size: int) -> int:
        if size not in self.sizes:
            raise ValueError(f"size must be one of {list(self.sizes)}, got {size}")
        return self.sizes.index(size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows from N(0, init_std^2) and hops as ``nn.Linear`` does; sizes stay."""
        storage, level = self.arena.storage, self.arena.level()
        start = self.arena.locations[0].long()
        storage.zero_()
        for k, dim in enumerate(self.sizes):
            mine = start[level == k]
            # Drawn as one table, so that a single size gives nn.Embedding's own numbers.
            rows = torch.empty(len(mine), dim, device=storage.device, dtype=storage.dtype)
            rows.normal_(0.0, self.init_std)
            storage[mine[:, None] + torch.arange(dim, device=mine.device)] = rows
        for weight, bias in split_chain(self.chain, self.sizes):
            bound = 1 / math.sqrt(weight.shape[1])
            weight.uniform_(-bound, bound)
            bias.uniform_(-bound, bound)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids`` of any shape; returns ``[*ids.shape, embedding_dim]``.

        Raises:
            IndexError: an id out of range (on a GPU: an asynchronous device assertion).
            RuntimeError: ids that are neither int32 nor int64.
        """
        row_start, page_level = self.arena.locations
        fused = self.arena.fused_optimizer
        return lookup(
            ids,
            self.arena.storage,
            self.chain,
            row_start,
            page_level,
            sizes=self.sizes,
            page=self.arena.page,
            backend=self.backend,
            out_dtype=self.out_dtype,
            begin_step=None if fused is None else partial(fused.begin_step, self.arena),
        )

    def sizes_of(self, ids: Tensor | None = None) -> Tensor:
        """Size of every row of ``ids`` (of all rows), int64, shape of ``ids``; 0: no row."""
        if ids is not None:
            check_ids(ids, self.num_embeddings)
        level = self.arena.level(ids)
        return torch.tensor([*self.sizes, 0], device=level.device)[level]

    def promote(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Enlarge the rows of ``ids`` (where ``mask``) to the next size: ``e' = W_k e + b_k``.

        An id twice is enlarged once; rows at the largest size stay as they are. On a GPU three
        kernels and no host synchronisation, whatever the number of ids; capturable in a CUDA graph,
        see :meth:`reserve`.

        Args:
            ids: any shape, int32 or int64.
            mask: bool, shape of ``ids``; default: all.

        Returns:
            Bool, shape of ``ids``: True where the row was enlarged by this call, for every
            occurrence of its id that ``mask`` admits. False: masked out, of the largest size
            already, or no room was left.

        Raises:
            IndexError, RuntimeError: as for :meth:`forward`; nothing is changed. On a GPU an id out
                of range is passed over, and False in what is returned.
            ValueError: a mask of another shape or dtype.
        """
        check_ids(ids, self.num_embeddings)
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
            if mask.shape != ids.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be bool of shape {list(ids.shape)}, "
                    f"got {mask.dtype} of shape {list(mask.shape)}"
                )
            mask = mask.reshape(-1)
        backend = "torch" if self.backend == "reference" else self.backend
        return self.arena.promote(ids.reshape(-1), self.chain, mask, backend=backend).view(
            ids.shape
        )

    def reserve(self, rows: int) -> None:
        """Make room so that ``rows`` more rows can be enlarged, in any number of calls.

        For use before a CUDA graph captures :meth:`promote`: from then on the arena does not grow
        unasked. A row that goes up two sizes counts twice.

        Raises:
            RuntimeError: a graph is being captured.
        """
        self.arena.reserve(rows)

    def resize(self, ids: Tensor, size: int) -> Tensor:
        """Enlarge the rows of ``ids`` to ``size``, hop by hop; rows of that size stay as they are.

        Returns:
            Bool, shape of ``ids``: True where the row is of ``size`` now. False: no room was left.

        Raises:
            ValueError: ``size`` is not a candidate, or a row is larger than ``size`` (rows only
                grow); nothing is changed.
            IndexError, RuntimeError: as for :meth:`forward`; nothing is changed.
        """
        target = self._level_of(size)
        check_ids(ids, self.num_embeddings)
        level = self.arena.level(ids)
        if bool((level > target).any()):
            largest = self.sizes[int(level.max())]
            raise ValueError(f"rows only grow: cannot resize a row of size {largest} to {size}")
        for _ in range(target):
            self.promote(ids, self.arena.level(ids) < target)
        return self.arena.level(ids) == target

    def compact(self) -> None:
        """Close the holes that moved rows left: the fewest pages that hold the rows."""
        self.arena.compact()

    def memory_report(self) -> MemoryReport:
        """Bytes really allocated, part by part; see :class:`MemoryReport`."""
        parts = self.arena.bytes()
        itemsize = self.arena.storage.element_size()
        level = self.arena.level()
        counts = torch.bincount(level[level >= 0], minlength=len(self.sizes)).tolist()
        return MemoryReport(
            payload=parts.payload,
            slack=parts.slack,
            locations=parts.locations,
            chain=self.chain.untyped_storage().nbytes(),
            optimizer=companions.state_bytes(self.arena),
            scratch=parts.scratch,
            fixed=self.num_embeddings * self.embedding_dim * itemsize,
            rows_per_size=dict(zip(self.sizes, counts, strict=True)),
        )

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The plain ``nn.Embedding(N, d_n)`` with the same outputs, for serving or export."""
        weight = self(torch.arange(self.num_embeddings, device=self.chain.device))
        return nn.Embedding.from_pretrained(weight, freeze=not self.chain.requires_grad)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, sizes={self.sizes}"


def _default_sizes(embedding_dim: int | None) -> Sequence[int]:
    """The paper's sizes, those below ``embedding_dim`` and itself where it is given."""
    if embedding_dim is None:
        return _DEFAULT_SIZES
    return [d for d in _DEFAULT_SIZES if d < embedding_dim] + [embedding_dim]


def _check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(sizes)
    whole = all(isinstance(d, int) and not isinstance(d, bool) for d in sizes)
    if not sizes or not whole or sizes[0] < 1:
        raise ValueError(f"sizes must be positive integers, got {list(sizes)}")
    if any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"sizes must be strictly increasing, got {list(sizes)}")
    return sizes
