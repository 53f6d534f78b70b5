"""``ResizableEmbeddingBag``: sums and means over bags of ragged rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .inputs import as_leaf
from .module import ResizableEmbedding

__all__ = ["ResizableEmbeddingBag"]


class ResizableEmbeddingBag(ResizableEmbedding, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` whose rows have their own sizes and grow.

        z_b = sum_{i in bag b} w_i y(x_i)        mode sum; mean divides by the number of ids

    with ``y`` as in :class:`ResizableEmbedding`, whose other methods it has. All bags are one
    lookup; the rows are then reduced by torch's own operator, with its checks. With one size it
    *is* ``nn.EmbeddingBag``.

    Args:
        num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            padding_idx, device, dtype: as for :class:`ResizableEmbedding`.
        mode: ``sum`` | ``mean`` | ``max``.
        include_last_offset: ``offsets`` ends with the number of ids.
        options: the keyword-only arguments of :class:`ResizableEmbedding`.

    Raises:
        ValueError: an unknown mode; what :class:`ResizableEmbedding` raises.

    Notes:
        Entries of ``padding_idx`` are left out, of the count of a mean too; so are ids out of range
        where ``on_bad_ids`` names that row. With several sizes
        ``scale_grad_by_freq`` divides by the id's own count, as ``nn.Embedding`` does.

    Example:
        >>> bag = ResizableEmbeddingBag(10, sizes=(2, 4), mode="sum")
        >>> bag(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 3])).shape
        torch.Size([2, 4])
    """

    _padding_refused = "padding_idx must be within num_embeddings"
    _shown = (
        *("max_norm", "norm_type", "scale_grad_by_freq", "mode", "padding_idx"),
        *("on_bad_ids", "budget"),
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        _freeze: bool = False,
        **options: Any,
    ) -> None:
        if mode not in ("sum", "mean", "max"):
            raise ValueError("mode has to be one of sum, mean or max")
        if mode == "max" and scale_grad_by_freq:
            raise ValueError("max mode does not support scaling the gradient by the frequency")
        if mode == "max" and sparse:
            raise ValueError("max mode does not support sparse weights")
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device=device,
            dtype=dtype,
            **options,
        )
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Reduce bags of rows to ``[number of bags, embedding_dim]``; an empty bag gives zeros.

        Args:
            input: int32 or int64; ``[B, L]``, a bag per line, or ``[n]`` with ``offsets``.
            offsets: where every bag begins, of the dtype of ``input``, from 0 on.
            per_sample_weights: ``w``, shape of ``input``, in mode ``sum``; gradient flows.

        Raises:
            ValueError, RuntimeError, TypeError: as ``nn.EmbeddingBag``, ids out of range too.
        """
        if isinstance(input, fx.Proxy):
            return as_leaf(self, input, offsets, per_sample_weights)
        if self.out_dtype is None and self._as_torch():
            input = self._in_range(input, self._bad_ids)
            return F.embedding_bag(
                input,
                self.weight,
                offsets,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.mode,
                self.sparse,
                per_sample_weights,
                self.include_last_offset,
                self.padding_idx,
            )
        refused: Exception | None = None
        try:
            ids = input.reshape(-1)
            rows = ResizableEmbedding.forward(self, ids)
        except (AttributeError, IndexError, RuntimeError) as error:
            refused = error
        if refused is not None:
            # In the words that torch has for it, of a table with as many rows.
            table = self.arena.storage.detach().new_zeros(1, 1).expand(self.num_embeddings, 1)
            self._reduce(input, table, offsets, per_sample_weights, self.padding_idx)
            raise refused
        where = torch.arange(rows.shape[0], device=rows.device, dtype=input.dtype)
        padding = None
        if self.padding_idx is not None:
            # All padding becomes one more row, which torch passes over.
            padding = rows.shape[0]
            ids = self._in_range(ids)
            where = where.masked_fill(ids == self.padding_idx, padding)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        where = where.view(input.shape)
        return self._reduce(where, rows, offsets, per_sample_weights, padding)

    def _reduce(
        self,
        where: Tensor,
        rows: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        padding_idx: int | None,
    ) -> Tensor:
        return F.embedding_bag(
            where,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding_idx,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        sizes: Sequence[int] | None = None,
        **options: Any,
    ) -> ResizableEmbeddingBag:
        """As :meth:`ResizableEmbedding.from_pretrained`, in ``nn.EmbeddingBag``'s order."""
        if embeddings.dim() != 2:
            raise AssertionError("Embeddings parameter is expected to be 2-dimensional")
        rows, dim = embeddings.shape
        return cls(
            rows,
            dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            embeddings.detach(),
            include_last_offset,
            padding_idx,
            _freeze=freeze,
            sizes=(dim,) if sizes is None else sizes,
            **options,
        )

    @classmethod
    def from_embedding(  # type: ignore[override]
        cls, embedding: nn.EmbeddingBag, *, sizes: Sequence[int] | None = None, **options: Any
    ) -> ResizableEmbeddingBag:
        """The same table as an ``nn.EmbeddingBag``, with its options."""
        return cls.from_pretrained(
            embedding.weight,
            not embedding.weight.requires_grad,
            embedding.max_norm,
            embedding.norm_type,
            embedding.scale_grad_by_freq,
            embedding.mode,
            embedding.sparse,
            embedding.include_last_offset,
            embedding.padding_idx,
            sizes=sizes,
            **options,
        )

    @torch.no_grad()
    def to_embedding(self) -> nn.EmbeddingBag:  # type: ignore[override]
        """The plain ``nn.EmbeddingBag(N, D)`` with the same outputs."""
        return nn.EmbeddingBag.from_pretrained(
            self._dense(),
            self._is_frozen(),
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            self.include_last_offset,
            self.padding_idx,
        )
