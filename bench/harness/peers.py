"""fbgemm's table on a CPU: bags of one id, every row 128 wide, the optimizer inside backward."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .providers import Fixed, TableSpec
from .roof import DIM, sparse_step_bytes
from .updates import EPS, ROW_LR, TIMED_LR, Step

_RULES = {"sgd": "EXACT_SGD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}
_TRAINING = "fbgemm_gpu.split_table_batched_embeddings_ops_training"
_CONFIGS = "fbgemm_gpu.split_embedding_configs"


def fbgemm_error() -> str | None:
    """Why fbgemm cannot be imported; ``None`` where it can."""
    try:
        import_module(_TRAINING)
    except (ImportError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return None


class _Rows:
    """The rows where the gate looks for those of ``nn.Embedding``."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class Fbgemm(Fixed):
    """``SplitTableBatchedEmbeddingBagsCodegen`` with ``rule``; rows as of ``nn.Embedding``."""

    name = "fbgemm"

    def __init__(self, table: TableSpec, rule: str = "sgd") -> None:
        training, configs = import_module(_TRAINING), import_module(_CONFIGS)
        place = training.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        self.bags: Any = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(len(table), DIM, *place)],
            optimizer=configs.EmbOptimType[_RULES[rule]],
            learning_rate=ROW_LR,
            eps=EPS,
        )
        weight: Tensor = self.bags.split_embedding_weights()[0]
        torch.nn.init.normal_(weight)
        self.module: Any = _Rows(weight)
        self.parameters = [weight]
        self.grad_elements = weight.numel()
        self.table_bytes = weight.nbytes
        self._offsets: dict[int, Tensor] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        count = ids.numel()
        if count not in self._offsets:
            self._offsets[count] = torch.arange(count + 1)
        out: Tensor = self.bags(ids, self._offsets[count])
        return out


class FbgemmStep(Step):
    """Forward and backward, which steps the rows."""

    def __init__(self, table: TableSpec, rule: str) -> None:
        self.bags = Fbgemm(table, rule)
        super().__init__("fbgemm", self.bags, [], partial(sparse_step_bytes, rule=rule))

    def settle(self) -> None:
        self.bags.bags.set_learning_rate(TIMED_LR)
