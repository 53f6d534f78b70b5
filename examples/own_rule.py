"""Rows that grow by a rule of one's own, without the search: often seen, and still learning.

A row grows when it was seen often enough for its size and its gradient is still large. Compared, on
the same stream, with rows that never grow, that always grow, and that are all large from the start.

python examples/own_rule.py
"""

import argparse

import torch
from torch import Tensor

from esapn_kernels import ResizableEmbedding

SIZES = (2, 8, 32)


def stream(rows: int, steps: int, batch: int):
    """Ids, some far more frequent than others, and their targets: a hidden vector and noise."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, SIZES[-1], generator=generator)
    for _ in range(steps):
        ids = (rows * torch.rand(batch, generator=generator) ** 3).long()
        noise = torch.randn(batch, SIZES[-1], generator=generator)
        yield ids, hidden[ids] + noise


class OftenAndLearning:
    """The rule: ``count >= 8 d`` and the running mean of the gradient's norm above a threshold."""

    def __init__(self, rows: int) -> None:
        self.count = torch.zeros(rows)
        self.norm = torch.zeros(rows)

    def __call__(self, emb: ResizableEmbedding, ids: Tensor, grad: Tensor) -> Tensor:
        self.count += torch.bincount(ids, minlength=len(self.count))
        self.norm[ids] = 0.9 * self.norm[ids] + 0.1 * grad.norm(dim=1)
        return (self.count[ids] >= 8 * emb.sizes_of(ids)) & (self.norm[ids] > 0.5)


def run(name: str, rows: int, steps: int, batch: int) -> tuple[float, ResizableEmbedding]:
    """Mean squared error before learning, over the second half of the stream, and the module."""
    torch.manual_seed(1)
    initial = SIZES[-1] if name == "all large" else SIZES[0]
    emb = ResizableEmbedding(rows, sizes=SIZES, initial_size=initial, init_std=0.1)
    optimizer = torch.optim.Adam(emb.parameters(), lr=0.02)
    rule = OftenAndLearning(rows)
    losses = []
    for ids, target in stream(rows, steps, batch):
        y = emb(ids)
        y.retain_grad()
        error = (y - target).square()
        losses.append(float(error.detach().mean()))
        optimizer.zero_grad()
        error.mean(1).sum().backward()
        optimizer.step()
        if name == "own rule":
            emb.promote(ids, rule(emb, ids, y.grad))
        elif name == "always":
            emb.promote(ids)
    return sum(losses[steps // 2 :]) / (steps - steps // 2), emb


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, int]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000, help="rows of the table")
    parser.add_argument("--steps", type=int, default=600, help="batches of the stream")
    parser.add_argument("--batch", type=int, default=256, help="ids in a batch")
    options = parser.parse_args(arguments)
    if min(options.rows, options.steps, options.batch) < 1:
        parser.error("--rows, --steps and --batch must be at least 1")
    found = {}
    print(f"{'rows grow':<12}{'error':>8}{'bytes':>10}   rows by size")
    for name in ("never", "own rule", "always", "all large"):
        loss, emb = run(name, options.rows, options.steps, options.batch)
        report = emb.memory_report()
        found[name] = (loss, report.payload)
        print(f"{name:<12}{loss:>8.3f}{report.payload:>10,}   {report.rows_per_size}")
    return found


if __name__ == "__main__":
    main()
