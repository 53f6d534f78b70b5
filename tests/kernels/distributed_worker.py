"""One rank of tests/kernels/test_distributed.py: ``distributed_worker.py CASES RANK WORLD FOLDER``.

Every case returns what the test compares; it is saved as ``FOLDER/CASE.RANK.pt``. Cases, separated
by commas, run one after another, each once all ranks are done with the one before.
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esapn_kernels import ResizableEmbedding, ResizableEmbeddingCollection, optim
from esapn_kernels.distributed import replicate

SIZES, ROWS, STEPS, BATCH = (2, 3, 8), 40, 8, 6


class Model(nn.Module):
    def __init__(self, init="isometric"):
        super().__init__()
        self.table = ResizableEmbedding(ROWS, sizes=SIZES, dtype=torch.float64, init=init)
        self.head = nn.Linear(8, 2, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids):
        return self.head(self.table(ids).tanh()).mean(1, keepdim=True)


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(ROWS, (BATCH,), generator=generator)
    return ids, torch.randn(BATCH, 1, dtype=torch.float64, generator=generator)


def wanted(step, rank, ids):
    """Ids that a rank promotes after a step: of its own batch, sometimes none."""
    return ids[: (step + rank) % 3]


def result_of(model, optimizer, **more):
    tables = {k: v.clone() for k, v in model.state_dict().items()}
    state = optimizer.state[model.table.arena.storage]
    return {"state": tables, "adam": {k: v.clone() for k, v in state.items()}, **more}


def train(model, wrapped, rank, accumulate=1):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    lengths = [model.table.arena.storage.numel()]
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            ids, target = batch(step * accumulate + part, rank)
            (wrapped(ids) - target).square().mean().div(accumulate).backward()
        optimizer.step()
        model.table.promote(wanted(step, rank, ids))
        lengths.append(model.table.arena.storage.numel())
    return result_of(model, optimizer, lengths=lengths)


def ddp(rank, accumulate=1, init="isometric"):
    torch.manual_seed(rank)  # rank 0's numbers win
    model = Model(init)
    replicate(model)
    return train(model, DistributedDataParallel(model), rank, accumulate)


def ddp_accumulate(rank):
    return ddp(rank, accumulate=2)


def ddp_tails(rank):
    return ddp(rank, init="tails")


def alone(world, accumulate=1, init="isometric"):
    """What one process does with the batches of all ranks."""
    torch.manual_seed(0)
    model = Model(init)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            parts = [batch(step * accumulate + part, rank) for rank in range(world)]
            ids, target = (torch.cat(p) for p in zip(*parts, strict=True))
            (model(ids) - target).square().mean().div(accumulate).backward()
        optimizer.step()
        mine = [wanted(step, rank, ids) for rank, (ids, _) in enumerate(parts)]
        model.table.promote(torch.cat(mine))
    return result_of(model, optimizer)


def buffers(rank, replicated=True):
    """What DDP's broadcast of buffers does to locations when the ranks' rows differ."""
    torch.manual_seed(0)
    model = Model()
    if replicated:
        replicate(model)
        model.table.agree = None  # so that the ranks can differ
    model.table.reserve(10)
    wrapped = DistributedDataParallel(model, broadcast_buffers=True)
    if rank == 1:
        model.table.promote(torch.arange(5))
        model.seen += 1
    before = model.table.sizes_of()
    wrapped(torch.arange(BATCH))
    return {"before": before, "after": model.table.sizes_of(), "seen": model.seen}


def buffers_of_ddp(rank):
    return buffers(rank, replicated=False)


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Model()
    ignored = replicate(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=ignored)
    assert type(model.table.arena.storage.data) is torch.Tensor
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        ids, target = batch(step, rank)
        (model(ids) - target).square().mean().backward()
        optimizer.step()
        model.table.promote(wanted(step, rank, ids))
    head = model.head.weight
    state = {k: v.clone() for k, v in model.table.state_dict().items()}
    return {"state": state, "head": head.full_tensor(), "local": head.to_local().shape}


def adopt(rank):
    """Rank 0 is ahead: the other takes its sizes, its numbers and its shapes."""
    torch.manual_seed(rank)
    model = Model()
    if rank == 0:
        model.table.promote(torch.arange(20))
        model.table.promote(torch.arange(10))
    replicate(model)
    return {"state": {k: v.clone() for k, v in model.table.state_dict().items()}}


def compacted(rank):
    """In steps, by rank 0 alone before it is replicated: all go on with the same id."""
    torch.manual_seed(0)
    model = Model()
    table = model.table
    if rank == 0:
        table.compact(7)
    replicate(model)
    table.promote(torch.arange(0, ROWS, 2))
    return {"rows": table.compact(20), "starts": table.arena.row_start.clone()}


def masks(rank):
    torch.manual_seed(0)
    model = Model()
    replicate(model)
    ids = torch.tensor([[1, 2], [3, 1]]) if rank == 0 else torch.tensor([3, 7, 9])
    mask = torch.tensor([[True, False], [False, True]]) if rank == 0 else None
    moved = model.table.promote(ids, mask)
    nothing = model.table.promote(torch.zeros(0, dtype=torch.long))
    resized = model.table.resize(ids[:1] if rank == 0 else ids[:0], 8)
    return {"moved": moved, "nothing": nothing, "resized": resized, "sizes": model.table.sizes_of()}


def demoted(rank):
    """What any rank demotes, all do; rows and optimizer state stay equal."""
    torch.manual_seed(0)
    model = Model()
    replicate(model)
    ids = torch.arange(rank, ROWS, 3 + rank)
    resized = model.table.resize(ids, 8)
    model(torch.arange(ROWS)).square().sum().backward()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer.step()
    mask = ids % 2 == 0 if rank == 0 else None
    moved = model.table.demote(ids, mask)
    nothing = model.table.demote(ids[:0])
    sizes = model.table.sizes_of()
    said = None
    try:
        model.table.demote(torch.tensor([ROWS if rank else 0]))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    shrunk = model.table.resize(ids[:2] if rank else ids[:0], 2)
    more = {"ids": ids, "resized": resized, "moved": moved, "nothing": nothing}
    return result_of(model, optimizer, sizes=sizes, said=said, shrunk=shrunk, **more)


def refusal(rank):
    """One rank's bad ids: both raise, and none has changed."""
    torch.manual_seed(0)
    model = Model()
    replicate(model)
    before = model.table.sizes_of()
    said = []
    calls = [
        lambda: model.table.promote(torch.tensor([ROWS if rank == 1 else 0])),
        lambda: model.table.promote(torch.tensor([0]), torch.tensor([1 - rank, 1])[rank:].bool()),
        lambda: model.table.resize(torch.tensor([0]), 5 if rank == 0 else 3),
    ]
    for call in calls:
        try:
            call()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    same = torch.equal(model.table.sizes_of(), before)
    moved = model.table.promote(torch.tensor([rank]))  # and they go on together
    return {"said": said, "same": same, "moved": moved}


def refused(rank):
    """What replicate itself refuses, with a group of one."""
    said = {}

    def note(name, call):
        try:
            call()
            said[name] = None
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    note("no table", lambda: replicate(nn.Linear(2, 2)))
    note("sparse", lambda: replicate(ResizableEmbedding(5, sizes=SIZES, sparse=True)))
    fused = Model()
    rows = optim.SGD(fused.table, lr=0.1)
    note("fused", lambda: replicate(fused))
    rows.detach()
    normed = ResizableEmbedding(5, sizes=(8,), max_norm=1.0)
    note("max_norm", lambda: replicate(normed))
    note("wrapped", lambda: replicate(DistributedDataParallel(fused)))
    model = Model()
    replicate(model)
    note("twice", lambda: replicate(model))
    note("fused later", lambda: optim.SGD(model.table, lr=0.1))
    other = copy.deepcopy(model)
    other.table.promote(torch.tensor([3]))
    said["copy"] = other.table.agree is None
    note("copy replicated", lambda: replicate(other))
    many = ResizableEmbeddingCollection({"a": 3, "b": 4}, sizes=SIZES)
    said["collection"] = len(replicate(many)) == 2
    return {"said": said}


def differing(rank):
    said = []
    for options in (
        {"num_embeddings": 10 + rank},
        {"dtype": [torch.float32, torch.float64][rank]},
        {"max_elements": [None, 10_000][rank]},
        {"budget": ["2 kB", "2001 B"][rank]},
        {"_freeze": bool(rank)},
        {"init": ["padded", "tails"][rank]},
    ):
        try:
            replicate(ResizableEmbedding(**{"num_embeddings": 10, "sizes": SIZES, **options}))
            said.append(None)
        except RuntimeError as error:
            said.append(str(error))
    return {"said": said}


def budgets(rank):
    """Equal budgets, of which some of the rows that the ranks name find no room."""
    torch.manual_seed(rank)
    table = ResizableEmbedding(100, sizes=SIZES, budget="80%")
    replicate(table)
    moved = []
    for first in (0, 50, 0, 25):
        ids = torch.arange(first, first + 50).flip(0)[rank::2]
        moved.append(table.promote(ids))
        moved.append(table.demote(ids[:5]))
    within = table.memory_report().serving <= table.budget
    return {"table": table.state_dict(), "refused": table.refused, "moved": moved, "within": within}


def thawed(rank):
    """Frozen when it is replicated, trained later: averaged from then on."""
    torch.manual_seed(0)
    table = ResizableEmbedding(10, sizes=(2, 8), dtype=torch.float64, _freeze=True)
    replicate(table)
    frozen = not any(p.requires_grad for p in table.parameters())
    table.requires_grad_(True)
    table(torch.tensor([rank, 2])).sum().backward()
    return {"frozen": frozen, "grads": {k: p.grad for k, p in table.named_parameters()}}


def smallest(rank):
    """To the smallest size, which nothing has to grow to: refused by one rank, then together."""
    torch.manual_seed(0)
    model = Model()
    replicate(model)
    said = None
    try:
        model.table.resize(torch.tensor([ROWS if rank else 0]), 2)
    except Exception as error:
        said = type(error).__name__
    moved = model.table.promote(torch.tensor([rank]))
    return {"said": said, "moved": moved, "sizes": model.table.sizes_of()}


def main():
    cases, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        # Against a rank that waits for ever; a busy machine must not reach it.
        timeout=timedelta(minutes=30),
    )
    for case in cases.split(","):
        torch.manual_seed(0)
        torch.save(globals()[case](rank), folder / f"{case}.{rank}.pt")
        dist.barrier()
        (folder / f"{case}.{rank}.passed").touch()  # by every rank
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
