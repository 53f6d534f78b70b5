"""What the ranks do in the tests: every function is called on all of them."""

from __future__ import annotations

import datetime
import io
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSemiSync
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from esapn_kernels.grow import ByCounts, Growth, is_growing
from esapn_kernels.sharded import (
    RaggedBagSharder,
    RaggedSharder,
    load,
    ragged_plan,
    read,
    save,
    save_changes,
    tables,
)
from esapn_kernels.sharded.placement import Placement
from tests.sharded.beside import (
    OPTIMIZERS,
    ROWS,
    SIZES,
    TABLE_OF,
    Model,
    Pair,
    batch,
    batches,
    dense_optimizer,
    whole_tables,
)


def equal(
    optimizer: str = "adagrad",
    *,
    steps: int = 8,
    weighted: bool = False,
    mean: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **options: Any,
) -> None:
    """Sharded tables give what whole ones do, while rows grow and shrink; numbers are about one."""
    pair = Pair(optimizer, model={"weighted": weighted, "mean": mean}, **options)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        resize_both(pair, g)
        data = batches(step, pair.world, weighted)
        out, expected = pair.step(data)
        torch.testing.assert_close(out, expected[pair.rank], rtol=rtol, atol=atol)
    pair.check_tables(rtol, atol)


def resize_both(pair: Pair, g: torch.Generator) -> None:
    """Some rows grow and some shrink; each rank names some of them."""
    for name, table in pair.tables.items():
        ids = torch.randint(0, table.num_embeddings, (16,), generator=g)
        whole = pair.whole.tables[name]
        for sharded, one, part in (
            (table.promote, whole.promote, ids[:12]),
            (table.demote, whole.demote, ids[12:]),
        ):
            moved, sizes = one(part), whole.sizes_of(part)
            mine = slice(pair.rank, None, pair.world)
            assert torch.equal(sharded(part[mine]), moved[mine])
            assert torch.equal(table.sizes_of(part[mine]), sizes[mine])


def within(bound: float, optimizer: str = "adagrad", **options: Any) -> float:
    """The largest difference of outputs from one process's, of outputs of about one."""
    pair = Pair(optimizer, **options)
    g, worst = torch.Generator().manual_seed(1), 0.0
    for step in range(8):
        resize_both(pair, g)
        out, expected = pair.step(batches(step, pair.world))
        if out.numel():
            worst = max(worst, float((out - expected[pair.rank]).abs().max()))
    pair.check_tables(bound, bound)
    return worst


def grow_alike(dedup: bool, half_life: float = math.inf) -> dict[str, list[int]]:
    """Rows grow by counts as those of one process do where no budget binds.

    Sizes go by counts alone then, whichever rank a row is on.
    """
    pair = Pair(plan={"max_bytes_per_rank": 200_000}, dedup=dedup)
    rule = {"every": 3, "scale": 2.0, "half_life": half_life, "hysteresis": 1.0}
    growth = pair.tables.grow(**rule)
    whole = ByCounts(pair.whole, 400_000, **rule)
    for step in range(12):
        out, expected = pair.step(batches(step, pair.world))
        torch.testing.assert_close(out, expected[pair.rank], rtol=1e-5, atol=1e-5)
    pair.check_tables()
    for table in growth.report().tables.values():
        assert table.refused == 0
        assert table.serving <= table.budget
    assert sum(t.promoted for t in whole.report().tables.values()) > 20
    lookups = torch.tensor([t.lookups for t in growth.report().tables.values()])
    dist.all_reduce(lookups)
    assert lookups.tolist() == [t.lookups for t in whole.report().tables.values()]
    return {name: table.rows.arena.count_rows() for name, table in pair.tables.items()}


def shrink_within_a_budget() -> None:
    """Where counts decay and the budget is small, rows move both ways and bytes stay within it."""
    most = 9_000
    pair = Pair(plan={"max_bytes_per_rank": most})
    growth = pair.tables.grow(every=2, half_life=60.0, scale=8.0)
    for step in range(60):
        # What is frequent changes.
        data = batches(step, pair.world)
        if step >= 30:
            data = [mirrored(one) for one in data]
        loss, _ = pair.model(data[pair.rank])
        loss.backward()
        pair.dense.step()
        pair.dense.zero_grad()
        serving = sum(report.serving for report in pair.tables.memory_report().values())
        assert serving <= most, (step, serving)
    moved = growth.report().tables.values()
    assert sum(t.promoted for t in moved) > 20
    assert sum(t.demoted for t in moved) > 5


def mirrored(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same with other ids: the rarest for the most frequent."""
    counts = features.length_per_key() if features.stride() else [0] * len(features.keys())
    parts = zip(features.keys(), features.values().split(counts), strict=True)
    values = [ROWS[TABLE_OF[key]] - 1 - ids for key, ids in parts]
    return KeyedJaggedTensor(
        features.keys(), torch.cat(values), lengths=features.lengths(), stride=features.stride()
    )


def pipelined() -> None:
    """``TrainPipelineSparseDist`` gives to the bit what a plain loop does, while rows grow."""
    found = []
    for pipeline in (False, True):
        torch.manual_seed(3)
        model = shard()
        dense = dense_optimizer(model)
        growth = tables(model).grow(every=2)
        data = [batch(31 * step + dist.get_rank(), 6) for step in range(9)]
        losses = []
        if pipeline:
            train = TrainPipelineSparseDist(model, dense, torch.device("cpu"))
            stream = iter(data)
            for _ in data:
                losses.append(train.progress(stream))
        else:
            for one in data:
                loss, out = model(one)
                dense.zero_grad()
                loss.backward()
                dense.step()
                losses.append(out)
        whole = whole_tables(model)
        assert sum(t.promoted for t in growth.report().tables.values()) > 3
        found.append((losses, {name: (t.sizes_of(), t.weight) for name, t in whole.items()}))
    (losses, plain), (others, piped) = found
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    for name, (sizes, rows) in plain.items():
        assert torch.equal(sizes, piped[name][0])
        assert torch.equal(rows, piped[name][1])


def look_ahead() -> str:
    """What a pipeline that looks up before the last step is told."""
    model = shard()
    train = TrainPipelineSemiSync(model, dense_optimizer(model), torch.device("cpu"))
    stream = iter([batch(step, 4) for step in range(4)])
    # On a CPU there are no streams, and this pipeline records its batches on them.
    with patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None):
        try:
            for _ in range(4):
                train.progress(stream)
        except RuntimeError as error:
            return str(error)
    return ""


def shard(optimizer: str = "adagrad", **options: Any) -> Any:
    """A sharded model with room to grow."""
    plain, make = Model(), OPTIMIZERS[optimizer]
    plan = {"sizes": SIZES, "max_bytes_per_rank": 200_000}
    return DistributedModelParallel(
        plain,
        device=torch.device("cpu"),
        plan=ragged_plan(plain, **plan),
        sharders=[RaggedSharder(make, **options), RaggedBagSharder(make, **options)],
    )


def without_model_parallel(fully: bool) -> None:
    """FSDP2, or nothing at all, around the dense part; tables by TorchRec's ``shard``."""
    torch.manual_seed(0)
    pair = Pair()
    torch.manual_seed(0)
    model = Model()
    plan = ragged_plan(model, sizes=SIZES)
    env, device = ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu")
    make = OPTIMIZERS["adagrad"]
    model.each = RaggedSharder(make).shard(model.each, plan.plan["each"], env, device)
    model.bags = RaggedBagSharder(make).shard(model.bags, plan.plan["bags"], env, device)
    if fully:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.one, model.all):
            fully_shard(part, mesh=mesh)
    folder = shared_folder()
    save(pair.model, folder / "start")
    mine = tables(model)
    hops = [table.rows.chain for table in mine.values()]
    with torch.no_grad():
        for name, table in mine.items():
            levels = table.levels_like()
            state = {"rows": None, **table.state_like(levels)}
            saved = pair.tables[name].state()
            table.load(saved["levels"], {key: saved[key] for key in state})
    parts = [*model.one.parameters(), *model.all.parameters(), *hops]
    dense = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
    chosen = dict(in_backward_optimizer_filter(pair.model.named_parameters()))
    reference = torch.optim.SGD(chosen.values(), lr=0.1, momentum=0.9)
    for step in range(4):
        one = batch(7 * step + dist.get_rank(), 5)
        loss, out = model(one)
        loss.backward()
        if not fully:
            for parameter in [*model.one.parameters(), *model.all.parameters()]:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        dense.step()
        dense.zero_grad()
        loss, expected = pair.model(one)
        loss.backward()
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    save(model, folder / "end", optimizer=dense)
    before = [part.detach().clone() for part in parts]
    with torch.no_grad():
        for part in parts:
            part.zero_()
    fresh = torch.optim.SGD(parts, lr=0.3, momentum=0.9)
    load(model, folder / "end", optimizer=fresh)
    for part, saved in zip(parts, before, strict=True):
        a, b = (t.full_tensor() if isinstance(t, DTensor) else t for t in (part, saved))
        assert torch.equal(a, b)
    assert fresh.param_groups[0]["lr"] == 0.1
    assert all(fresh.state[part]["momentum_buffer"].shape == part.shape for part in parts)


def refuse(what: str, grows: bool = False) -> str:
    """What this rank is told where rank 1 asks for what cannot be; all go on afterwards."""
    model, rank = shard(), dist.get_rank()
    found, good = tables(model), batch(3, 4)
    if grows:
        found.grow()
    before = {name: t.weight for name, t in whole_tables(model).items()}
    said = ""
    try:
        if what == "ids":
            bad = batch(3, 4)
            if rank == 1:
                bad.values()[5] = 10_000
            model(bad)
        elif what == "key":
            keys = ["other", *good.keys()[1:]] if rank == 1 else good.keys()
            model(KeyedJaggedTensor(keys, good.values(), lengths=good.lengths()))
        elif what == "lengths":
            lengths = good.lengths() + (rank == 1)
            model(KeyedJaggedTensor(good.keys(), good.values(), lengths=lengths))
        elif what == "dtype":
            ids = good.values().float() if rank == 1 else good.values()
            model(KeyedJaggedTensor(good.keys(), ids, lengths=good.lengths()))
        elif what == "promote":
            found["t"].promote(torch.tensor([ROWS["t"] if rank == 1 else 3]))
        elif what == "size":
            found["t"].resize(torch.tensor([3]), 5 if rank == 1 else 4)
        elif what == "save":
            save(model, shared_folder() / "a", extra={"a": {1} if rank == 1 else 1})  # type: ignore[dict-item]
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    for name, table in whole_tables(model).items():
        assert torch.equal(table.weight, before[name])
    loss, _ = model(good)
    loss.backward()
    return said


def rows_of_ranks() -> list[int]:
    """Distinct ids ~ u^3 that this rank is asked for."""
    place = Placement(100_000, dist.get_world_size())
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(dist.get_rank()))
    ids = ((u**3) * 100_000).long().unique()
    return torch.bincount(place.owner(place.position(ids)), minlength=place.world).tolist()


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def train_a_part(
    folder: str, first: int, last: int, optimizer: str, lines: int = 12, grows: bool = False
) -> dict[str, Any]:
    """Steps ``first`` to ``last`` on batches that all ranks share out, from the last checkpoint on.

    The batches are the same on any number of ranks, and so is the loss: a sum.
    """
    torch.manual_seed(0)
    model = shard(optimizer)
    dense, rank, world = moving_dense(model), dist.get_rank(), dist.get_world_size()
    growth = tables(model).grow(every=2, scale=2.0, hysteresis=1.0) if grows else None
    path = Path(folder)
    if first:
        extra = load(model, path / str(first), optimizer=dense, growth=growth)
        assert extra == {"step": first}
    else:
        load(model, path / "start")
    for step in range(first, last):
        if not grows:
            resize_some(model, step)
        # Gradients are means over ranks of sums over lines: times the ranks they are the whole's.
        loss, _ = model(share(batch(13 * step, lines), rank, world))
        dense.zero_grad()
        (loss * world).backward()
        dense.step()
    save(model, path / str(last), optimizer=dense, growth=growth, extra={"step": last})
    whole = whole_tables(model)
    return {
        "sizes": {name: t.sizes_of().tolist() for name, t in whole.items()},
        "rows": {name: t.weight.detach().tolist() for name, t in whole.items()},
        "dense": [p.detach().tolist() for p in (model.module.one.weight, model.module.all.weight)],
    }


def moving_dense(model: Any) -> torch.optim.Optimizer:
    """Adam, whose state is of several kinds, in TorchRec's wrapper, and of the hops in another."""
    named = dict(in_backward_optimizer_filter(model.named_parameters()))
    hops = {n: p for n, p in named.items() if n.endswith("chain")}
    rest = {n: p for n, p in named.items() if not n.endswith("chain")}
    wrap = KeyedOptimizerWrapper
    return CombinedOptimizer(
        [
            model.fused_optimizer,
            wrap(hops, lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9)),
            wrap(rest, lambda params: torch.optim.Adam(params, lr=0.01)),
        ]
    )


def share(features: KeyedJaggedTensor, rank: int, world: int) -> KeyedJaggedTensor:
    """The lines of a batch that a rank takes."""
    mine = torch.arange(features.stride())[rank::world]
    lengths, values = [], []
    keys = features.keys()
    for key in keys:
        jagged = features[key]
        parts = jagged.values().split(jagged.lengths().tolist())
        values += [parts[i] for i in mine.tolist()]
        lengths.append(jagged.lengths()[mine])
    return KeyedJaggedTensor(keys, torch.cat(values), lengths=torch.cat(lengths), stride=len(mine))


def resize_some(model: Any, step: int) -> None:
    """The same rows on any number of ranks."""
    g = torch.Generator().manual_seed(step)
    for table in tables(model).values():
        ids = torch.randint(0, table.num_embeddings, (14,), generator=g)
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        table.promote(ids[:10][mine])
        table.demote(ids[10:][mine])


def start(folder: str, optimizer: str) -> None:
    """The checkpoint that all numbers of ranks begin with."""
    torch.manual_seed(0)
    save(shard(optimizer), Path(folder) / "start")


def restart_with_growth(folder: str, half_life: float) -> None:
    """A run that stops and goes on on as many ranks is the run that does not stop."""
    found = []
    for stops in (False, True):
        torch.manual_seed(0)
        model = shard()
        settings = {"every": 2, "scale": 4.0, "half_life": half_life}
        dense, growth = moving_dense(model), tables(model).grow(**settings)
        for step in range(14):
            if stops and step == 7:  # between two moves, with lookups noted
                save(model, Path(folder) / "seven", optimizer=dense, growth=growth)
                torch.manual_seed(5)
                model = shard()
                dense, growth = moving_dense(model), tables(model).grow(**settings)
                load(model, Path(folder) / "seven", optimizer=dense, growth=growth)
            loss, _ = model(batch(17 * step + dist.get_rank(), 6))
            dense.zero_grad()
            loss.backward()
            dense.step()
        whole = whole_tables(model)
        reports = {n.split(".")[-1]: t for n, t in growth.report().tables.items()}
        found.append((whole, reports))
    (whole, reports), (others, after) = found
    for name, table in whole.items():
        assert torch.equal(table.sizes_of(), others[name].sizes_of())
        # Rows lie elsewhere, and kernels sum rows that move in the order in which these lie.
        torch.testing.assert_close(table.weight, others[name].weight, rtol=1e-5, atol=1e-5)
        assert reports[name] == after[name]
    assert sum(report.promoted for report in reports.values()) > 10


def growth_on_other_ranks(folder: str, first: int, last: int) -> dict[str, Any]:
    """Counts and noted lookups are those of the rows, on any number of ranks."""
    found = train_a_part(folder, first, last, "sgd", grows=True)
    return {"sizes": found["sizes"]}


def written_in_the_background(folder: str) -> None:
    """What is written is what was there at the call, and the folder appears when all is."""
    model = shard()
    dense, path = dense_optimizer(model), Path(folder) / "background"
    before = whole_tables(model)
    done = save(model, path, wait=False)
    for step in range(3):
        loss, _ = model(batch(step, 5))
        dense.zero_grad()
        loss.backward()
        dense.step()
    done.result()
    assert path.is_dir()
    assert not path.with_name("background.part").exists()
    for name, table in read(path).items():
        assert torch.equal(table.weight, before[name].weight)
    assert not torch.equal(whole_tables(model)["t"].weight, before["t"].weight)


def load_refused(path: str, **options: Any) -> str:
    """What this rank is told, where nothing has changed."""
    model = shard(**options)
    dense = moving_dense(model)
    growth = tables(model).grow()
    before = {name: t.weight for name, t in whole_tables(model).items()}
    parameters = [p.detach().clone() for p in model.parameters()]
    said = ""
    try:
        load(model, path, optimizer=dense, growth=growth)
    except (OSError, RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
    for name, table in whole_tables(model).items():
        assert torch.equal(table.weight, before[name])
    return said


def save_whole(path: str) -> None:
    """A checkpoint with all that there is."""
    model = shard()
    dense, growth = moving_dense(model), tables(model).grow(every=1)
    for step in range(3):
        loss, _ = model(batch(step + dist.get_rank(), 6))
        dense.zero_grad()
        loss.backward()
        dense.step()
    save(model, path, optimizer=dense, growth=growth, extra={"epoch": 3})


def save_twice(path: str) -> str:
    """A folder that exists is not written to."""
    try:
        save(shard(), path)
    except (FileExistsError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outputs_of(path: str, ids: list[int]) -> list[list[float]]:
    """What the sharded table ``t`` gives."""
    model = shard()
    load(model, path)
    found = tables(model)["t"]
    collection = model.module.each
    features = KeyedJaggedTensor(
        ["f", "g", "h"], torch.tensor(ids), lengths=torch.tensor([len(ids), 0, 0]), stride=1
    )
    assert torch.equal(
        found.sizes_of(torch.tensor(ids)), read(path)["t"].sizes_of(torch.tensor(ids))
    )
    return collection(features).wait()["f"].values().detach().tolist()


def move_before_backward(grows: bool) -> str:
    """Rows that moved would fail in backward on their rank, and the others wait for it."""
    model = shard()
    found = tables(model)
    growth = found.grow(every=1) if grows else None
    dense = torch.optim.SGD([model.module.one.bias], lr=0.1)  # which backward does not read
    for step in range(4):
        loss, _ = model(batch(step + dist.get_rank(), 6))
        dense.step()  # of the last backward, or of none
        if growth is None:
            ids = torch.arange(8) if dist.get_rank() else torch.arange(0)
            try:
                found["t"].promote(ids)
            except RuntimeError as error:
                return str(error)
        loss.backward()
    dense.step()
    assert growth is not None
    assert sum(t.promoted for t in growth.report().tables.values()) > 0
    # A loss that is dropped awaits nothing.
    loss, _ = model(batch(9, 6))
    del loss, _
    found["t"].promote(torch.arange(8))
    return "moved"


def loaded_around(folder: str) -> str:
    """A state dict of a module around a sharded collection changes no hops."""
    model = nn.ModuleDict({"each": shard().module.each})
    state = {key: part for key, part in model.state_dict().items() if "chain" in key}
    before = {key: part.clone() for key, part in state.items()}
    try:
        model.load_state_dict({key: part + 7 for key, part in state.items()}, strict=False)
    except NotImplementedError as error:
        for key, part in model.state_dict().items():
            assert "chain" not in key or torch.equal(part, before[key])
        return str(error)
    return ""


def other_optimizers(folder: str) -> list[str]:
    """A checkpoint by Adam, and what other optimizers of the dense part are told."""
    model, path = shard(), Path(folder) / "adam"
    named = dict(in_backward_optimizer_filter(model.named_parameters()))
    parts, adam = list(named.values()), torch.optim.Adam(named.values(), lr=0.01)
    save(model, path, optimizer=adam)  # before the first step: no state
    loss, _ = model(batch(1, 4))
    loss.backward()
    adam.step()
    assert adam.state
    load(model, path, optimizer=adam)
    assert not any(adam.state.get(part) for part in parts)
    said = []
    for other in (
        torch.optim.Adagrad(parts, lr=0.3),
        torch.optim.Adam([{"params": parts[:1]}, {"params": parts[1:]}]),
        torch.optim.Adam(parts[:-1]),
    ):
        before = [dict(group) for group in other.param_groups]
        try:
            load(model, path, optimizer=other)
        except ValueError as error:
            said.append(str(error))
        assert [dict(group) for group in other.param_groups] == before
    return said


def beside_others(kind: str) -> str:
    """A table that TorchRec shards by its own kernel is not saved as if all ranks had it."""
    model = Model()
    model.plain = EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                num_embeddings=16, embedding_dim=8, name="plain", feature_names=["plain"]
            )
        ],
        device=torch.device("meta"),
    )
    make = OPTIMIZERS["adagrad"]
    plan = ragged_plan(model, "200 kB", sizes=SIZES, modules=["each", "bags"])
    plan.plan["plain"] = construct_module_sharding_plan(
        model.plain,
        {"plain": row_wise() if kind == "row_wise" else table_wise(rank=0)},
        sharder=EmbeddingCollectionSharder(),
        world_size=dist.get_world_size(),
        local_size=dist.get_world_size(),
        device_type="cpu",
    )
    model = DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=plan,
        sharders=[RaggedSharder(make), RaggedBagSharder(make)],
    )
    assert set(tables(model)) == set(ROWS)
    assert not isinstance(model.module.plain, type(model.module.each))
    loss, _ = model(batch(1, 4))
    loss.backward()
    try:
        save(model, shared_folder() / "a")
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def growth_of_their_own(folder: str) -> str:
    """A rule that counts and says nothing of it to checkpoints."""

    class Mine(Growth):
        def count(self, name: str, ids: torch.Tensor, times: torch.Tensor) -> None:
            return None

        def wanted(self, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros_like(ids), torch.zeros_like(ids)

    model = shard()
    growth = tables(model).grow(rule=Mine)
    try:
        save(model, Path(folder) / "mine", growth=growth)
    except NotImplementedError as error:
        return str(error)
    return ""


def grow_within(budget: int) -> tuple[str, bool]:
    """What this rank is told of a budget that one rank's rows do not fit, and whether rows grow."""
    plain = Model()
    make = OPTIMIZERS["adagrad"]
    model = DistributedModelParallel(
        plain,
        device=torch.device("cpu"),
        plan=ragged_plan(plain, sizes=SIZES),
        sharders=[RaggedSharder(make), RaggedBagSharder(make)],
    )
    said = ""
    try:
        tables(model).grow(budget + (dist.get_rank() == 0) * 100_000)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    return said, any(is_growing(table.rows) for table in tables(model).values())


def plain_saving() -> list[str]:
    """``torch.save`` of a model's state dict says what to do instead."""
    said = []
    state = shard().state_dict()
    try:
        torch.save(state, io.BytesIO())
    except NotImplementedError as error:
        said.append(str(error))
    try:
        shard().load_state_dict(state)
    except NotImplementedError as error:
        said.append(str(error))
    return said


def one_leaves(how: str) -> str:
    """Rank 1 leaves after the first step; what rank 0 is told in the second."""
    model = shard()
    for step in range(2):
        if step:
            dist.barrier()
            distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
            if dist.get_rank() == 1:
                if how == "dies":
                    os._exit(1)
                time.sleep(3600)
        try:
            loss, _ = model(batch(step, 5))
            loss.backward()
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def write_changes(folder: str) -> int:
    """A checkpoint, and what changed after it, twice; then a whole one again."""
    model, path = shard(), Path(folder)
    dense, growth = dense_optimizer(model), tables(model).grow(every=2, half_life=40.0, scale=4.0)
    try:
        save_changes(model, path / "none")
    except RuntimeError as error:
        assert "no mark was set" in str(error)
    save(model, path / "whole")
    tables(model).mark()
    save_changes(model, path / "nothing")
    tables(model).mark()
    for part in range(2):
        for step in range(5):
            model.train(step < 4)  # rows are stepped in eval mode, too
            loss, _ = model(batch(13 * part + step + dist.get_rank(), 4))
            dense.zero_grad()
            loss.backward()
            dense.step()
        save_changes(model, path / f"changes-{part}")
    save(model, path / "expected")
    return sum(table.demoted for table in growth.report().tables.values())
