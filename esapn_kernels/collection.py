"""``ResizableEmbeddingCollection``: several tables in one arena, looked up in one launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bad_ids import BadIds, row_standing_in, stand_in
from .module import ResizableEmbedding
from .ops.checks import check_ids
from .ops.memory import MemoryReport

__all__ = ["Jagged", "ResizableEmbeddingCollection"]


class Jagged(NamedTuple):
    """One feature of a batch of lists: ``values [sum of lengths, D]``, ``lengths [B]``."""

    values: Tensor
    lengths: Tensor


class ResizableEmbeddingCollection(nn.Module):
    """Tables that share an arena, the hops and every lookup.

        y_f(x) = y(first row of f's table + x)        y as in :class:`ResizableEmbedding`

    The ids of all features of a batch are one lookup. The tables have the same sizes and share the
    hops ``W, b``; tables that should learn hops of their own are modules of their own.

    Args:
        tables: name of every table and its number of rows.
        features: name of every feature and of the table it looks up; two may share one. Default:
            every table is a feature of its name.
        on_bad_ids: as of :class:`ResizableEmbedding`; in each table the row of that number stands
            in for the ids that are out of its range.
        options: what :class:`ResizableEmbedding` takes after ``num_embeddings``, but for
            ``padding_idx``, ``_weight`` and tensors as ``initial_size``.

    Raises:
        ValueError: no table, a feature of an unknown one, or ``on_bad_ids`` that is neither
            ``raise`` nor a row of every table.
        TypeError: ``padding_idx`` or ``_weight``, which belong to one table.
        RuntimeError: a negative number of rows.

    Attributes:
        rows: the :class:`ResizableEmbedding` of all tables, one below the other.

    Example:
        >>> tables = ResizableEmbeddingCollection({"user": 100, "item": 50}, sizes=(2, 4))
        >>> out = tables({"user": torch.tensor([7, 99]), "item": torch.tensor([[3], [0]])})
        >>> {name: tuple(y.shape) for name, y in out.items()}
        {'user': (2, 4), 'item': (2, 1, 4)}
        >>> tables.promote({"item": torch.tensor([3])})
        {'item': tensor([True])}
    """

    on_bad_ids: str | int = "raise"  # also of collections that were pickled without it

    def __init__(
        self,
        tables: Mapping[str, int],
        *,
        features: Mapping[str, str] | None = None,
        on_bad_ids: str | int = "raise",
        **options: Any,
    ) -> None:
        super().__init__()
        if not tables:
            raise ValueError("a collection needs a table")
        for name in ("padding_idx", "_weight"):
            if options.get(name) is not None:
                raise TypeError(f"{name} belongs to one table: use a ResizableEmbedding for it")
        self.tables = dict(tables)
        self.features = dict(features) if features is not None else {name: name for name in tables}
        for feature, table in self.features.items():
            if table not in self.tables:
                raise ValueError(
                    f"feature {feature!r} looks up table {table!r}, which is none of "
                    f"{list(self.tables)}"
                )
        self.on_bad_ids = on_bad_ids
        self._bad_ids = {name: BadIds() for name in self.tables}
        self._first: dict[str, int] = {}
        total = 0
        for name, rows in self.tables.items():
            if rows < 0:
                raise RuntimeError(
                    f"Trying to create tensor with negative dimension {rows}: table {name!r}"
                )
            if on_bad_ids != "raise":
                row_standing_in(on_bad_ids, rows)
            self._first[name] = total
            total += rows
        self.rows = ResizableEmbedding(total, **options)
        self.embedding_dim = self.rows.embedding_dim
        self.sizes = self.rows.sizes
        self._prepare_counts()

    def _prepare_counts(self) -> None:
        if self.on_bad_ids != "raise":
            for counter in self._bad_ids.values():
                counter.prepare(self.rows.arena.storage.device)

    def _apply(self, *args: Any, **options: Any) -> ResizableEmbeddingCollection:
        super()._apply(*args, **options)
        self._prepare_counts()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bad_ids", {name: BadIds() for name in self.tables})
        self._prepare_counts()

    @property
    def bad_ids(self) -> dict[str, int]:
        """Of every table, how many ids of lookups were out of range so far; waits for a GPU."""
        return {name: counter.total() for name, counter in self._bad_ids.items()}

    def _check(self, feature: str, ids: Tensor) -> None:
        if feature not in self.features:
            raise KeyError(f"unknown feature {feature!r}: known are {list(self.features)}")
        check_ids(ids, 0, read=False)

    def _row_ids(self, feature: str, ids: Tensor, counts: bool) -> Tensor:
        """Rows of the whole for a feature's ``ids``; out of range for ids out of its table."""
        table = self.features[feature]
        rows, first = self.tables[table], self._first[table]
        ids = ids.long()
        if self.on_bad_ids != "raise":
            row = row_standing_in(self.on_bad_ids, rows)
            return stand_in(ids, rows, row, self._bad_ids[table] if counts else None, table) + first
        if not rows and ids.numel():
            raise IndexError("index out of range in self")
        outside = (ids < 0) | (ids >= rows)
        # Not read here, which would wait for a GPU: the lookup itself refuses them.
        return torch.where(outside, self.rows.arena.num_rows, ids + first)

    def _together(self, ids: Mapping[str, Tensor], counts: bool = False) -> Tensor:
        for feature, part in ids.items():
            self._check(feature, part)
        parts = [self._row_ids(feature, part, counts).reshape(-1) for feature, part in ids.items()]
        device = self.rows.arena.storage.device
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)

    @staticmethod
    def _apart(whole: Tensor, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = whole.split([part.numel() for part in ids.values()])
        return {
            feature: part.view((*like.shape, *whole.shape[1:]))
            for (feature, like), part in zip(ids.items(), parts, strict=True)
        }

    def forward(self, ids: Any) -> dict[str, Any]:
        """Look up every feature given.

        Args:
            ids: feature -> ids of any shape, int32 or int64. Or an object with ``keys()``,
                ``values()`` and ``lengths()`` in the layout of TorchRec's ``KeyedJaggedTensor``:
                ids of all keys one behind the other, and for each key in turn a length per line.

        Returns:
            feature -> ``[*ids.shape, D]``; for the latter, feature -> :class:`Jagged`.

        Raises:
            KeyError: an unknown feature.
            IndexError: an id out of its own table (on a GPU: an asynchronous device assertion),
                unless ``on_bad_ids`` names a row.
            TypeError: neither of the two.
        """
        if isinstance(ids, Mapping):
            return self._apart(self.rows(self._together(ids, counts=True)), ids)
        keys, values, lengths = _keyed_jagged(ids)
        parts = dict(zip(keys, values, strict=True))
        found = self._apart(self.rows(self._together(parts, counts=True)), parts)
        return {key: Jagged(found[key], n) for key, n in zip(keys, lengths, strict=True)}

    def promote(
        self, ids: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """:meth:`ResizableEmbedding.promote` of rows of several tables at once.

        Args:
            ids: feature -> ids of any shape.
            masks: feature -> bool, shape of its ids, for the features to be masked.
        """
        return self._hop(self.rows.promote, ids, masks)

    def demote(
        self, ids: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """:meth:`ResizableEmbedding.demote`; as :meth:`promote`."""
        return self._hop(self.rows.demote, ids, masks)

    def _hop(
        self,
        move: Callable[..., Tensor],
        ids: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        whole = self._checked(ids)
        masks = {} if masks is None else masks
        unknown = [feature for feature in masks if feature not in ids]
        if unknown:
            raise KeyError(f"masks of features without ids: {unknown}")
        if not masks:
            return self._apart(move(whole), ids)
        parts = []
        for feature, part in ids.items():
            mask = masks.get(feature)
            if mask is None:
                mask = torch.ones_like(part, dtype=torch.bool)
            if mask.shape != part.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask of {feature!r} must be bool of shape {list(part.shape)}, "
                    f"got {mask.dtype} of shape {list(mask.shape)}"
                )
            parts.append(mask.reshape(-1))
        return self._apart(move(whole, torch.cat(parts)), ids)

    def resize(self, ids: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
        """:meth:`ResizableEmbedding.resize` of rows of several tables at once."""
        return self._apart(self.rows.resize(self._checked(ids), size), ids)

    def sizes_of(self, ids: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Sizes of the rows of ``ids``, by feature; of all rows, by table."""
        if ids is not None:
            return self._apart(self.rows.sizes_of(self._checked(ids)), ids)
        parts = self.rows.sizes_of().split(list(self.tables.values()))
        return dict(zip(self.tables, parts, strict=True))

    def _checked(self, ids: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(ids, Mapping):
            raise TypeError(f"ids must be a mapping of feature to ids, got {type(ids).__name__}")
        return self._together(ids)

    def memory_report(self) -> MemoryReport:
        """Bytes of all tables, see :class:`MemoryReport`."""
        return self.rows.memory_report()

    def to_embeddings(self) -> nn.ModuleDict:
        """A plain ``nn.Embedding`` per table, with the same outputs."""
        whole = self.rows.to_embedding().weight
        parts, freeze = whole.detach().split(list(self.tables.values())), not whole.requires_grad
        return nn.ModuleDict(
            {
                name: nn.Embedding.from_pretrained(part.clone(), freeze)
                for name, part in zip(self.tables, parts, strict=True)
            }
        )

    def extra_repr(self) -> str:
        shared = {f: t for f, t in self.features.items() if f != t}
        text = f"{self.tables}" + (f", features={shared}" if shared else "")
        return text if self.on_bad_ids == "raise" else f"{text}, on_bad_ids={self.on_bad_ids!r}"


def _keyed_jagged(batch: Any) -> tuple[Sequence[str], Sequence[Tensor], Sequence[Tensor]]:
    """Keys of a ``KeyedJaggedTensor``-like object, and of each its ids and its lengths."""
    if not all(callable(getattr(batch, name, None)) for name in ("keys", "values", "lengths")):
        raise TypeError(
            "ids must be a mapping of feature to ids, or have keys(), values() and lengths(); "
            f"got {type(batch).__name__}"
        )
    keys, values, lengths = list(batch.keys()), batch.values(), batch.lengths()
    lengths = lengths.view(len(keys), lengths.numel() // max(len(keys), 1))
    if callable(getattr(batch, "length_per_key", None)):
        counts = batch.length_per_key()
    else:
        counts = lengths.sum(1).tolist()
    return keys, values.split(counts), list(lengths)
