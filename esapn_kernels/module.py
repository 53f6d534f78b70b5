"""``ResizableEmbedding``: an embedding whose rows have their own sizes and grow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .ops.chain import chain_numel, split_chain
from .ops.checks import check_ids
from .ops.compose import ComposedCache
from .ops.layout import row_table
from .ops.lookup import Options, lookup
from .ops.memory import MemoryReport
from .storage.arena import Arena

__all__ = ["ResizableEmbedding"]

_DEFAULT_SIZES = (2, 4, 8, 16, 64, 128)


class _ReadOnly(Tensor):
    """What ``weight`` gives: reads like any tensor, refuses to be written to."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if writes or isinstance(kwargs.get("out"), cls) or func == Tensor.data.__get__:  # type: ignore[attr-defined]
            raise RuntimeError(_READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_OPERATORS = "add and div floordiv lshift mod mul or pow rshift sub truediv xor"
_IN_PLACE = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS.split())}
_READ_ONLY = (
    "weight of rows of several sizes is a dense copy, read-only: build the module by "
    "from_pretrained, or write to arena.storage and chain"
)


class ResizableEmbedding(nn.Module):
    """Embedding with a size per row; every lookup is carried to the largest size.

        y(x) = W_{n-2} (... (W_k e_x + b_k) ...) + b_{n-2}        e_x in R^{d_k},  y(x) in R^D

    with ``k`` the row's level, counted from 0, and ``D = d_{n-1}`` the largest size.

    A row is stored at its own size only. ``promote`` replaces ``e`` by ``W_k e + b_k``, so the
    output does not change at that moment. The row values train through ``arena.storage``, one flat
    Parameter whose identity never changes, the hops through ``chain``, their packed Parameter.

    Takes what ``nn.Embedding`` takes, in its order; what is ours is keyword-only. With one size it
    *is* ``nn.Embedding``, number for number.

    Args:
        num_embeddings: number of rows ``N``.
        embedding_dim: output width; the largest of ``sizes``, and may be left out.
        padding_idx: this row has no gradient and starts as zeros; negative counts from the end. It
            is stored at the largest size, so that its output is itself, whatever the hops are.
        max_norm, norm_type: rows looked up are scaled down, in place, to this p-norm. With one size
            only: the norm of a shorter row says nothing of that of its output.
        scale_grad_by_freq: divide the gradient of every occurrence by the count of its id in the
            batch, for rows and hops alike.
        sparse: the gradient of ``arena.storage`` is COO, for ``SGD``, ``Adagrad``, ``SparseAdam``.
            ``esapn_kernels.optim`` is faster and needs no gradient at all.
        _weight: ``[N, D]``, rows to start from, all at the largest size; copied.
        _freeze: no gradient, neither for rows nor for hops.
        device, dtype: of the parameters; fp32, bf16, fp16 or fp64.
        sizes: strictly increasing candidate sizes ``d_0 < ... < d_{n-1}``; default: 2, 4, 8, 16, 64
            and 128, or those below ``embedding_dim`` and itself.
        initial_size: size of every row at the start (default: the smallest), or an integer tensor
            ``[N]`` of sizes.
        init_std: rows start as N(0, init_std^2); 1.0 is ``nn.Embedding``'s own.
        init: how hops start. ``linear``: as ``nn.Linear``, uniform in ``+-1/sqrt(d_k)``, like the
            paper's authors. ``isometric``: orthonormal columns times ``sqrt(d_{k+1} / d_k)``, no
            bias, so that outputs have the variance ``init_std^2`` at every size. ``padded``: the
            same with the columns of the identity, so that growing a row appends zeros to it; if
            such hops are not trained (``chain.requires_grad_(False)``), Adagrad's sums of the old
            numbers go along with a grown row.
        backend: ``auto`` | ``triton`` | ``torch`` | ``reference``; ``auto`` takes Triton on a GPU
            and torch elsewhere.
        out_dtype: of the output, rounded once from fp32 sums; default: that of the rows.
        max_elements: the rows never take more than so many numbers (whole pages of them). Then a
            row that cannot grow stays: on a CPU ``promote`` raises before anything moves, on a GPU
            its mask says so. Default: no limit.

    Raises:
        ValueError: sizes not strictly increasing positive integers, an ``embedding_dim`` that is
            not the largest size, an unknown initial size, init or backend.
        AssertionError: ``padding_idx`` out of range, ``_weight`` of another shape, as torch.
        RuntimeError: a dtype that is none of the four, a negative ``num_embeddings``,
            ``scale_grad_by_freq`` with ``sparse``, as torch.
        NotImplementedError: ``max_norm`` with several sizes.

    State dict: ``arena.storage``, ``chain`` and the arena's location and free-list buffers; tensors
    only. A module whose rows have other sizes loads it and takes its sizes. Optimizer state of
    resized rows starts afresh, see ``esapn_kernels.storage.followers``. Resize between
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

    # Of a replica (see distributed): gives the ids that all ranks promote together.
    agree: Callable[..., Tensor] | None = None
    # torch's words, which begin otherwise for a bag.
    _padding_refused = "Padding_idx must be within num_embeddings"
    _shown = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int | None = None,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sizes: Sequence[int] | None = None,
        initial_size: int | Tensor | None = None,
        init_std: float = 1.0,
        init: str = "linear",
        backend: str = "auto",
        out_dtype: torch.dtype | None = None,
        max_elements: int | None = None,
    ) -> None:
        super().__init__()
        if _weight is not None:
            if embedding_dim is None and sizes is None and _weight.dim() == 2:
                embedding_dim = _weight.shape[1]
            device, dtype = _weight.device, _weight.dtype
        self.sizes = _check_sizes(_default_sizes(embedding_dim) if sizes is None else sizes)
        if embedding_dim not in (None, self.sizes[-1]):
            raise ValueError(
                f"embedding_dim must be the largest size, {self.sizes[-1]}, got {embedding_dim}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = self.sizes[-1]
        self.padding_idx = self._check_padding(padding_idx)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.init_std = init_std
        self.init = init
        self.backend = backend
        self.out_dtype = out_dtype
        self._check(dtype)
        if _weight is not None and list(_weight.shape) != [num_embeddings, self.embedding_dim]:
            raise AssertionError("Shape of weight does not match num_embeddings and embedding_dim")
        top = self.embedding_dim
        self.arena = Arena(
            num_embeddings,
            self.sizes,
            level=self._initial_level(initial_size if _weight is None else top),
            max_elements=max_elements,
            device=device,
            dtype=dtype,
        )
        self.chain = nn.Parameter(torch.empty(chain_numel(self.sizes), device=device, dtype=dtype))
        self._composed = ComposedCache()
        self.reset_parameters()
        if _weight is not None:
            self._write_rows(_weight)
        if _freeze:
            self.requires_grad_(False)

    def _check(self, dtype: torch.dtype | None) -> None:
        """Refuse arguments that exclude each other, before anything is allocated."""
        if self.num_embeddings < 0:
            shape = [self.num_embeddings, self.embedding_dim]
            raise RuntimeError(
                f"Trying to create tensor with negative dimension {self.num_embeddings}: {shape}"
            )
        if self.backend not in ("auto", "triton", "torch", "reference"):
            raise ValueError(
                f"backend must be auto, triton, torch or reference, got {self.backend!r}"
            )
        if self.init not in ("linear", "isometric", "padded"):
            raise ValueError(f"init must be linear, isometric or padded, got {self.init!r}")
        floating = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if dtype not in floating:
            raise RuntimeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        if self.max_norm is not None and len(self.sizes) > 1:
            raise NotImplementedError(
                "max_norm bounds a stored row, and of a row that is shorter than the output this "
                f"says nothing: use one size, sizes=({self.sizes[-1]},), or normalise the output"
            )
        if self.sparse and self.scale_grad_by_freq:
            raise RuntimeError("scale_grad_by_freq not supported with sparse gradients")
        if self.sparse and self.backend == "reference":
            raise ValueError("backend 'reference' has no sparse gradients: use sparse=False")

    def _check_padding(self, padding_idx: int | None) -> int | None:
        """``padding_idx`` counted from the front; refused in torch's own words."""
        if padding_idx is None:
            return None
        if not -self.num_embeddings <= padding_idx < self.num_embeddings:
            raise AssertionError(self._padding_refused)
        return padding_idx % self.num_embeddings

    def _initial_level(self, size: int | Tensor | None) -> int | Tensor:
        level: int | Tensor
        if size is None:
            level = 0
        elif not isinstance(size, Tensor):
            level = self._level_of(size)
        else:
            if size.shape != (self.num_embeddings,):
                raise ValueError(
                    f"initial_size must be one size or [{self.num_embeddings}] sizes, "
                    f"got shape {list(size.shape)}"
                )
            size = size.cpu().contiguous()
            known = torch.tensor(self.sizes, device="cpu")
            level = torch.searchsorted(known, size).clamp(max=len(self.sizes) - 1)
            if not torch.equal(known[level], size.to(known.dtype)):
                raise ValueError(f"initial_size holds sizes that are not among {list(self.sizes)}")
            level = level.to(torch.int8)
        if self.padding_idx is not None and len(self.sizes) > 1:
            if not isinstance(level, Tensor):
                level = torch.full((self.num_embeddings,), level, dtype=torch.int8, device="cpu")
            level[self.padding_idx] = len(self.sizes) - 1
        return level

    def _level_of(self, size: int) -> int:
        if size not in self.sizes:
            raise ValueError(f"size must be one of {list(self.sizes)}, got {size}")
        return self.sizes.index(size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows and hops anew as ``init_std`` and ``init`` say; sizes stay.

        The padding row becomes zeros. After ``to_empty`` of a module on the meta device rows have
        their initial sizes.
        """
        storage = self.arena.storage
        if storage.is_meta:
            return
        level = self.arena.level()
        start = self.arena.layout.row_start.long()
        storage.zero_()
        for k, dim in enumerate(self.sizes):
            mine = start[level == k]
            # Drawn as one table, so that a single size gives nn.Embedding's own numbers.
            rows = torch.empty(len(mine), dim, device=storage.device, dtype=storage.dtype)
            rows.normal_(0.0, self.init_std)
            if len(mine):
                row_table(storage, dim).index_copy_(0, mine, rows)
        if self.padding_idx is not None:
            first = int(start[self.padding_idx])
            storage[first : first + self.sizes[int(level[self.padding_idx])]] = 0
        for weight, bias in split_chain(self.chain, self.sizes):
            d_out, d_in = weight.shape
            gain = math.sqrt(d_out / d_in)
            if self.init == "isometric":
                columns = torch.empty(d_out, d_in, device=weight.device)
                weight.copy_(nn.init.orthogonal_(columns, gain=gain))
                bias.zero_()
            elif self.init == "padded":
                weight.copy_(gain * torch.eye(d_out, d_in, device=weight.device))
                bias.zero_()
            else:
                bound = 1 / math.sqrt(d_in)
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)

    @torch.no_grad()
    def _write_rows(self, weight: Tensor) -> None:
        """Set all rows, which are of the largest size, to those of ``weight``."""
        if self.num_embeddings and not weight.is_meta:
            table = row_table(self.arena.storage, self.embedding_dim)
            table.index_copy_(0, self.arena.layout.row_start.long(), weight)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        sizes: Sequence[int] | None = None,
        **options: Any,
    ) -> ResizableEmbedding:
        """A module whose rows are those of ``embeddings``, ``[N, D]``, all at the largest size.

        Unlike ``nn.Embedding``'s, it holds a copy: rows of ours lie in an arena.

        Args:
            embeddings: ``[N, D]``, fp32, bf16, fp16 or fp64.
            freeze: no gradient.
            sizes: candidate sizes; default: ``D`` alone, because rows only grow.
            options: the constructor's other keywords.

        Raises:
            AssertionError: ``embeddings`` is not 2-dimensional, as torch.

        Example:
            >>> emb = ResizableEmbedding.from_pretrained(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            >>> emb(torch.tensor([1]))
            tensor([[3., 4.]])
        """
        if embeddings.dim() != 2:
            raise AssertionError("Embeddings parameter is expected to be 2-dimensional")
        rows, dim = embeddings.shape
        return cls(
            rows,
            dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            embeddings.detach(),
            freeze,
            sizes=(dim,) if sizes is None else sizes,
            **options,
        )

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, sizes: Sequence[int] | None = None, **options: Any
    ) -> ResizableEmbedding:
        """The same table as an ``nn.Embedding`` with its options: equal outputs and gradients.

        Example:
            >>> plain = nn.Embedding(10, 4, padding_idx=0)
            >>> emb = ResizableEmbedding.from_embedding(plain)
            >>> torch.equal(emb(torch.tensor([3])), plain(torch.tensor([3]))), emb.padding_idx
            (True, 0)
        """
        return cls.from_pretrained(
            embedding.weight,
            not embedding.weight.requires_grad,
            embedding.padding_idx,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.sparse,
            sizes=sizes,
            **options,
        )

    @property
    def weight(self) -> Tensor:
        """All outputs as one table ``[N, D]``, for reading; gradients flow to rows and hops.

        With one size a view of the rows, which can be written to; else a dense copy made at every
        access, which refuses to be.
        """
        dense = self._dense()
        return dense if torch.compiler.is_compiling() else dense.as_subclass(_ReadOnly)

    def _dense(self) -> Tensor:
        ids = torch.arange(self.num_embeddings, device=self.chain.device)
        return ResizableEmbedding.forward(self, ids)

    def _table(self) -> Tensor:
        """The rows of a module of one size, ``[N, d]``: a view of the storage."""
        storage = self.arena.storage
        return storage.view(-1, self.embedding_dim)[: self.num_embeddings]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(_READ_ONLY)
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        """Look up ids; returns ``[*input.shape, embedding_dim]``.

        Args:
            input: ids, int32 or int64, of any shape, jagged too; torch's name for them.

        Raises:
            IndexError: an id out of range (on a GPU: an asynchronous device assertion).
            RuntimeError: ids that are neither int32 nor int64.
        """
        ids = input
        if isinstance(ids, Tensor) and ids.is_nested:
            jagged: Any = ids
            rows = ResizableEmbedding.forward(self, jagged.values())
            return torch.nested.nested_tensor_from_jagged(rows, jagged.offsets(), jagged.lengths())
        # Past nn.Module's own lookup of attributes, for the sake of small batches.
        arena: Any = self._modules["arena"]
        storage: Any = arena._parameters["storage"]
        # The torch path finds ids out of range itself, in the same words, if rows are ragged.
        ragged = self.max_norm is None
        read = not ragged or self.backend not in ("auto", "torch")
        check_ids(ids, self.num_embeddings, read=read)
        if self.max_norm is not None:
            table = self._table().detach()
            torch.embedding_renorm_(table, ids.contiguous(), self.max_norm, self.norm_type)
        fused = arena.fused_optimizer
        return lookup(
            ids,
            storage,
            self._parameters["chain"],  # type: ignore[arg-type]
            arena.layout,
            Options(self.padding_idx, self.scale_grad_by_freq, self.sparse, self.out_dtype),
            backend=self.backend,
            begin_step=None if fused is None else partial(fused.begin_step, storage),
            cache=self._composed,
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
            already, or no room was left. Of replicas (see ``distributed``) every rank promotes what
            any of them promotes, and the mask says so for masked ids too.

        Raises:
            IndexError, RuntimeError: as for :meth:`forward`; nothing is changed. On a GPU an id out
                of range is passed over, and False in what is returned.
            ValueError: a mask of another shape or dtype.
        """
        with self._refusing():
            check_ids(ids, self.num_embeddings)
            if mask is not None:
                _check_mask(mask, ids)
                mask = mask.reshape(-1)
        backend = "torch" if self.backend == "reference" else self.backend
        flat = ids.reshape(-1)
        # Hops that pad with zeros and stay so: Adagrad's sums go along.
        carries = self.init == "padded" and not self.chain.requires_grad
        promote = partial(self.arena.promote, chain=self.chain, carries=carries, backend=backend)
        if self.agree is None:
            moved = promote(flat, mask=mask)
        else:
            everyones = self.agree(flat if mask is None else flat[mask])
            enlarged = promote(everyones)
            # What the host knows of a device differs between ranks; growth must not.
            self.arena.forget_counters()
            moved = torch.isin(flat, everyones[enlarged])
        return moved.view(ids.shape)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Checks of arguments: what one replica refuses, the others must not wait for."""
        try:
            yield
        except Exception:
            if self.agree is not None:
                with contextlib.suppress(RuntimeError):
                    self.agree(torch.empty(0, device=self.chain.device), refused=True)
            raise

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
            ValueError: ``size`` is not a candidate, or a row other than the padding row is larger
                than ``size`` (rows only grow); nothing is changed.
            IndexError, RuntimeError: as for :meth:`forward`; nothing is changed.
        """
        with self._refusing():
            target = self._level_of(size)
            check_ids(ids, self.num_embeddings)
            level = self.arena.level(ids)
            if self.padding_idx is not None:
                level = level.masked_fill(ids == self.padding_idx, target)
            if bool((level > target).any()):
                largest = self.sizes[int(level.max())]
                raise ValueError(f"rows only grow: cannot resize a row of size {largest} to {size}")
        # At least once, for the replicas whose rows are to be asked.
        for _ in range(max(target, 1)):
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
            optimizer=self.arena.followers.state_bytes(),
            scratch=parts.scratch,
            fixed=self.num_embeddings * self.embedding_dim * itemsize,
            rows_per_size=dict(zip(self.sizes, counts, strict=True)),
        )

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The plain ``nn.Embedding(N, D)`` with the same outputs, for serving or export."""
        return nn.Embedding.from_pretrained(
            self._dense(),
            not self.arena.storage.requires_grad,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    def __repr__(self) -> str:
        # One line, like nn.Embedding: the arena has nothing to add.
        return f"{self._get_name()}({self.extra_repr()})"

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        for name in self._shown:
            if (value := getattr(self, name)) != _DEFAULTS.get(name):
                text += f", {name}={value!r}"
        return text if len(self.sizes) == 1 else f"{text}, sizes={self.sizes}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # All or nothing: hops without the rows that they belong to would be another table.
        if self.arena.fits(state_dict, prefix + "arena."):
            super()._load_from_state_dict(state_dict, prefix, *args)


_DEFAULTS = {"norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}


def _default_sizes(embedding_dim: int | None) -> Sequence[int]:
    """The paper's sizes, those below ``embedding_dim`` and itself where it is given."""
    if embedding_dim is None:
        return _DEFAULT_SIZES
    return [d for d in _DEFAULT_SIZES if d < embedding_dim] + [embedding_dim]


def _check_mask(mask: Tensor, ids: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool of shape {list(ids.shape)}, "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )


def _check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(sizes)
    whole = all(isinstance(d, int) and not isinstance(d, bool) for d in sizes)
    if not sizes or not whole or sizes[0] < 1:
        raise ValueError(f"sizes must be positive integers, got {list(sizes)}")
    if any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"sizes must be strictly increasing, got {list(sizes)}")
    return sizes
