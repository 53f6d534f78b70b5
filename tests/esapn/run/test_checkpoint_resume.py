"""Rows, optimizers and places of an arena, saved and loaded, go on bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esapn.run.checkpoint import load, save
from esapn_kernels import ResizableEmbedding, optim
from tests.helpers import same

ROWS = 400


class Run:
    """An embedding that grows, a head, and their optimizers."""

    def __init__(self, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.embedding = ResizableEmbedding(ROWS, sizes=(2, 4, 8), backend="torch")
        self.head = nn.Linear(8, 1)
        self.model = nn.ModuleDict({"embedding": self.embedding, "head": self.head})
        self.kind = kind

    def build(self) -> None:
        every = list(self.model.parameters())
        rest = [p for p in every if p is not self.embedding.arena.storage]
        rows = {
            "adam": lambda: torch.optim.Adam(every, lr=0.01, fused=True),
            "adagrad": lambda: torch.optim.Adagrad(every, lr=0.01),
            "adagrad from 0.1": lambda: torch.optim.Adagrad(
                every, lr=0.01, initial_accumulator_value=0.1
            ),
            "fused adam": lambda: optim.Adam(self.embedding, lr=0.01),
            "fused adagrad": lambda: optim.Adagrad(
                self.embedding, lr=0.01, initial_accumulator_value=0.1
            ),
            "fused rowwise": lambda: optim.Adagrad(self.embedding, lr=0.01, rowwise=True),
        }
        self.optimizers: list[torch.optim.Optimizer] = [rows[self.kind]()]
        if self.kind.startswith("fused"):
            self.optimizers.append(torch.optim.Adam(rest, lr=0.01, fused=True))

    def step(self, index: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(index)
        ids = torch.randint(0, ROWS, (40,), generator=random)
        self.embedding.promote(ids, torch.rand(40, generator=random) < 0.3)
        out = self.head(self.embedding(ids))
        (out - 1).square().sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return out.detach()

    def state(self) -> dict:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        free = self.embedding.arena.free_places()
        return {"model": self.model.state_dict(), "free": free, "optimizers": optimizers}

    def resume(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.embedding.arena.order_free_places(saved["free"])
        self.build()
        for optimizer, its in zip(self.optimizers, saved["optimizers"], strict=True):
            # Without gradients a step does nothing but have the arena follow the optimizer, whose
            # state then goes with rows that grow before the first true step.
            optimizer.step()
            optimizer.load_state_dict(its)


@pytest.mark.parametrize(
    "kind",
    ["adam", "adagrad", "adagrad from 0.1", "fused adam", "fused adagrad", "fused rowwise"],
)
@pytest.mark.parametrize("compacted", [False, True])
def test_a_run_goes_on_bit_for_bit(tmp_path, kind, compacted):
    """Outputs, rows, the places that rows take, free places and optimizer state."""
    run = Run(kind, seed=1)
    run.build()
    begun = run.embedding.arena.storage.numel()
    for index in range(15):
        run.step(index)
    if compacted:
        run.embedding.compact()
    save(tmp_path, 15, run.state())
    resumed = Run(kind, seed=2)
    resumed.resume(load(tmp_path).state)
    assert resumed.embedding.arena.storage.numel() > begun
    saved = run.embedding.arena.storage.numel()
    levels = run.embedding.arena.level().clone()
    same(resumed.state(), run.state(), "loaded")
    for index in range(15, 45):
        same(resumed.step(index), run.step(index), f"output of step {index}")
        same(resumed.state(), run.state(), f"step {index}")
    # Rows of every level moved, and the arena grew.
    assert (run.embedding.arena.level() > levels).sum() > 50
    assert run.embedding.arena.storage.numel() > saved
