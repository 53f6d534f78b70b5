"""TorchRec's collections with rows of their own sizes, each rank holding a block of every table.

    ids -> distinct ids of a table -> [owner] ids of all ranks -> rows, carried to D
        -> [asker] D numbers a distinct id -> one output an occurrence, or a pool of a bag's

Both arrows between ranks are TorchRec's: ``KJTAllToAll`` takes ids there, and
``SequenceEmbeddingsAllToAll`` outputs back and their gradients there again. Only ids travel before
backward, and the owner looks up the sizes that its rows have by then: a pipeline that sends the
ids of later batches ahead never meets a stale size.

Bags are pooled by who asks: for distinct ids that takes fewer bytes than partial sums of every bag
of every rank would, but on few ranks with long bags.

Source: the modules that these take the place of: TorchRec's ``ShardedEmbeddingCollection`` and
``ShardedEmbeddingBagCollection``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _IncompatibleKeys
from torchrec.distributed.dist_data import SequenceEmbeddingsAllToAll
from torchrec.distributed.embedding import EmbeddingCollectionContext
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.sequence_sharding import SequenceShardingContext
from torchrec.distributed.train_pipeline.runtime_forwards import (
    EmbeddingPipelinedForward,
    PrefetchPipelinedForward,
)
from torchrec.distributed.types import (
    Awaitable,
    CommOp,
    LazyAwaitable,
    ParameterSharding,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from ..grow import is_growing, note_lookup
from ..module import ResizableEmbedding
from ..optim import FusedOptimizer
from .placement import Placement
from .plan import RaggedSharding, check_config, table_configs
from .table import Pending, ShardedTable

__all__ = ["RaggedCollection"]

_REFUSED = 2
"""The batch size that a rank sends in the place of ids that it refuses; 1 else.

TorchRec exchanges batch sizes before ids anyway, and every rank reads them on the host.
"""


@dataclass(frozen=True)
class _Feature:
    """A feature looks up a table, and its output has a name."""

    key: str
    output: str
    table: str
    pooling: PoolingType | None


@dataclass
class _Context(EmbeddingCollectionContext):
    """What a batch leaves for its outputs.

    Attributes:
        asked: of every group and table, the number of ids sent to their owners.
        refusal: why this rank sends none.
        features: of the batch, for its lengths and weights.
    """

    asked: list[list[int]] = field(default_factory=list)
    refusal: Exception | None = None
    features: dict[str, JaggedTensor] = field(default_factory=dict)

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        for jagged in self.features.values():
            jagged.record_stream(stream)


class RaggedCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], Any, _Context], FusedOptimizerModule
):
    """An ``EmbeddingCollection`` or ``EmbeddingBagCollection`` whose tables lie on all ranks.

    Made by the sharders of ``sharders.py``.

    Attributes:
        tables: :class:`ShardedTable` by name.
        rows: this rank's :class:`~esapn_kernels.ResizableEmbedding` of every table.
    """

    def __init__(
        self,
        module: Any,
        shardings: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device,
        optimizer: Callable[[ResizableEmbedding], FusedOptimizer],
        options: dict[str, Any],
        codecs: dict[str, Any],
        dedup: bool,
    ) -> None:
        super().__init__(qcomm_codecs_registry=codecs)
        group = env.process_group
        assert group is not None
        self._env, self._group, self._dedup = env, group, dedup
        self._bags = isinstance(module, EmbeddingBagCollection)
        self._weighted = self._bags and module.is_weighted()
        self._need_indices = not self._bags and module.need_indices()
        self._features = _features(module)
        self.module_sharding_plan = shardings
        configs = {config.name: config for config in table_configs(module)}
        # Registered as modules, so that parameters() and growth find them.
        self.rows = nn.ModuleDict()
        self.tables: dict[str, ShardedTable] = {}
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        for name, config in configs.items():
            check_config(config)
            sharding = shardings[name]
            if not isinstance(sharding, RaggedSharding):
                raise ValueError(
                    f"table {name!r} has a plan of {type(sharding).__name__}: take ragged_plan"
                )
            place = Placement(config.num_embeddings, world, name)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(_seed(group, device) + rank)
                rows = sharding.make(config, place.count(rank), device=device, **options)
            if rows.chain is None:
                raise ValueError(
                    f"table {name!r} has one size, {rows.sizes[0]}: shard it by TorchRec's own "
                    "kernels, or give it several sizes"
                )
            dist.broadcast(rows.chain.data, src=dist.get_global_rank(group, 0), group=group)
            rows.chain.register_hook(_Summing(group))
            steps = optimizer(rows)
            if not isinstance(steps, FusedOptimizer) or steps.deferred:
                raise ValueError(
                    "the owner of rows steps them in backward: optimizer must give an immediate "
                    "one of esapn_kernels.optim, as partial(optim.Adagrad, lr=0.05) does"
                )
            # What TorchRec's in_backward_optimizer_filter looks for.
            setattr(rows.arena.parameter, "_in_backward_optimizers", [EmptyFusedOptimizer()])  # noqa: B010
            self.rows[name] = rows
            self.tables[name] = ShardedTable(rows, steps, place, group)
        # Outputs of one width travel together.
        widths = sorted({config.embedding_dim for config in configs.values()})
        self._groups = [[n for n, c in configs.items() if c.embedding_dim == w] for w in widths]
        self._input_dists, self._output_dists = [], []
        for names in self._groups:
            self._input_dists.append(
                RwSparseFeaturesDist(
                    pg=group,
                    num_features=len(names),
                    feature_hash_sizes=[world * self.tables[n].placement.block for n in names],
                    device=device,
                    is_sequence=True,
                )
            )
            self._output_dists.append(
                SequenceEmbeddingsAllToAll(
                    group,
                    [len(names)] * world,
                    device,
                    codecs.get(CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name),
                )
            )
        self._fused = CombinedOptimizer(
            [(f"rows.{name}", _Fused(table.optimizer)) for name, table in self.tables.items()]
        )

    def create_context(self) -> _Context:
        return _Context()

    def input_dist(
        self, ctx: _Context, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Send the ids of a batch to their owners."""
        ids: dict[str, Tensor] = {}
        try:
            ctx.features = self._parts(features)
            ids = {name: self._ids(name, ctx.features) for name in self.tables}
            self._check(ids)
        except Exception as error:
            # Raised with the other ranks, which wait for ids.
            ctx.refusal = error
        awaitables = []
        for names, to_owners in zip(self._groups, self._input_dists, strict=True):
            sent = self._to_send(ctx, names, ids)
            awaitables.append(to_owners(sent))
            ctx.sharding_contexts.append(
                SequenceShardingContext(
                    features_before_input_dist=sent,
                    unbucketize_permute_tensor=to_owners.unbucketize_permute_tensor,
                )
            )
        return KJTListSplitsAwaitable(awaitables, ctx)

    def _parts(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The batch's features by name."""
        if not isinstance(features, KeyedJaggedTensor):
            raise TypeError(f"features must be a KeyedJaggedTensor, got {type(features).__name__}")
        if features.variable_stride_per_key():
            raise ValueError(
                "features have batch sizes of their own, which sharded ragged tables do not take"
            )
        keys = {f.key for f in self._features}
        if missing := keys - set(features.keys()):
            raise KeyError(f"features {sorted(missing)} are missing: there are {features.keys()}")
        if self._weighted and features.weights_or_none() is None:
            raise ValueError("the collection is weighted, and features have no weights")
        return {key: jagged for key, jagged in _split(features).items() if key in keys}

    def _ids(self, name: str, parts: dict[str, JaggedTensor]) -> Tensor:
        """The ids of all features of a table."""
        found = [parts[f.key].values() for f in self._features if f.table == name]
        for ids in found:
            if ids.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"ids of table {name!r} must be int32 or int64, got {ids.dtype}")
        return torch.cat([ids.long() for ids in found])

    def _check(self, ids: dict[str, Tensor]) -> None:
        """Refuse ids that are out of range.

        Raises:
            IndexError: some are.
        """
        bounds = [t.aminmax() for t in ids.values() if t.numel()]
        if not bounds:
            return
        names = [name for name, t in ids.items() if t.numel()]
        lowest, highest = torch.stack([torch.stack(pair) for pair in bounds]).T.tolist()
        for name, low, high in zip(names, lowest, highest, strict=True):
            rows = self.tables[name].num_embeddings
            if low < 0 or high >= rows:
                wrong = low if low < 0 else high
                raise IndexError(f"id {wrong} is out of range [0, {rows}) of table {name!r}")

    def _to_send(self, ctx: _Context, names: Sequence[str], ids: dict[str, Tensor]) -> Any:
        """The ids of some tables, as codes that go by owner; each table is a key of one line."""
        counts = (
            self._dedup and self.training and any(is_growing(self.tables[n].rows) for n in names)
        )
        device = self.tables[names[0]].rows.arena.storage.device
        if ctx.refusal is not None:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            zeros = torch.zeros(_REFUSED * len(names), dtype=torch.int64, device=device)
            ctx.asked.append([0] * len(names))
            return KeyedJaggedTensor(
                list(names),
                none,
                none.float() if counts else None,  # as of the other ranks
                lengths=zeros,
                stride=_REFUSED,
            )
        codes, times, reverse, asked = [], [], [], []
        for name in names:
            code = self.tables[name].placement.code(ids[name])
            if self._dedup:
                code, where, *n = torch.unique(code, return_inverse=True, return_counts=counts)
                reverse.append(where)
                times += n
            codes.append(code)
            asked.append(code.numel())
        ctx.asked.append(asked)
        ctx.reverse_indices += reverse
        return KeyedJaggedTensor(
            list(names),
            torch.cat(codes),
            torch.cat(times).float() if counts else None,
            lengths=torch.tensor(asked, device=device),
            stride=1,
        )

    def compute(self, ctx: _Context, dist_input: KJTList) -> list[Tensor]:
        """Look up the rows that all ranks ask of this one."""
        self._refuse(ctx)
        outputs = []
        for names, received, context in zip(
            self._groups, dist_input, ctx.sharding_contexts, strict=True
        ):
            context.lengths_after_input_dist = received.lengths().view(-1, received.stride())
            counts = received.length_per_key()
            times = received.weights_or_none()
            each = [None] * len(names) if times is None else times.long().split(counts)
            parts = [
                self._look_up(self.tables[name], ids, n)
                for name, ids, n in zip(names, received.values().split(counts), each, strict=True)
            ]
            outputs.append(torch.cat(parts))
        return outputs

    def _look_up(self, table: ShardedTable, ids: Tensor, times: Tensor | None) -> Tensor:
        rows = table.rows
        if not torch.is_grad_enabled():
            return rows.forward(ids)
        table.note(ids)
        if self.training:
            note_lookup(rows, ids, times)
        # Past the hook, which would note every id once.
        return _Awaiting.apply(rows.forward(ids), table.await_backward())

    def _refuse(self, ctx: _Context) -> None:
        """Raise on all ranks what one of them has to say, before any row is looked up."""
        if self.training and torch.is_grad_enabled() and isinstance(self.forward, _AHEAD):
            raise RuntimeError(
                "the pipeline looks rows up before the last batch has stepped them, and the owner "
                "steps them in backward: use TrainPipelineSparseDist"
            )
        if ctx.refusal is not None:
            raise ctx.refusal
        sizes = [context.batch_size_per_rank for context in ctx.sharding_contexts]
        if any(_REFUSED in per_rank for per_rank in sizes):
            refused = [r for r, size in enumerate(sizes[0]) if size == _REFUSED]
            raise RuntimeError(f"rank {refused[0]} refuses its batch: see what it says")

    def output_dist(self, ctx: _Context, output: list[Tensor]) -> LazyAwaitable[Any]:
        """Send outputs back to who asked for them."""
        awaitables = [
            back(
                embeddings,
                lengths=context.lengths_after_input_dist,
                input_splits=context.input_splits,
                output_splits=context.output_splits,
                batch_size_per_rank=context.batch_size_per_rank,
                sparse_features_recat=context.sparse_features_recat,
                unbucketize_permute_tensor=context.unbucketize_permute_tensor,
            )
            for back, embeddings, context in zip(
                self._output_dists, output, ctx.sharding_contexts, strict=True
            )
        ]
        return _Outputs(self, ctx, awaitables)

    def assemble(self, ctx: _Context, received: Sequence[Tensor]) -> Any:
        """One output an occurrence, or a pool a bag, from one a distinct id."""
        distinct: dict[str, tuple[Tensor, Tensor | None]] = {}
        reverse = iter(ctx.reverse_indices)
        for names, embeddings, asked in zip(self._groups, received, ctx.asked, strict=True):
            for name, part in zip(names, embeddings.split(asked), strict=True):
                distinct[name] = part, next(reverse) if self._dedup else None
        # Where a table's features begin among the ids that were asked for.
        first = dict.fromkeys(self.tables, 0)
        found = []
        for feature in self._features:
            jagged, (rows, where) = ctx.features[feature.key], distinct[feature.table]
            begin = first[feature.table]
            end = first[feature.table] = begin + jagged.values().numel()
            found.append(self._pooled(feature, jagged, rows, where, begin, end))
        if not self._bags:
            return {f.output: y for f, y in zip(self._features, found, strict=True)}
        return KeyedTensor(
            [f.output for f in self._features],
            [y.shape[1] for y in found],
            torch.cat(found, dim=1),
        )

    def _pooled(
        self,
        feature: _Feature,
        jagged: JaggedTensor,
        rows: Tensor,
        where: Tensor | None,
        begin: int,
        end: int,
    ) -> Any:
        """A feature's output, from the ``rows`` of its table."""
        if not self._bags:
            values = rows[begin:end] if where is None else rows.index_select(0, where[begin:end])
            weights = jagged.values() if self._need_indices else None
            return JaggedTensor(values, lengths=jagged.lengths(), weights=weights)
        every = torch.arange(rows.shape[0], device=rows.device) if where is None else where
        where = every[begin:end]
        lengths, offsets = jagged.lengths(), jagged.offsets()
        weights = jagged.weights().to(rows.dtype) if self._weighted else None
        mean = feature.pooling is PoolingType.MEAN
        mode = "mean" if mean and weights is None else "sum"
        pooled = F.embedding_bag(
            where, rows, offsets[:-1].long(), mode=mode, per_sample_weights=weights
        )
        if mean and weights is not None:
            pooled = pooled / lengths.clamp(min=1).to(rows.dtype)[:, None]
        return pooled

    def state_dict(  # type: ignore[override]
        self, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Rows of all ranks in the order of positions, as blocks that
        ``torch.distributed.checkpoint`` writes; collective."""
        destination = OrderedDict() if destination is None else destination
        for name, table in self.tables.items():
            for key, part in table.state(optimizer=False).items():
                destination[f"{prefix}rows.{name}.{key}"] = part
        return destination

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Refused where there is something to load: memory for rows depends on their sizes.

        Raises:
            NotImplementedError: :func:`~esapn_kernels.sharded.load` does it.
        """
        if any(key.startswith("rows.") for key in state_dict):
            raise NotImplementedError("sharded tables are loaded by esapn_kernels.sharded.load")
        return _IncompatibleKeys([f"rows.{name}" for name in self.tables], list(state_dict))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # By the state dict of a module around this one.
        keys = [key for key in state_dict if key.startswith(f"{prefix}rows.")]
        if keys:
            self.load_state_dict({key.removeprefix(prefix): state_dict[key] for key in keys})

    @property
    def fused_optimizer(self) -> KeyedOptimizer:
        """Its parameter groups are those of the rows' optimizers, so that schedulers reach them."""
        return self._fused

    @property
    def unsharded_module_type(self) -> type[nn.Module]:
        return EmbeddingBagCollection if self._bags else EmbeddingCollection

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        # Buffers too: data parallelism would send rank 0's to all.
        for name, _ in [*self.named_parameters(prefix), *self.named_buffers(prefix)]:
            yield name

    def extra_repr(self) -> str:
        """One line."""
        return f"dedup={self._dedup}, world={dist.get_world_size(self._group)}"


_AHEAD = (EmbeddingPipelinedForward, PrefetchPipelinedForward)
"""How pipelines call a module that look up a batch before the last one's backward."""


class _Outputs(LazyAwaitable[Any]):
    def __init__(self, module: RaggedCollection, ctx: _Context, awaitables: list[Any]) -> None:
        super().__init__()
        self._module, self._ctx, self._awaitables = module, ctx, awaitables

    def _wait_impl(self) -> Any:
        return self._module.assemble(
            self._ctx, [awaitable.wait() for awaitable in self._awaitables]
        )


class _Awaiting(torch.autograd.Function):
    """Nothing; its backward says that rows which were looked up are about to be stepped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pending: Pending) -> Tensor:
        ctx.pending = pending  # lives as long as the graph
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.pending.is_over = True
        return grad, None


class _Fused(KeyedOptimizer):
    """The optimizer of a table's rows, as TorchRec's optimizers are combined."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        groups = optimizer.param_groups
        super().__init__({"rows": groups[0]["params"][0]}, {}, groups)
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        """Backward has stepped the rows: bring changed settings along."""
        self._optimizer.step()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """The rows have no gradient."""


class _Summing:
    """Hook: the sum over the ranks of a gradient of the hops.

    TorchRec divides the gradients of outputs by the number of ranks, and each rank has the parts of
    rows of its own: a mean would divide twice.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=self.group)
        return grad


def _features(module: nn.Module) -> list[_Feature]:
    """What a collection looks up, table by table."""
    configs = table_configs(module)
    return [
        _Feature(key, output, config.name, getattr(config, "pooling", None))
        for config, outputs in zip(configs, get_embedding_names_by_table(configs), strict=True)
        for key, output in zip(config.feature_names, outputs, strict=True)
    ]


def _split(features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
    """``features.to_dict()``, which fails where a batch has no line."""
    keys, lines = features.keys(), features.stride()
    counts = features.length_per_key() if lines else [0] * len(keys)
    lengths = features.lengths().view(len(keys), lines)
    weights = features.weights_or_none()
    each = [None] * len(keys) if weights is None else weights.split(counts)
    parts = zip(keys, features.values().split(counts), each, lengths, strict=True)
    return {key: JaggedTensor(ids, weights=w, lengths=n) for key, ids, w, n in parts}


def _seed(group: dist.ProcessGroup, device: torch.device) -> int:
    """Of rank 0's generator: ranks draw other numbers even if all were seeded alike."""
    seed = torch.randint(1 << 48, (1,)).to(device)
    dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    return int(seed)
