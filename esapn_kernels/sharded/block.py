"""A rank's block of a tensor that all ranks hold together, for ``torch.distributed.checkpoint``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..ops.layout import chunks

__all__ = ["Block"]

_NUMBERS = 1 << 24
"""In a chunk of a file."""


class Block(Tensor):
    """``local`` is ``[first, first + n)`` of a tensor ``[total]``; ranks may cut it anywhere.

    What ``torch.distributed.checkpoint`` asks of a tensor, by its protocol of such tensors; there
    is nothing else to do with one. A ``DTensor`` would be cut evenly, in the middle of a row.
    """

    local: Tensor
    first: int
    total: int

    @staticmethod
    def __new__(cls, local: Tensor, first: int, total: int) -> Block:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, torch.Size([total]), dtype=local.dtype, device=local.device
        )

    def __init__(self, local: Tensor, first: int, total: int) -> None:
        self.local, self.first, self.total = local, first, total

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(
            "rows of a sharded table are saved by esapn_kernels.sharded.save, or by "
            "torch.distributed.checkpoint"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Block({self.first} to {self.first + len(self.local)} of {self.total})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError(
            "rows of a sharded table are saved by esapn_kernels.sharded.save, or by "
            "torch.distributed.checkpoint"
        )

    def _chunks(self) -> list[ChunkStorageMetadata]:
        """Some numbers each: who reads a part of a chunk reads all of it."""
        return [
            ChunkStorageMetadata(
                torch.Size([self.first + part.start]), torch.Size([part.stop - part.start])
            )
            for part in chunks(len(self.local), _NUMBERS)
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self.local),
                    size=torch.Size([self.total]),
                ),
            )
            for chunk in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        begin = index.offset[0] - self.first
        return self.local[begin : begin + _NUMBERS]
