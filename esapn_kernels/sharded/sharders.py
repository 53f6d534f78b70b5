"""What ``DistributedModelParallel`` is given to shard collections by rows of their own sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from ..module import ResizableEmbedding
from ..optim import FusedOptimizer
from .plan import RaggedSharding
from .shards import RaggedCollection

__all__ = ["RaggedBagSharder", "RaggedSharder"]


class _Sharding:
    """What both sharders take; see :class:`RaggedSharder`."""

    def __init__(
        self,
        optimizer: Callable[[ResizableEmbedding], FusedOptimizer],
        *,
        dedup: bool = True,
        comm: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        if not callable(optimizer):
            raise TypeError(
                "optimizer must be what gives a table its optimizer, as partial(optim.Adagrad, "
                f"lr=0.05), got {type(optimizer).__name__}"
            )
        if comm not in _COMMS:
            raise ValueError(f"comm must be torch.float32 or torch.bfloat16, got {comm}")
        unknown = set(options) - _OPTIONS
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}: known are {sorted(_OPTIONS)}")
        super().__init__()
        self._optimizer, self._dedup, self._comm = optimizer, dedup, comm
        self._options = options

    def shard(
        self,
        module: nn.Module,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> nn.Module:
        """The sharded module that takes the place of ``module``; TorchRec's own by other plans."""
        if not any(isinstance(sharding, RaggedSharding) for sharding in params.values()):
            return super().shard(module, params, env, device, module_fqn)  # type: ignore[misc]
        device = torch.device("cpu") if device is None else torch.device(device)
        codecs: dict[str, Any] = {}
        if self._comm is not torch.float32:
            config = QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16)
            codecs = get_qcomm_codecs_registry(config, device=device)
        return RaggedCollection(
            module, params, env, device, self._optimizer, self._options, codecs, self._dedup
        )


_COMMS = (torch.float32, torch.bfloat16)
_OPTIONS = {"init", "init_std", "backend"}


class RaggedSharder(_Sharding, EmbeddingCollectionSharder):
    """Shards an ``EmbeddingCollection`` of TorchRec by rows that have sizes of their own.

    Args:
        optimizer: gives a table its optimizer, one of :mod:`esapn_kernels.optim`: the owner of a
            row steps it in backward. The hops are parameters of the model as any other, equal on
            all ranks, for the optimizer of the dense part.
        dedup: a table's ids travel once a batch and rank, whatever their number.
        comm: dtype of outputs and their gradients between ranks, fp32 or bf16.
        options: ``init``, ``init_std``, ``backend``, as of
            :class:`~esapn_kernels.ResizableEmbedding`.

    Raises:
        TypeError, ValueError: options that are none.

    Example::

        sharder = RaggedSharder(partial(optim.Adagrad, lr=0.05), comm=torch.bfloat16)
        plan = ragged_plan(model, max_bytes_per_rank="2 GB")
        model = DistributedModelParallel(model, plan=plan, sharders=[sharder], device=device)
    """


class RaggedBagSharder(_Sharding, EmbeddingBagCollectionSharder):
    """Shards an ``EmbeddingBagCollection``, sums and means, weighted or not.

    Args:
        optimizer, dedup, comm, options: as of :class:`RaggedSharder`.
    """
