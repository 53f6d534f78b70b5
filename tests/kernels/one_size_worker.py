"""Other processes of tests/kernels/test_one_size_torch.py.

``one_size_worker.py RANK WORLD FOLDER`` is one rank: it runs every case with torch's class and with
ours and saves what the test compares as ``FOLDER/RANK.pt``.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from esapn_kernels import ResizableEmbedding, ResizableEmbeddingBag

N, D, STEPS = 20, 4, 3
CLASSES = {
    "table": (nn.Embedding, ResizableEmbedding),
    "bag": (nn.EmbeddingBag, ResizableEmbeddingBag),
}


def hogwild(module, answers, ids, said):
    """In a process of its own: read shared rows, write others, train one."""
    module.weight.grad = None
    with torch.no_grad():
        answers.copy_(module.weight[0])
        module.weight[1] = 5.0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(ids).sum().backward()
    optimizer.step()
    said.put(module.weight.is_shared())


class Model(nn.Module):
    def __init__(self, cls):
        super().__init__()
        sizes = {} if cls in (nn.Embedding, nn.EmbeddingBag) else {"sizes": (D,)}
        self.table = cls(N, D, **sizes)
        self.head = nn.Linear(D, 2)

    def forward(self, ids):
        return self.head(self.table(ids).tanh()).square()


def batch(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(N, (6, 3), generator=generator)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def steps(model, wrapped, optimizer, rank):
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(batch(step, rank)).mean().backward()
        optimizer.step()
    return {name: whole(p) for name, p in model.named_parameters()}


def ddp(cls, rank):
    torch.manual_seed(rank)  # DDP takes rank 0's numbers
    model = Model(cls)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return steps(model, DistributedDataParallel(model), optimizer, rank)


def fsdp(cls, rank):
    torch.manual_seed(0)
    model = Model(cls)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.table, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert model.table.weight.to_local().shape == (N // 2, D)
    return steps(model, model, torch.optim.Adam(model.parameters(), lr=0.1), rank)


CASES = (ddp, fsdp)


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        # Against a rank that waits for ever; a busy machine must not reach it.
        timeout=timedelta(minutes=30),
    )
    found = {}
    for case in CASES:
        for kind, classes in CLASSES.items():
            for name, cls in zip(("theirs", "ours"), classes, strict=True):
                try:
                    found[case.__name__, kind, name] = case(cls, rank)
                except Exception as error:
                    found[case.__name__, kind, name] = f"{type(error).__name__}: {error}"
                torch.save(found, folder / f"{rank}.pt")
                dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
