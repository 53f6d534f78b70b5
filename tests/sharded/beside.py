"""A model with sharded tables, and the same in one process: its tables are whole."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.sharded import RaggedBagSharder, RaggedSharder, ragged_plan, read, save, tables

SIZES = {"t": (2, 4, 8), "u": (2, 8), "v": (2, 4, 8), "w": (2, 4)}
ROWS = {"t": 103, "u": 60, "v": 37, "w": 50}
TABLE_OF = {"f": "t", "g": "u", "h": "u", "p": "v", "q": "w", "r": "v"}
BAGS = ("p", "q", "r")
OPTIMIZERS: dict[str, Callable[[ResizableEmbedding], Any]] = {
    "sgd": partial(optim.SGD, lr=0.1),
    "adagrad": partial(optim.Adagrad, lr=0.1),
    "adagrad by row": partial(optim.Adagrad, lr=0.1, rowwise=True),
    "adam": partial(optim.Adam, lr=0.01),
    "adam by row": partial(optim.Adam, lr=0.01, rowwise=True),
    "adamw": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "clipped": partial(optim.Adagrad, lr=0.1, weight_decay=0.01, clip_row_norm=0.05),
}


class Model(nn.Module):
    """Two tables that three features look up one by one, and two of bags, of other widths."""

    def __init__(self, weighted: bool = False, mean: bool = True) -> None:
        super().__init__()
        self.each = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    num_embeddings=ROWS[name],
                    embedding_dim=8,
                    name=name,
                    feature_names=[f for f, table in TABLE_OF.items() if table == name],
                )
                for name in ("t", "u")
            ],
            device=torch.device("meta"),
        )
        poolings = {"v": PoolingType.SUM, "w": PoolingType.MEAN if mean else PoolingType.SUM}
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    num_embeddings=ROWS[name],
                    embedding_dim=SIZES[name][-1],
                    name=name,
                    feature_names=[f for f, table in TABLE_OF.items() if table == name],
                    pooling=pooling,
                )
                for name, pooling in poolings.items()
            ],
            device=torch.device("meta"),
            is_weighted=weighted,
        )
        self.one, self.all = nn.Linear(8, 1), nn.Linear(8 + 4 + 8, 1)

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        each, bags = self.each(features), self.bags(features)
        of_each = self.one(torch.cat([each[f].values() for f in ("f", "g", "h")]))
        out = torch.cat([of_each, self.all(torch.cat([bags[f] for f in BAGS], dim=1))])[:, 0]
        return out.square().sum() / 16, out


class Whole(nn.Module):
    """The same with whole tables, on the batches of all ranks."""

    def __init__(self, model: Model, whole: dict[str, ResizableEmbedding]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(whole)
        self.one, self.all = copy.deepcopy(model.one), copy.deepcopy(model.all)
        self.poolings = {c.name: c.pooling for c in model.bags.embedding_bag_configs()}
        self.weighted = model.bags.is_weighted()

    def forward(self, batches: Sequence[KeyedJaggedTensor]) -> list[Tensor]:
        found: list[dict[str, Tensor]] = [{} for _ in batches]
        split = [
            one.to_dict() if one.stride() else dict.fromkeys(TABLE_OF, _NONE) for one in batches
        ]
        for name, table in self.tables.items():
            features = [f for f, of in TABLE_OF.items() if of == name]
            parts = [(r, f, one[f]) for r, one in enumerate(split) for f in features]
            counts = [jagged.values().numel() for _, _, jagged in parts]
            rows = table(torch.cat([jagged.values() for _, _, jagged in parts])).split(counts)
            for (rank, f, jagged), y in zip(parts, rows, strict=True):
                found[rank][f] = self._pool(name, jagged, y) if f in BAGS else y
        outputs = []
        for y in found:
            of_each = self.one(torch.cat([y[f] for f in ("f", "g", "h")]))
            of_all = self.all(torch.cat([y[f] for f in BAGS], dim=1))
            outputs.append(torch.cat([of_each, of_all])[:, 0])
        return outputs

    def _pool(self, name: str, jagged: Any, rows: Tensor) -> Tensor:
        lengths = jagged.lengths().long()
        line = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        if self.weighted:
            rows = rows * jagged.weights()[:, None]
        pooled = torch.zeros(len(lengths), rows.shape[1]).index_add(0, line, rows)
        if self.poolings[name] is PoolingType.MEAN:
            pooled = pooled / lengths.clamp(min=1)[:, None]
        return pooled


_NONE = JaggedTensor(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0).int())
"""A feature of a batch without lines, which TorchRec does not split."""


def batch(seed: int, lines: int, weighted: bool = False) -> KeyedJaggedTensor:
    """Lines with up to three ids a feature, small ids far more often than others."""
    g = torch.Generator().manual_seed(seed)
    lengths, values = [], []
    for table in TABLE_OF.values():
        lengths.append(torch.randint(0, 4, (lines,), generator=g))
        values.append((torch.rand(int(lengths[-1].sum()), generator=g) ** 3 * ROWS[table]).long())
    weights = torch.rand(sum(map(len, values)), generator=g) if weighted else None
    return KeyedJaggedTensor(
        list(TABLE_OF), torch.cat(values), weights, lengths=torch.cat(lengths), stride=lines
    )


def lines_of(step: int, rank: int, world: int) -> int:
    """Lines of a rank's batch: other numbers on every rank, and now and then none."""
    return 0 if (step + rank) % world == world - 1 and step % 2 else 5 + rank


def batches(step: int, world: int, weighted: bool = False) -> list[KeyedJaggedTensor]:
    """A batch of every rank."""
    return [batch(97 * step + r, lines_of(step, r, world), weighted) for r in range(world)]


class Pair:
    """A sharded model and the same in one process, each with the optimizer of its dense part."""

    def __init__(
        self,
        optimizer: str = "adagrad",
        *,
        plan: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **sharder: Any,
    ) -> None:
        torch.manual_seed(0)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.plain = Model(**(model or {}))
        dense = copy.deepcopy(self.plain)
        make = OPTIMIZERS[optimizer]
        sharders = [RaggedSharder(make, **sharder), RaggedBagSharder(make, **sharder)]
        self.model = DistributedModelParallel(
            self.plain,
            device=torch.device("cpu"),
            plan=ragged_plan(self.plain, **{"sizes": SIZES, **(plan or {})}),
            sharders=sharders,
        )
        self.tables = tables(self.model)
        self.dense = dense_optimizer(self.model)
        self.whole = Whole(dense, whole_tables(self.model))
        self.steps = {name: make(table) for name, table in self.whole.tables.items()}
        rows = {id(table.arena.storage) for table in self.whole.tables.values()}
        parameters = [p for p in self.whole.parameters() if id(p) not in rows]
        self.whole_dense = torch.optim.Adagrad(parameters, lr=0.05)

    def step(self, data: Sequence[KeyedJaggedTensor]) -> tuple[Tensor, list[Tensor]]:
        """Both take a step; outputs of this rank, and of all."""
        loss, out = self.model(data[self.rank])
        self.dense.zero_grad()
        loss.backward()
        self.dense.step()
        return out.detach(), self.step_whole(data)

    def step_whole(self, data: Sequence[KeyedJaggedTensor]) -> list[Tensor]:
        outputs = self.whole(data)
        self.whole_dense.zero_grad()
        (sum(out.square().sum() / 16 for out in outputs) / self.world).backward()
        self.whole_dense.step()
        return [out.detach() for out in outputs]

    def check_tables(self, rtol: float = 1e-5, atol: float = 1e-5) -> None:
        """Sizes, rows and hops are those of the whole tables; hops are alike to the bit."""
        for name, found in whole_tables(self.model).items():
            expected = self.whole.tables[name]
            torch.testing.assert_close(found.sizes_of(), expected.sizes_of(), rtol=0, atol=0)
            torch.testing.assert_close(found.weight, expected.weight, rtol=rtol, atol=atol)
            hops = self.tables[name].rows.chain.detach()
            torch.testing.assert_close(hops, expected.chain.detach(), rtol=rtol, atol=atol)
            every = [torch.empty_like(hops) for _ in range(self.world)]
            dist.all_gather(every, hops)
            assert all(torch.equal(other, hops) for other in every)


def dense_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Of the dense part and the hops."""
    named = dict(in_backward_optimizer_filter(model.named_parameters()))
    return torch.optim.Adagrad(named.values(), lr=0.05)


def whole_tables(model: nn.Module) -> dict[str, ResizableEmbedding]:
    """The tables of a sharded model, whole, by way of a checkpoint."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    save(model, Path(folder[0]) / "saved")
    return read(Path(folder[0]) / "saved")
