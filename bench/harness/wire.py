"""The bytes that ranks send in training, counted, beside those of ``harness.sharded``.

Counted is every collective of ``torch.distributed``, forward and backward, at torch's dispatcher:
whoever calls it, and by whatever function. Of an all-to-all what goes to other ranks counts, of an
all-reduce of n bytes what a ring sends, 2 (W - 1) / W n. ``written`` is what Linux says that the
process wrote meanwhile: to sockets, and nothing else.

Needs TorchRec.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException
from torch.utils._python_dispatch import TorchDispatchMode

from esapn_kernels import optim
from esapn_kernels.sharded import RaggedBagSharder, RaggedSharder, ragged_plan, tables

from .sharded import COMMS, Job, Traffic, wire

__all__ = ["ProcessException", "check", "compare", "count"]

IDS = 20_000  # of a table
TABLES = ("a", "b")
LOOKUPS = 4096  # of a rank and step
STEPS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IO = Path("/proc/self/io")


class Wire(TorchDispatchMode):
    """Counts what this rank sends in the collectives that are called meanwhile.

    Attributes:
        sent: of every collective its name and bytes, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.partition("::")[2]
            if name not in ("wait_tensor", "_wrap_tensor_autograd"):
                self.sent.append(self._of(name, args))
        return func(*args, **(kwargs or {}))

    def _of(self, name: str, args: Any) -> tuple[str, float]:
        if name == "alltoall_base_":
            return "all-to-all", _to_others(args[1], args[4])
        if name == "all_to_all_single":
            return "all-to-all", _to_others(args[0], args[2])
        if name in ("allreduce_", "all_reduce", "all_reduce_"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            world = dist.get_world_size()
            return "all-reduce", sum(t.nbytes for t in tensors) * 2 * (world - 1) / world
        raise NotImplementedError(f"the model knows no {name}")


def _to_others(sent: Tensor, splits: Sequence[int]) -> float:
    """Bytes of an all-to-all to other ranks; without ``splits`` every rank gets as many."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = splits[rank] / sum(splits) if sum(splits) else 1 / world
    return sent.nbytes * (1 - mine)


def written() -> int | None:
    """Bytes that this process wrote so far; None where there is no such file."""
    if not IO.exists():
        return None
    return int(next(line for line in IO.read_text().splitlines() if "wchar" in line).split()[1])


def job_of(world: int, dedup: bool, comm: str, growth: bool) -> Job:
    """The model's job of the runs here."""
    return Job(
        Traffic.cubed(IDS), world, LOOKUPS, len(TABLES), comm=comm, dedup=dedup, growth=growth
    )


class Model(nn.Module):
    """Two tables of one width, looked up one by one or as bags; no dense part."""

    def __init__(self, bags: bool) -> None:
        super().__init__()
        from torchrec import (  # type: ignore[import-not-found]
            EmbeddingBagCollection,
            EmbeddingBagConfig,
            EmbeddingCollection,
            EmbeddingConfig,
        )

        config: Any = EmbeddingBagConfig if bags else EmbeddingConfig
        collection: Any = EmbeddingBagCollection if bags else EmbeddingCollection
        configs = [
            config(num_embeddings=IDS, embedding_dim=128, name=name, feature_names=[name])
            for name in TABLES
        ]
        self.bags, self.tables = bags, collection(tables=configs, device=torch.device("meta"))

    def forward(self, batch: Any) -> Tensor:
        found = self.tables(batch)
        parts = [found.values()] if self.bags else [found[name].values() for name in TABLES]
        return torch.cat([part.reshape(-1) for part in parts]).square().sum()


def count(dedup: bool, comm: str, growth: bool, bags: bool = False) -> dict[str, Any]:
    """Train a few steps on this rank; all ranks call it.

    Args:
        bags: pairs of ids are pooled.

    Returns:
        ``sent``: bytes of every part, of a step on average; ``written``, likewise.
    """
    from torchrec import KeyedJaggedTensor
    from torchrec.distributed import (  # type: ignore[import-not-found]
        DistributedModelParallel,
    )

    plain = Model(bags)
    sharder = RaggedBagSharder if bags else RaggedSharder
    rows = partial(optim.Adagrad, lr=0.01, rowwise=True)
    model = DistributedModelParallel(
        plain,
        device=torch.device("cpu"),
        plan=ragged_plan(plain, "20%"),
        sharders=[sharder(rows, dedup=dedup, comm=DTYPES[comm])],
    )
    if growth:
        tables(model).grow(every=1)
    hops = [p for p in model.parameters() if not hasattr(p, "_in_backward_optimizers")]
    optimizer = torch.optim.SGD(hops, lr=0.01)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    forward = ["splits", "lengths", "ids", *(["counts"] if dedup and growth else []), "outputs"]
    sent = dict.fromkeys([*forward, "gradients", "hops"], 0.0)
    each = 2 if bags else 1
    lengths = torch.full((LOOKUPS // each,), each)
    wrote = 0
    for _ in range(STEPS):
        ids = (torch.rand(LOOKUPS, generator=generator, dtype=torch.float64) ** 3 * IDS).long()
        batch = KeyedJaggedTensor(list(TABLES), ids, lengths=lengths)
        before = written()
        with Wire() as there:
            loss = model(batch)
        with Wire() as back:
            loss.backward()
        if before is not None:
            wrote += (written() or 0) - before
        for name, (kind, nbytes) in zip(forward, there.sent, strict=True):
            assert kind == "all-to-all"
            sent[name] += nbytes / STEPS
        for kind, nbytes in back.sent:
            sent["gradients" if kind == "all-to-all" else "hops"] += nbytes / STEPS
        optimizer.step()
        optimizer.zero_grad()
    return {"sent": sent, "written": wrote / STEPS if IO.exists() else None}


def compare(world: int, ranks: Sequence[dict[str, Any]], **way: Any) -> dict[str, Any]:
    """What all ranks counted beside the model.

    Args:
        way: ``dedup``, ``comm`` and ``growth``.

    Returns:
        Bytes of a rank and step, on average over the ranks: ``model``, ``counted``, their ``ratio``
        and ``written`` over the model; ``parts``: model, counted and ratio of each; ``worst``: the
        part that differs most; ``uneven``: the most that a rank sends over the mean.
    """
    expected = wire(job_of(world, **way))
    counted = {part: sum(r["sent"][part] for r in ranks) / world for part in ranks[0]["sent"]}
    assert counted.keys() == expected.keys()
    parts = {p: (expected[p], counted[p], counted[p] / expected[p]) for p in expected}
    worst = max(parts, key=lambda part: abs(parts[part][2] - 1))
    model, total = sum(expected.values()), sum(counted.values())
    wrote = [r["written"] for r in ranks]
    return {
        "world": world,
        **way,
        "model": model,
        "counted": total,
        "ratio": total / model,
        "written": None if None in wrote else sum(wrote) / world / model,
        "parts": parts,
        "worst": (worst, parts[worst][2]),
        "uneven": max(sum(r["sent"].values()) for r in ranks) / total,
    }


WAYS: list[dict[str, Any]] = [
    {"dedup": dedup, "comm": comm, "growth": growth}
    for dedup in (True, False)
    for comm in COMMS
    for growth in (True, False)
]


def _rank(rank: int, world: int, folder: str) -> None:
    """A process of :func:`check`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # TorchRec's own
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    found = [count(**way) for way in WAYS]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    # Threads of the process group that outlive it may abort an ordinary end.
    os._exit(0)


def check(world: int) -> list[dict[str, Any]]:
    """All ways of sending, on so many ranks of this machine.

    Raises:
        ProcessException: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return [
        compare(world, each, **way)
        for way, each in zip(WAYS, zip(*ranks, strict=True), strict=True)
    ]
