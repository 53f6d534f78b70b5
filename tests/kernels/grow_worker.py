"""One rank of tests/kernels/test_grow.py: ``grow_worker.py FOLDER WORLD RANK``.

Two ranks look up halves of the batch that one process looks up whole, in parts of their own number.
"""

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esapn_kernels import ResizableEmbedding
from esapn_kernels.distributed import replicate
from esapn_kernels.grow import ByCounts

ROWS, STEPS, BATCH = 300, 30, 64


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = ResizableEmbedding(ROWS, sizes=(2, 4, 8), dtype=torch.float64)
        self.head = nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, parts):
        return torch.cat([self.head(self.table(ids).tanh()) for ids in parts])


def train(folder, world, rank):
    """Saves what became of the table; the wrapper is gone before the group is."""
    torch.manual_seed(0)
    model = Model()
    wrapped = model
    if world > 1:
        replicate(model)
        wrapped = DistributedDataParallel(model)
    growth = ByCounts(model, "50%", every=3, half_life=900.0, scale=math.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        draw = (ROWS * torch.rand(BATCH, generator=generator) ** 3).long()
        mine = ((draw + 5 * step) % ROWS).chunk(world)[rank]
        optimizer.zero_grad()
        wrapped(mine.chunk(1 + 2 * rank)).square().mean().backward()
        optimizer.step()
        assert model.table.memory_report().serving <= model.table.budget
    table = growth.report().tables["table"]
    state = growth.state_dict()
    found = {
        "report": str(growth.report()),
        "sizes": model.table.sizes_of(),
        "state": model.state_dict(),
        "counts": state["counts"],
        "steps": state["steps"],
        "next": state["next"],
        "promoted": table.promoted,
        "demoted": table.demoted,
    }
    torch.save(found, folder / f"{world}.{rank}")


def main():
    folder, world, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if world == 1:
        train(folder, world, rank)
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    train(folder, world, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
