"""What a checkpoint of sharded tables holds, and its tables on one machine.

| key | dtype | shape | meaning |
|---|---|---|---|
| ``about`` | uint8 | ``[bytes]`` | JSON: format, ranks, tables, settings of optimizers, ``extra`` |
| ``tables.T.levels`` | int8 | ``[N]`` | which of the sizes each row has |
| ``tables.T.rows`` | of the rows | ``[sum of sizes]`` | the rows, one behind the other |
| ``tables.T.chain`` | of the rows | | the hops |
| ``tables.T.optimizer.K`` | | as rows, ``[N]``, or other | state of the rows' optimizer |
| ``tables.T.growth.K`` | | ``[N]`` | what a rule of growth counts |
| ``model.P``, ``optimizer.P.K`` | | | the dense part and its optimizer's state |

Rows come in the order of positions ``p(x)``, see :mod:`~esapn_kernels.sharded.placement`, which
does not depend on the number of ranks.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..module import ResizableEmbedding
from ..storage.packed import unpack
from .placement import Placement

__all__ = ["CHANGES", "FORMAT", "WHOLE", "Checkpoint", "Served", "read", "update"]

FORMAT = "esapn_kernels.sharded 1"
WHOLE, CHANGES = "checkpoint", "changes"


class Checkpoint:
    """A folder that :func:`~esapn_kernels.sharded.save` wrote.

    Args:
        path: the folder.
        kind: what it must hold, ``WHOLE`` or ``CHANGES``.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: it is no such folder, or cannot be read.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
        try:
            metadata: Metadata = dcp.FileSystemReader(self.path).read_metadata()
        except Exception as error:
            raise self._broken(error) from None
        self.entries = metadata.state_dict_metadata
        about = self.entries.get("about")
        if not isinstance(about, TensorStorageMetadata):
            raise ValueError(f"{str(path)!r} is no checkpoint of sharded tables")
        found = {"about": torch.empty(about.size, dtype=torch.uint8)}
        self.load(found)
        try:
            self.about: dict[str, Any] = json.loads(bytes(found["about"].tolist()))
        except ValueError as error:
            raise self._broken(error) from None
        if self.about.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is of format {self.about.get('format')!r}")
        if self.about["kind"] != kind:
            raise ValueError(f"{str(path)!r} holds {self.about['kind']}, not {kind}")

    def load(self, state: dict[str, Any]) -> None:
        """Read into the tensors of ``state``, without other ranks.

        Raises:
            ValueError: one is missing or of another shape.
            RuntimeError: the files cannot be read.
        """
        for key, tensor in state.items():
            entry = self.entries.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{str(self.path)!r} holds no {key}")
            if entry.size != tensor.shape:
                raise ValueError(
                    f"{str(self.path)!r} holds {key} of shape {list(entry.size)}, here it is "
                    f"{list(tensor.shape)}"
                )
        try:
            with warnings.catch_warnings():
                # Said where there are no ranks, of which there need be none.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                dcp.load(state, storage_reader=dcp.FileSystemReader(self.path), no_dist=True)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            raise self._broken(causes[0]) from None
        except (OSError, RuntimeError, ValueError) as error:
            raise self._broken(error) from None

    def _broken(self, error: BaseException) -> RuntimeError:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return RuntimeError(f"{str(self.path)!r} cannot be read: {reason[0]}")

    def shape(self, key: str) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of an entry."""
        entry = self.entries[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.size, entry.properties.dtype


class Served(dict[str, ResizableEmbedding]):
    """The tables of a checkpoint, by name, and how many changes they took since."""

    changes = 0


def read(path: str | Path) -> Served:
    """Open the tables of a checkpoint on one machine, with no other rank and without TorchRec.

    Args:
        path: what :func:`~esapn_kernels.sharded.save` wrote.

    Returns:
        A :class:`~esapn_kernels.ResizableEmbedding` of every table, by name, on the CPU; its
        ``state_dict`` is what docs/serving.md reads in NumPy.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: there is no such checkpoint, or its files
            cannot be read.
    """
    checkpoint = Checkpoint(path, WHOLE)
    about = checkpoint.about["tables"]
    return Served({name: _table(checkpoint, name, a) for name, a in about.items()})


@torch.no_grad()
def update(tables: Served, path: str | Path) -> None:
    """Take what :func:`~esapn_kernels.sharded.save_changes` wrote, on one machine.

    Args:
        tables: what :func:`read` gave of the checkpoint that was saved where the mark was set, with
            all changes since in turn.
        path: the changes.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: there are none, they are of other tables, or
            cannot be read, or others come first; nothing is changed.
    """
    checkpoint = Checkpoint(path, CHANGES)
    about, number = checkpoint.about["tables"], checkpoint.about["number"]
    if number != tables.changes + 1:
        raise ValueError(
            f"{str(path)!r} holds changes number {number} since the mark, and the tables have "
            f"taken {tables.changes}"
        )
    if set(about) != set(tables):
        raise ValueError(f"the changes are of the tables {sorted(about)}, not {sorted(tables)}")
    found: dict[str, list[Tensor]] = {}
    for name, table in tables.items():
        here = {"num_embeddings": table.num_embeddings, "sizes": list(table.sizes)}
        here["init"] = table.init
        for what, value in here.items():
            if about[name][what] != value:
                raise ValueError(
                    f"changes of table {name!r} are with {what} {about[name][what]}, not {value}"
                )
        keys = [f"tables.{name}.{key}" for key in ("ids", "levels", "rows", "chain")]
        # What holds nothing is not written.
        state = {
            key: torch.empty(checkpoint.shape(key)[0], dtype=checkpoint.shape(key)[1])
            for key in keys
            if key in checkpoint.entries
        }
        checkpoint.load(state)
        found[name] = [state.get(key, torch.empty(0, dtype=torch.int64)) for key in keys]
    for name, (ids, levels, packed, chain) in found.items():
        table, arena = tables[name], cast(Any, tables[name].arena)
        for level, size in enumerate(table.sizes):
            table.resize(ids[levels == level].to(arena.storage.device), size)
        unpack(arena, packed, arena.storage.data, ids.to(arena.storage.device))
        table.chain.data.copy_(chain)
    tables.changes = number


@torch.no_grad()
def _table(checkpoint: Checkpoint, name: str, about: dict[str, Any]) -> ResizableEmbedding:
    rows, place = about["num_embeddings"], Placement(about["num_embeddings"], 1, name)
    prefix = f"tables.{name}"
    numel, dtype = checkpoint.shape(f"{prefix}.rows")
    state: dict[str, Tensor] = {
        f"{prefix}.levels": torch.empty(rows, dtype=torch.int8),
        f"{prefix}.rows": torch.empty(numel, dtype=dtype),
        f"{prefix}.chain": torch.empty(checkpoint.shape(f"{prefix}.chain")[0], dtype=dtype),
    }
    checkpoint.load(state)
    levels, packed, chain = state.values()
    table = ResizableEmbedding(
        rows,
        sizes=about["sizes"],
        init=about["init"],
        init_std=0.0,
        dtype=dtype,
        out_dtype=torch.float32 if dtype.itemsize < 4 else None,
    )
    arena: Any = table.arena
    # In the order in which the packed rows come.
    ids = place.ids(torch.arange(rows))
    level = torch.empty(rows, dtype=torch.int64)
    level[ids] = levels.long()
    arena.load_state_dict(arena.state_at(level))
    unpack(arena, packed, arena.storage.data, ids)
    table.chain.data.copy_(chain)
    return table
