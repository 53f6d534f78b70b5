"""``ResizableEmbedding``: an embedding whose rows have their own sizes, and change them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from .arguments import (
    check_floating,
    check_mask,
    check_sizes,
    count_from_front,
    default_sizes,
    initial_level,
    level_of,
)
from .bad_ids import BadIds, row_standing_in, stand_in
from .budget import budget_bytes
from .inputs import as_leaf, look_up_nested
from .ops.backend import BACKENDS
from .ops.chain import chain_numel, draw_hops, tails_numel
from .ops.checks import check_ids
from .ops.compose import ComposedCache
from .ops.layout import write_rows
from .ops.lookup import Options, lookup
from .ops.memory import MemoryReport
from .storage.arena import Arena
from .storage.table import Table
from .weight import check_assigned, dense_weight

__all__ = ["ResizableEmbedding"]

INITS = ("linear", "isometric", "padded", "tails")
"""How hops start."""


class ResizableEmbedding(nn.Embedding):
    """Embedding with a size per row; every lookup is carried to the largest size.

        y(x) = W_{n-2} (... (W_k e_x + b_k) ...) + b_{n-2}        e_x in R^{d_k},  y(x) in R^D

    with ``k`` the row's level, counted from 0, and ``D = d_{n-1}`` the largest size.

    A row is stored at its own size only. ``promote`` replaces ``e`` by ``W_k e + b_k``, so the
    output does not change at that moment; ``demote`` takes the row of the size below whose output
    is nearest. The row values train through ``arena.storage``, one flat
    Parameter whose identity never changes, the hops through ``chain``, their packed Parameter.

    Takes what ``nn.Embedding`` takes, in its order; what is ours is keyword-only. With one size it
    *is* ``nn.Embedding``: the rows are the Parameter ``weight``, ``[N, d]``, and nothing else is
    registered; ``chain`` is ``None``.

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
        _weight: ``[N, D]``, rows to start from, all at the largest size; with one size they are
            ``weight`` itself, as in torch, with several a copy.
        _freeze: no gradient, neither for rows nor for hops.
        device, dtype: of the parameters; fp32, bf16, fp16 or fp64.
        sizes: strictly increasing candidate sizes ``d_0 < ... < d_{n-1}``; default: 2, 4, 8, 16, 64
            and 128, or those below ``embedding_dim`` and itself.
        initial_size: size of every row at the start (default: the smallest), or an integer tensor
            ``[N]`` of sizes.
        init_std: rows start as N(0, init_std^2); 1.0 is ``nn.Embedding``'s own.
        init: how hops start. ``isometric``: orthonormal columns times ``sqrt(d_{k+1} / d_k)``, no
            bias, so that outputs have the variance ``init_std^2`` at every size. ``linear``: as
            ``nn.Linear``, uniform in ``+-1/sqrt(d_k)``, like the paper's authors. ``padded``: the
            same with the columns of the identity, so that growing a row appends zeros to it; if
            such hops are not trained (``chain.requires_grad_(False)``), Adagrad's sums of the old
            numbers go along with a resized row. ``tails``: ``e' = [g e; B e + b]`` with ``g =
            sqrt(d_{k+1} / d_k)`` fixed and ``B``, ``b`` learnt from zero on: what a smaller row
            lacks is predicted from what it has, and a grown row starts at that prediction.
            ``chain`` holds ``B`` and ``b`` alone, and Adagrad's sums go along, trained or not.
        backend: ``auto`` | ``triton`` | ``native`` | ``torch`` | ``reference``; ``auto`` takes
            Triton on a GPU, native kernels on a CPU where they are built, and torch elsewhere.
        out_dtype: of the output, rounded once from fp32 sums; default: that of the rows.
        max_elements: the rows never take more than so many numbers (whole pages of them). Then a
            row that cannot move stays: on a CPU ``promote`` raises before anything moves, on a GPU
            its mask says so. Default: no limit.
        budget: bytes that serving takes at most (``memory_report().serving``: rows, locations and
            hops): a number, ``"64 MB"``, ``"64 MiB"``, or ``"3%"`` of the plain table. The rows get
            their memory at once (of a CPU's, what is not written costs nothing), so that growth
            copies nothing. A row without room stays, on every backend, and ``refused`` counts it.
        on_bad_ids: ``raise``, or a row that stands in for every id outside ``[0, N)``, negative
            ones too: such an id is looked up, trained and promoted as if it were that row's.
            Negative counts from the end. ``bad_ids`` counts them; on a CPU the first also warn.

    Raises:
        ValueError: sizes not strictly increasing positive integers, an ``embedding_dim`` that is
            not the largest size, an unknown initial size, init or backend, ``on_bad_ids`` that is
            neither ``raise`` nor a row; a budget that does not hold all rows at their first sizes
            (it says which would), or one beside ``max_elements``.
        AssertionError: ``padding_idx`` out of range, ``_weight`` of another shape, as torch.
        RuntimeError: a dtype that is none of the four, a negative ``num_embeddings``,
            ``scale_grad_by_freq`` with ``sparse``, as torch.
        NotImplementedError: ``max_norm`` with several sizes.

    State dict: with one size ``weight``; else ``chain``, ``arena.storage`` and the buffers that
    say where rows lie; tensors only. A module whose rows have other sizes loads it and takes its
    sizes; one of several sizes loads a ``weight`` too, all rows at the largest. Optimizer state of
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

        Ids that a table does not have take the row of its last id:

        >>> emb = ResizableEmbedding(1000, sizes=(2, 4, 8), on_bad_ids=-1)
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     y = emb(torch.tensor([5000, 999, -1]))
        >>> print(said[0].message)
        2 of 3 ids are out of range [0, 1000): row 999 stands in for them; bad_ids counts them
        >>> torch.equal(y[0], y[1]), torch.equal(y[2], y[1]), emb.bad_ids
        (True, True, 2)
    """

    arena: Arena | Table
    # nn.Parameter; None with one size.
    chain: Any
    # Of a replica (see distributed): gives the ids that all ranks promote together.
    agree: Callable[..., Tensor] | None = None
    # Of a rank's rows (see sharded): whether a lookup awaits its backward, before which none moves.
    awaits_backward: Callable[[], bool] | None = None
    # torch's words; those of nn.EmbeddingBag begin otherwise.
    _padding_refused = "Padding_idx must be within num_embeddings"
    _shown: tuple[str, ...] = (
        *("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        *("on_bad_ids", "budget"),
    )
    # Also of modules that were pickled without them.
    on_bad_ids: str | int = "raise"
    budget: int | None = None

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
        init: str = "isometric",
        backend: str = "auto",
        out_dtype: torch.dtype | None = None,
        max_elements: int | None = None,
        budget: int | str | None = None,
        on_bad_ids: str | int = "raise",
    ) -> None:
        # What torch's class would allocate is allocated here.
        nn.Module.__init__(self)
        if _weight is not None:
            if embedding_dim is None and sizes is None and _weight.dim() == 2:
                embedding_dim = _weight.shape[1]
            device, dtype = _weight.device, _weight.dtype
        sizes = check_sizes(default_sizes(embedding_dim) if sizes is None else sizes)
        if embedding_dim not in (None, sizes[-1]):
            raise ValueError(
                f"embedding_dim must be the largest size, {sizes[-1]}, got {embedding_dim}"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = sizes[-1]
        self.padding_idx = count_from_front(padding_idx, num_embeddings, self._padding_refused)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        self.init_std = init_std
        self.init = init
        self.backend = backend
        self.out_dtype = out_dtype
        self.on_bad_ids = on_bad_ids
        self._bad_ids = BadIds()
        if on_bad_ids != "raise":
            self.on_bad_ids = row_standing_in(on_bad_ids, num_embeddings)
            self._bad_ids.prepare(torch.empty(0, device=device).device)
        self._check_options(len(sizes) > 1)
        if _weight is not None and list(_weight.shape) != [num_embeddings, self.embedding_dim]:
            raise AssertionError("Shape of weight does not match num_embeddings and embedding_dim")
        if _weight is not None:
            initial_size = self.embedding_dim
        level = initial_level(initial_size, sizes, num_embeddings, self.padding_idx)
        if budget is not None and max_elements is not None:
            raise ValueError("give budget or max_elements, not both")
        if budget is not None and num_embeddings >= 0:  # torch refuses others
            item = torch.empty(0, device="meta", dtype=dtype).element_size()
            plain = num_embeddings * sizes[-1] * item
            self.budget = budget_bytes(budget, plain)
            if len(sizes) == 1 and plain > self.budget:
                raise ValueError(
                    f"a budget of {self.budget} bytes does not hold {num_embeddings} rows of "
                    f"{sizes[0]}: {plain} bytes do"
                )
        if len(sizes) > 1:
            check_floating(dtype)
            self._make_arena(sizes, level, max_elements, device, dtype)
            self._is_new = True
            self.reset_parameters()
            if _weight is not None:
                self._write_rows(_weight)
            if _freeze:
                self.requires_grad_(False)
            return
        if max_elements is not None and num_embeddings * sizes[0] > max_elements:
            raise ValueError(
                f"the rows take {num_embeddings * sizes[0]} elements, "
                f"max_elements={max_elements} allows fewer"
            )
        self.arena = Table(self)
        self.register_parameter("chain", None)
        if _weight is None:
            rows = torch.empty((num_embeddings, sizes[0]), device=device, dtype=dtype)
            self.weight = nn.Parameter(rows, requires_grad=not _freeze)
            self.reset_parameters()
        else:
            self.weight = nn.Parameter(_weight, requires_grad=not _freeze)

    @torch.inference_mode(False)
    def _make_arena(
        self,
        sizes: tuple[int, ...],
        level: int | Tensor,
        max_elements: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if self.num_embeddings < 0:
            shape = [self.num_embeddings, self.embedding_dim]
            raise RuntimeError(
                f"Trying to create tensor with negative dimension {self.num_embeddings}: {shape}"
            )
        numel = tails_numel(sizes) if self.init == "tails" else chain_numel(sizes)
        self.chain = nn.Parameter(torch.empty(numel, device=device, dtype=dtype))
        self.arena = Arena(
            self.num_embeddings,
            sizes,
            level=level,
            max_elements=max_elements,
            budget=self.budget,
            beside=self.chain.nbytes,
            device=device,
            dtype=dtype,
        )
        self._composed = ComposedCache()

    def _check_options(self, several: bool) -> None:
        """Refuse options that exclude each other; of one size torch refuses them itself."""
        if self.backend not in ("auto", *BACKENDS):
            names = ", ".join(("auto", *BACKENDS[:-1]))
            raise ValueError(f"backend must be {names} or {BACKENDS[-1]}, got {self.backend!r}")
        if self.init not in INITS:
            names = ", ".join(INITS[:-1])
            raise ValueError(f"init must be {names} or {INITS[-1]}, got {self.init!r}")
        if self.max_norm is not None and several:
            dim = self.embedding_dim
            raise NotImplementedError(
                "max_norm bounds a stored row, and of a row that is shorter than the output this "
                f"says nothing: use one size, sizes=({dim},), or normalise the output"
            )
        if self.sparse and self.scale_grad_by_freq:
            raise RuntimeError("scale_grad_by_freq not supported with sparse gradients")
        if self.sparse and self.backend == "reference":
            raise ValueError("backend 'reference' has no sparse gradients: use sparse=False")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The candidate sizes; with one size the width of ``weight``."""
        return self.arena.sizes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows and hops anew as ``init_std`` and ``init`` say; sizes stay.

        The padding row becomes zeros. After ``to_empty`` of a module on the meta device rows have
        their initial sizes.
        """
        arena = self.arena
        is_new = self.__dict__.pop("_is_new", False)
        if isinstance(arena, Table):
            self.weight.normal_(0.0, self.init_std)
            self._fill_padding_idx_with_zero()
            return
        self._check_options(several=True)
        storage = arena.storage
        if storage.is_meta:
            return
        layout = arena.layout
        if not is_new:  # else they are zeros, and what is not written takes no memory
            storage.zero_()
        for part, level in arena.levels(1 << 20):
            for k, dim in enumerate(self.sizes):
                mine = layout.row_start[part][level == k]
                if not len(mine):
                    continue
                first = int(mine[0])
                if bool((mine[1:] - mine[:-1] == dim).all()):
                    # They lie side by side, as in a fresh table: no copy.
                    storage[first : first + len(mine) * dim].normal_(0.0, self.init_std)
                else:
                    rows = storage.new_empty(len(mine), dim)
                    write_rows(storage, mine, rows.normal_(0.0, self.init_std))
        if self.padding_idx is not None:
            first = int(layout.row_start[self.padding_idx])
            if first >= 0:
                size = self.sizes[int(layout.page_level[first // layout.page])]
                storage[first : first + size] = 0
        draw_hops(self.chain, self.sizes, self.init)

    @torch.no_grad()
    def _write_rows(self, weight: Tensor) -> None:
        """Set all rows, which are of the largest size, to those of ``weight``."""
        if self.num_embeddings and not weight.is_meta:
            write_rows(self.arena.storage, self.arena.layout.row_start, weight)

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

        With one size it shares their memory, as ``nn.Embedding``'s does; with several it holds a
        copy, for rows lie in an arena then.

        Args:
            embeddings: ``[N, D]``; fp32, bf16, fp16 or fp64 for several sizes, any for one.
            freeze: no gradient.
            sizes: candidate sizes; default: ``D`` alone, at which all rows start.
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
        """All outputs as one table ``[N, D]``; gradients flow to rows and hops.

        With one size the Parameter that holds the rows. With several it is computed at every
        access, and what is written to it goes to the rows, each at its own size: see
        ``esapn_kernels.weight``.
        """
        if "weight" in self._parameters:
            return self._parameters["weight"]  # type: ignore[return-value]
        if "weight" in self.__dict__:
            # What pruning, and replicas of nn.DataParallel, set in the Parameter's place.
            held: Tensor = self.__dict__["weight"]
            return held
        if "arena" not in self._modules:
            raise AttributeError(f"{self._get_name()!r} object has no attribute 'weight'")
        return dense_weight(self, partial(ResizableEmbedding.forward, self))

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ResizableEmbedding:
        self._refuse_wider(fn)
        # Hops are saved for backward, which what inference mode made cannot be.
        saved = self.chain is not None and not self.chain.is_inference()
        with torch.inference_mode(False) if saved else contextlib.nullcontext():
            super()._apply(fn, recurse)
        self._prepare_count()
        return self

    def _refuse_wider(self, fn: Callable[..., Any]) -> None:
        """Raise where ``fn`` makes numbers so wide that the table exceeds its budget."""
        numbers = next(self.parameters(), None)
        if self.budget is None or numbers is None:
            return
        other = fn(numbers.new_empty(0))
        wider = other.element_size() / numbers.element_size()
        parameters = sum(parameter.nbytes for parameter in self.parameters())
        places = sum(buffer.nbytes for buffer in self.buffers())
        if wider > 1 and parameters * wider + places > self.budget:
            raise RuntimeError(
                f"the budget of {self.budget} bytes does not hold the table in {other.dtype}: "
                f"{int(parameters * wider) + places} bytes do"
            )

    def _prepare_count(self) -> None:
        if self.on_bad_ids != "raise":
            self._bad_ids.prepare(self.arena.storage.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if "arena" in self._modules:
                check_assigned(self, value)
                return
            if value is not self._parameters.get("weight"):
                self._refuse_replacing()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            self._refuse_replacing()
        super().__delattr__(name)

    def _refuse_replacing(self) -> None:
        if self.arena.fused_optimizer is not None:
            raise RuntimeError(
                "weight cannot be replaced while a fused optimizer steps its rows: call the "
                "optimizer's detach() first, or write with weight.data.copy_"
            )

    def _replicate_for_data_parallel(self) -> ResizableEmbedding:
        if self.arena.fused_optimizer is not None:
            raise RuntimeError(
                "a fused optimizer steps the rows of one module, and nn.DataParallel makes copies "
                "of it: use an optimizer of torch.optim, or call the optimizer's detach() first"
            )
        replica: ResizableEmbedding = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        # What belongs to one device and one thread.
        if "arena" in self._modules:
            replica._composed = ComposedCache()
        else:
            replica.arena = Table(replica)
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bad_ids", BadIds())
        if "arena" not in self._modules:
            self.arena = Table(self)
        self._prepare_count()

    def _is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def _dense(self) -> Tensor:
        if self.chain is None:
            return self.weight.clone()
        ids = torch.arange(self.arena.num_rows, device=self.chain.device)
        return ResizableEmbedding.forward(self, ids)

    def forward(self, input: Tensor) -> Tensor:
        """Look up ids; returns ``[*input.shape, embedding_dim]``.

        Args:
            input: ids, int32 or int64, of any shape, nested too; torch's name for them.

        Raises:
            IndexError: an id out of range (on a GPU: an asynchronous device assertion), unless
                ``on_bad_ids`` names a row.
            RuntimeError: ids that are neither int32 nor int64.
        """
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.on_bad_ids != "raise":
            input = self._in_range(input, self._bad_ids)
        # Past nn.Module's own lookup of attributes, for the sake of small batches.
        arena: Any = self._modules.get("arena")
        table = arena is None
        if table and self._as_torch():
            if self.max_norm is not None and not getattr(input, "is_nested", False):
                # Before torch scales rows, which it does in front of its own check.
                check_ids(input, self.weight.shape[0])
            y = F.embedding(
                input,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
            return y if self.out_dtype is None else y.to(self.out_dtype)
        if isinstance(input, Tensor) and input.is_nested:
            return look_up_nested(input, partial(ResizableEmbedding.forward, self))
        if table:
            arena = self.arena
        options = self._options(arena.num_rows)
        # These paths find ids out of range themselves, in the same words.
        read = table or self.backend not in ("auto", "native", "torch")
        check_ids(input, arena.num_rows, read=read)
        storage: Any
        chain: Any
        if table:
            weight = self.weight
            if self.max_norm is not None:
                rows = weight.detach()
                torch.embedding_renorm_(rows, input.contiguous(), self.max_norm, self.norm_type)
            storage, chain = weight.reshape(-1), weight.new_empty(0)
        else:
            storage, chain = arena._parameters.get("storage"), self._parameters.get("chain")
            if storage is None or chain is None:
                # Computed: pruned, parametrized, or of a replica of nn.DataParallel.
                storage, chain = arena.storage, self.chain
        fused = arena.fused_optimizer
        if fused is not None and fused.deferred:
            options, fused = options._replace(by_row=True), None
        return lookup(
            input,
            storage,
            chain,
            arena.layout,
            options,
            backend=self.backend,
            begin_step=None if fused is None else partial(fused.begin_step, arena.parameter),
            cache=None if table else self._composed,
        )

    def _as_torch(self) -> bool:
        """Whether torch's own lookup does: one size, and no kernel or optimizer of ours is used."""
        if "arena" in self._modules or self.arena.fused_optimizer is not None:
            return False
        return self.backend in ("auto", "torch") or self.sparse

    def _options(self, rows: int) -> Options:
        """The options as they are set now, checked where they may have changed."""
        padding_idx = self.padding_idx
        if padding_idx is not None and not 0 <= padding_idx < rows:
            padding_idx = count_from_front(padding_idx, rows, self._padding_refused)
        if self.sparse or self.max_norm is not None:
            self._check_options(several="arena" in self._modules)
        return Options(padding_idx, self.scale_grad_by_freq, self.sparse, self.out_dtype)

    @property
    def bad_ids(self) -> int:
        """How many ids of lookups were out of range so far; reading it waits for a GPU."""
        return self._bad_ids.total()

    def _in_range(self, ids: Tensor, counter: BadIds | None = None) -> Tensor:
        """``ids`` as they are looked up: with ``on_bad_ids`` in the place of those out of range."""
        if self.on_bad_ids == "raise":
            return ids
        rows = self.arena.num_rows
        return stand_in(ids, rows, row_standing_in(self.on_bad_ids, rows), counter)

    def sizes_of(self, ids: Tensor | None = None) -> Tensor:
        """Size of every row of ``ids`` (of all rows), int64, shape of ``ids``; 0: no row."""
        if ids is not None:
            ids = self._in_range(ids)
            check_ids(ids, self.arena.num_rows)
        level = self.arena.level(ids)
        return torch.tensor([*self.sizes, 0], device=level.device)[level]

    def promote(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Enlarge the rows of ``ids`` (where ``mask``) to the next size: ``e' = W_k e + b_k``.

        An id twice is enlarged once; rows at the largest size stay as they are. On a GPU three
        kernels, and one that counts the call (with tails two that expand them), without host
        synchronisation, whatever the number of ids; capturable in a CUDA graph, see
        :meth:`reserve`. On a CPU the rows that move are found first, and room is made for just
        these.

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
        return self._hop(ids, mask, down=False)

    def demote(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shrink the rows of ``ids`` (where ``mask``) to the size below: to the nearest output.

            e' = argmin |M_k e' + c_k - y| = M_k^+ (y - c_k)        y = M_{k+1} e + c_{k+1}

        with ``y = M_k e + c_k`` the output of a row of level ``k``. Several demotions are as near
        as one solve for the last of their sizes. A row that was promoted, and neither it nor the
        hops trained since, comes back up to rounding; to the bit where the hops only pad (tails
        while they are zeros, too) and ``g`` is a power of two.

        As :meth:`promote` otherwise: an id twice shrinks once; state starts afresh, Adagrad's sums
        of the numbers that stay go along where :meth:`promote` carries them; pending gradients of
        the rows are dropped. A place for the smaller row is taken before that of the larger one is
        given back, also within ``max_elements``.

        The maps are solved for in fp64, by torch calls. On a CPU those from the sizes that rows
        leave, and kept as long as the hops have the same numbers; on a GPU all of them at every
        call, and three kernels move the rows then. By construction the host waits for none of this
        and a CUDA graph can capture it, as :meth:`promote`; no GPU has confirmed either.

        Args:
            ids: any shape, int32 or int64.
            mask: bool, shape of ``ids``; default: all.

        Returns:
            Bool, shape of ``ids``: True where the row was shrunk by this call. False: masked out,
            the padding row, of the smallest size already, or no room was left. Of replicas (see
            ``distributed``) every rank demotes what any of them demotes.

        Raises:
            IndexError, RuntimeError, ValueError: as for :meth:`promote`; nothing is changed.

        Example:
            >>> emb = ResizableEmbedding(10, sizes=(2, 4, 8), initial_size=8)
            >>> emb.demote(torch.tensor([3, 7])).tolist()
            [True, True]
            >>> emb.sizes_of(torch.tensor([3, 4])).tolist()
            [4, 8]
        """
        return self._hop(ids, mask, down=True)

    def _hop(self, ids: Tensor, mask: Tensor | None, *, down: bool) -> Tensor:
        """``promote`` or ``demote``."""
        with self._checks_on_all_ranks():
            ids = self._in_range(ids)
            check_ids(ids, self.arena.num_rows)
            if mask is not None:
                check_mask(mask, ids)
            padding_idx = self._options(self.arena.num_rows).padding_idx if down else None
            if padding_idx is not None:
                kept = ids != padding_idx
                mask = kept if mask is None else mask & kept
            if mask is not None:
                mask = mask.reshape(-1)
        arena = self.arena
        if isinstance(arena, Table):
            return torch.zeros_like(ids, dtype=torch.bool)
        backend = "torch" if self.backend == "reference" else self.backend
        flat = ids.reshape(-1)
        # Hops that keep a row's numbers, which padded ones that train need not: Adagrad's sums go
        # along.
        carries = self.init == "tails" or (self.init == "padded" and not self.chain.requires_grad)
        move = partial(
            arena.demote if down else arena.promote,
            chain=self.chain,
            carries=carries,
            backend=backend,
        )
        if self.agree is None:
            moved = move(flat, mask=mask)
        else:
            gathered = self.agree(flat if mask is None else flat[mask])
            resized = move(gathered)
            # The host's bounds of the counters differ between ranks; growth must not.
            arena.forget_counters()
            moved = torch.isin(flat, gathered[resized])
        return moved.view(ids.shape)

    @contextlib.contextmanager
    def _checks_on_all_ranks(self) -> Iterator[None]:
        """Checks of arguments: a replica that raises tells the others, which wait for its ids."""
        try:
            yield
        except Exception:
            if self.agree is not None and self.chain is not None:
                with contextlib.suppress(RuntimeError):
                    self.agree(torch.empty(0, device=self.chain.device), refused=True)
            raise

    def reserve(self, rows: int) -> None:
        """Make room so that ``rows`` more rows can be resized, in any number of calls.

        For use before a CUDA graph captures :meth:`promote` or :meth:`demote`: from then on the
        arena does not grow by itself. A row that goes up two sizes counts twice.

        Raises:
            RuntimeError: a graph is being captured.
        """
        if isinstance(self.arena, Arena):
            self.arena.reserve(rows)

    def resize(self, ids: Tensor, size: int) -> Tensor:
        """Promote or demote the rows of ``ids`` to ``size``, hop by hop; the padding row stays.

        Rows that are larger shrink first, so that others find their room. On a GPU it waits.

        Returns:
            Bool, shape of ``ids``: True where the row is of ``size`` now. False: no room was left,
            or the padding row.

        Raises:
            ValueError: ``size`` is not a candidate; nothing is changed.
            IndexError, RuntimeError: as for :meth:`forward`; nothing is changed.
        """
        with self._checks_on_all_ranks():
            target = level_of(size, self.sizes)
            ids = self._in_range(ids)
            check_ids(ids, self.arena.num_rows)
        # Of replicas every rank makes the same calls, which are collective.
        if self.agree is not None or bool((self.arena.level(ids) > target).any()):
            for _ in range(len(self.sizes) - 1 - target):
                self.demote(ids, self.arena.level(ids) > target)
        for _ in range(target):
            self.promote(ids, self.arena.level(ids) < target)
        return self.arena.level(ids) == target

    def set_budget(self, budget: int | str) -> None:
        """Cap what serving takes from now on, as the argument ``budget`` does; may move the rows.

        Raises:
            ValueError: the rows as they are take more, no such budget, or one beside
                ``max_elements``; nothing is changed.
            RuntimeError: rows are shared with other processes, or computed; nothing is changed.
        """
        itemsize = self.arena.storage.element_size()
        plain = self.arena.num_rows * self.sizes[-1] * itemsize
        found = budget_bytes(budget, plain)
        self.check_budget(found)
        if isinstance(self.arena, Arena):
            self.arena.limit_to(found - self.chain.nbytes)
        self.budget = found

    def check_budget(self, budget: int) -> None:
        """Raise as :meth:`set_budget` would for so many bytes; nothing is changed."""
        least = self.least_budget
        if budget < least:
            raise ValueError(
                f"a budget of {budget} bytes does not hold the rows as they are: {least} bytes do"
            )
        if isinstance(self.arena, Arena):
            if self.arena.budget is None and self.arena.max_elements is not None:
                raise ValueError("the table has max_elements: give it or a budget, not both")
            self.arena.pages_within(budget - self.chain.nbytes)

    @property
    def least_budget(self) -> int:
        """The smallest budget in bytes that holds the rows as they are, and the hops."""
        if not isinstance(self.arena, Arena):
            return self.weight.nbytes
        return self.arena.least_bytes() + self.chain.nbytes

    @property
    def refused(self) -> int:
        """How many rows did not move so far because no room was left; reading it waits for a GPU.

        A promotion that raises on a CPU, beyond ``max_elements``, is not counted.
        """
        return self.arena.refusals.total() if isinstance(self.arena, Arena) else 0

    def compact(self, rows: int | None = None) -> int:
        """Close the holes that moved rows left: the fewest pages that hold the rows.

        Args:
            rows: look at so many rows only, from where the last such call stopped, and keep the
                memory: a step of bounded time between two steps of training.

        Returns:
            How many rows moved.
        """
        return self.arena.compact(rows) if isinstance(self.arena, Arena) else 0

    def memory_report(self) -> MemoryReport:
        """Bytes really allocated, part by part; see :class:`MemoryReport`."""
        parts = self.arena.bytes()
        itemsize = self.arena.storage.element_size()
        chain = 0 if self.chain is None else self.chain.untyped_storage().nbytes()
        return MemoryReport(
            payload=parts.payload,
            slack=parts.slack,
            locations=parts.locations,
            chain=chain,
            optimizer=self.arena.followers.state_bytes(),
            scratch=parts.scratch,
            composed=parts.composed + (0 if self.chain is None else self._composed.bytes()),
            budget=self.budget,
            fixed=self.arena.num_rows * self.sizes[-1] * itemsize,
            rows_per_size=dict(zip(self.sizes, self.arena.count_rows(), strict=True)),
        )

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """The plain ``nn.Embedding(N, D)`` with the same outputs, for serving or export."""
        return nn.Embedding.from_pretrained(
            self._dense(),
            self._is_frozen(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    def __repr__(self) -> str:
        # One line, as of nn.Embedding, without the arena.
        return f"{self._get_name()}({self.extra_repr()})"

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        for name in self._shown:
            if (value := getattr(self, name)) != _DEFAULTS.get(name):
                text += f", {name}={value!r}"
        return text if self.chain is None else f"{text}, sizes={self.sizes}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.budget is not None and args[0].get("assign_to_params_buffers"):
            self._check_assigned_bytes(state_dict, prefix)
        if isinstance(self.arena, Arena):
            if prefix + "weight" in state_dict:
                args[-1].extend(self._take_table(self.arena, state_dict, prefix))
            # All or nothing: hops without the rows that they belong to would be another table.
            self._check_kind_of_hops(state_dict.get(prefix + "chain"), prefix)
            if not self.arena.fits(state_dict, prefix + "arena."):
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_assigned_bytes(self, state_dict: Any, prefix: str) -> None:
        """Refuse tensors that would be kept as they are, with all the memory they hold: wider
        numbers, slices of larger tensors."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        kept = [state_dict.get(prefix + name, tensor) for name, tensor in own.items()]
        memory = [tensor.untyped_storage() for tensor in kept]
        held = {part.data_ptr() or id(part): part.nbytes() for part in memory}
        if sum(held.values()) > self.budget:
            raise RuntimeError(
                f"{prefix[:-1] or 'the table'} cannot take these tensors: they hold "
                f"{sum(held.values())} bytes, the budget allows {self.budget}"
            )

    def _check_kind_of_hops(self, saved: Any, prefix: str) -> None:
        """Refuse hops of another kind at once: torch would go on and load the rows."""
        kinds = {chain_numel(self.sizes): "whole hops", tails_numel(self.sizes): "tails"}
        here = kinds.get(self.chain.numel())
        there = kinds.get(saved.numel()) if isinstance(saved, Tensor) else None
        if here and there and here != there:
            raise RuntimeError(
                f"{prefix}chain was saved as {there}, and the module has {here}: build it with the "
                "init of the module that was saved"
            )

    def _take_table(self, arena: Arena, state_dict: Any, prefix: str) -> list[str]:
        """Put rows of several sizes, all at the largest, in the place of a ``weight``, ``[N, D]``.

        Returns:
            Why that cannot be.
        """
        rows, shape = state_dict[prefix + "weight"], (arena.num_rows, arena.sizes[-1])
        if rows.shape != shape:
            return [
                f"size mismatch for {prefix}weight: copying a param with shape {rows.shape} from "
                f"checkpoint, the shape in current model is {torch.Size(shape)}."
            ]
        try:
            state = arena.state_of(rows)
        except ValueError as error:
            return [f"{prefix}weight cannot be loaded: {error}."]
        del state_dict[prefix + "weight"]
        state_dict.update({f"{prefix}arena.{name}": tensor for name, tensor in state.items()})
        if not self.chain.is_meta:
            state_dict.setdefault(prefix + "chain", self.chain.detach())  # the hops stay
        return []


_DEFAULTS = {
    **{"norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False},
    "on_bad_ids": "raise",
}
