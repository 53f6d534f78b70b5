"""Which tables of a model are sharded by rows of their own sizes, and what a rank may hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ..module import ResizableEmbedding
from ..share import shares
from .placement import Placement

__all__ = ["RaggedSharding", "ragged_plan"]


@dataclass
class RaggedSharding(ParameterSharding):
    """How a table is sharded: what TorchRec's plans say, the rows' sizes, and a rank's bytes."""

    sizes: tuple[int, ...] | None = None
    initial_size: int | None = None
    budget: int | None = None

    def make(self, config: BaseEmbeddingConfig, rows: int, **options: Any) -> ResizableEmbedding:
        """So many rows of the table, one at least, for a rank has memory for each of its tables."""
        dtype = data_type_to_dtype(config.data_type)
        return ResizableEmbedding(
            max(rows, 1),
            config.embedding_dim,
            dtype=dtype,
            out_dtype=torch.float32 if dtype.itemsize < 4 else None,
            sizes=self.sizes,
            initial_size=self.initial_size,
            budget=self.budget,
            **options,
        )


def ragged_plan(
    model: nn.Module,
    max_bytes_per_rank: int | str | None = None,
    *,
    sizes: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    initial_size: int | None = None,
    modules: Collection[str] | None = None,
    world: int | None = None,
    device: str | torch.device = "cpu",
) -> ShardingPlan:
    """Shard all tables of ``model`` by rows that have sizes of their own, evenly over all ranks.

    Args:
        model: holds ``EmbeddingCollection`` or ``EmbeddingBagCollection`` modules of TorchRec,
            best on the meta device, for these never need memory.
        max_bytes_per_rank: what the rows, their locations and the hops of all tables take at most
            on any rank: bytes, a text as ``"2 GB"``, or ``"25%"`` of a rank's part of the plain
            tables. The tables share it as :func:`~esapn_kernels.share.share_budget` says. State
            of optimizers is beside it. Default: no limit, and no room for rows to grow by
            themselves.
        sizes: candidate sizes of all tables, or of each by its name; the largest is its
            ``embedding_dim``. Default: as of :class:`~esapn_kernels.ResizableEmbedding`.
        initial_size: of all rows; default: the smallest.
        modules: names of the collections in ``model`` that are sharded so; default: all. The others
            take plans of TorchRec's.
        world: number of ranks; default: those of the default process group.
        device: ``"cpu"`` or ``"cuda"``, where the tables will be.

    Returns:
        A plan for ``DistributedModelParallel(plan=...)``; other modules' plans may be added to its
        ``plan``.

    Raises:
        ValueError: the model holds no such collection, or none of a name; two tables of one name,
            or one of a kind that cannot be sharded so; sizes that do not fit a table; fewer bytes
            than the rows take at their first sizes, which names how many they do.

    Example:
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> config = EmbeddingConfig(num_embeddings=1000, embedding_dim=16, name="item",
        ...                          feature_names=["item"])
        >>> model = nn.Sequential(EmbeddingCollection(tables=[config], device="meta"))
        >>> plan = ragged_plan(model, "50%", world=2)
        >>> plan.plan["0"]["item"].budget
        16000
    """
    world = dist.get_world_size() if world is None else world
    kind = torch.device(device).type
    found = {n: m for n, m in model.named_modules() if type(m) in (_SEQUENCE, _BAGS)}
    if modules is not None:
        if unknown := set(modules) - set(found):
            raise ValueError(f"no collections are named {sorted(unknown)}: known are {list(found)}")
        found = {name: found[name] for name in modules}
    configs = {path: table_configs(module) for path, module in found.items()}
    names = [config.name for tables in configs.values() for config in tables]
    if not names:
        raise ValueError(
            "the model holds no EmbeddingCollection and no EmbeddingBagCollection of TorchRec"
        )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tables are named {name!r}: give each a name of its own")
    if isinstance(sizes, Mapping) and (unknown := set(sizes) - set(names)):
        raise ValueError(f"sizes of unknown tables {sorted(unknown)}: known are {names}")
    plan, parts = ShardingPlan(plan={}), {}
    for path, tables in configs.items():
        plan.plan[path] = EmbeddingModuleShardingPlan()
        for config in tables:
            check_config(config)
            own = sizes.get(config.name) if isinstance(sizes, Mapping) else sizes
            place = Placement(config.num_embeddings, world, config.name)
            sharding = RaggedSharding(
                sharding_type=ShardingType.ROW_WISE.value,
                compute_kernel="customized_kernel",
                ranks=list(range(world)),
                sharding_spec=_shards(place, config.embedding_dim, kind),
                sizes=None if own is None else tuple(own),
                initial_size=initial_size,
            )
            plan.plan[path][config.name] = sharding
            try:
                parts[config.name] = sharding, sharding.make(config, place.block, device="meta")
            except ValueError as error:
                raise ValueError(f"table {config.name!r}: {error}") from None
    if max_bytes_per_rank is not None:
        try:
            budgets = shares({name: part for name, (_, part) in parts.items()}, max_bytes_per_rank)
        except ValueError as error:
            raise ValueError(f"max_bytes_per_rank: {error}") from None
        for name, budget in budgets.items():
            parts[name][0].budget = budget
    return plan


_SEQUENCE, _BAGS = EmbeddingCollection, EmbeddingBagCollection


def table_configs(module: Any) -> Sequence[BaseEmbeddingConfig]:
    """The tables of a collection."""
    bags = isinstance(module, EmbeddingBagCollection)
    return module.embedding_bag_configs() if bags else module.embedding_configs()


def check_config(config: BaseEmbeddingConfig) -> None:
    """Refuse what TorchRec's other kernels have and rows of their own sizes do not."""
    for option in ("use_virtual_table", "enable_embedding_update", "stash_weights"):
        if getattr(config, option):
            raise ValueError(f"table {config.name!r} has {option}, which ragged rows do not have")
    if config.num_embeddings_post_pruning is not None:
        raise ValueError(f"table {config.name!r} is pruned: shard it before")


def _shards(place: Placement, dim: int, kind: str) -> EnumerableShardingSpec:
    """What TorchRec prints of a plan; rows are counted by position."""
    shards = [
        ShardMetadata(
            shard_offsets=[place.first(rank), 0],
            shard_sizes=[place.count(rank), dim],
            placement=f"rank:{rank}/{kind}",
        )
        for rank in range(place.world)
    ]
    return EnumerableShardingSpec([shard for shard in shards if shard.shard_sizes[0]])
