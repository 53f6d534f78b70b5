"""Click prediction with tables over several ranks that grow their rows within a budget each.

Needs TorchRec: `make sharded` builds .venv-sharded. Every --save-every steps a checkpoint is
written beside training; a run that finds checkpoints in --out goes on from the last, on as many
ranks as it has now. Batches and the loss are the same on any number of ranks.

torchrun --nproc-per-node 2 examples/sharded.py --steps 200
torchrun --nproc-per-node 3 examples/sharded.py --steps 400                     goes on, on three
torchrun --nproc-per-node 2 --max-restarts 1 examples/sharded.py --out runs/killed --kill-at 120
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

from esapn_kernels import optim
from esapn_kernels.sharded import RaggedBagSharder, RaggedSharder, load, ragged_plan, save, tables

ROWS = {"user": 100_000, "item": 20_000, "seen": 20_000}
DIM, HIDDEN, BATCH, SEEN = 32, 4, 1024, 6


class ClickModel(nn.Module):
    """A user's and an item's vectors and the mean of those of items seen, into a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        meta = torch.device("meta")  # their memory is allocated by their owners
        self.each = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    num_embeddings=ROWS[name], embedding_dim=DIM, name=name, feature_names=[name]
                )
                for name in ("user", "item")
            ],
            device=meta,
        )
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    num_embeddings=ROWS["seen"],
                    embedding_dim=DIM,
                    name="seen",
                    feature_names=["seen"],
                    pooling=PoolingType.MEAN,
                )
            ],
            device=meta,
        )
        self.mlp = nn.Sequential(nn.Linear(3 * DIM, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        each, bags = self.each(features), self.bags(features)
        parts = [each["user"].values(), each["item"].values(), bags["seen"]]
        logit: Tensor = self.mlp(torch.cat(parts, dim=1))[:, 0]
        return logit


class Stream:
    """Clicks of a hidden model: few users and items have most of them."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        self.hidden = {n: rng.normal(0, 0.7, (rows, HIDDEN)) for n, rows in ROWS.items()}
        self.biases = {n: rng.normal(0, 0.5, rows) for n, rows in ROWS.items()}

    def lines(self, step: int, rank: int, world: int) -> tuple[KeyedJaggedTensor, Tensor]:
        """The part of a batch that a rank takes: features, and clicks ``[lines]``."""
        rng = np.random.default_rng((self.seed, step))
        lengths = rng.integers(0, SEEN + 1, BATCH)
        user, item = self._draw(rng, "user", BATCH), self._draw(rng, "item", BATCH)
        seen = self._draw(rng, "seen", int(lengths.sum()))
        line = np.repeat(np.arange(BATCH), lengths)
        taste = self.hidden["user"][user].copy()
        np.add.at(taste, line, self.hidden["seen"][seen] / np.maximum(lengths, 1)[line, None])
        logit = (taste * self.hidden["item"][item]).sum(1)
        logit += self.biases["user"][user] + self.biases["item"][item] - 1.0
        clicks = rng.random(BATCH) < 1 / (1 + np.exp(-logit))
        mine = np.arange(BATCH) % world == rank
        ones = np.ones(int(mine.sum()), dtype=np.int64)
        features = KeyedJaggedTensor(
            ["user", "item", "seen"],
            torch.from_numpy(np.concatenate([user[mine], item[mine], seen[mine[line]]])),
            lengths=torch.from_numpy(np.concatenate([ones, ones, lengths[mine]])),
        )
        return features, torch.from_numpy(clicks[mine]).float()

    @staticmethod
    def _draw(rng: np.random.Generator, name: str, n: int) -> np.ndarray:
        return ((ROWS[name] + 1) ** rng.random(n) - 1).astype(np.int64).clip(0, ROWS[name] - 1)


def last_checkpoint(folder: Path) -> Path | None:
    """The one with the most steps; what was not written to the end has another name."""
    found = [path for path in folder.glob("step-*") if path.suffix != ".part"]
    return max(found, default=None)


@contextlib.contextmanager
def ranks() -> Iterator[torch.device]:
    """Join the other processes that torchrun started."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # After a restart torchrun may keep the store, with addresses of processes that are gone.
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt {restarts()}", store),
        rank=rank,
        world_size=world,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def build(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model, its tables over all ranks."""
    torch.manual_seed(options.seed)
    model, make = ClickModel(), partial(optim.Adagrad, lr=0.05)
    return DistributedModelParallel(
        model,
        device=device,
        plan=ragged_plan(model, options.budget, device=device),
        sharders=[RaggedSharder(make, init_std=0.1), RaggedBagSharder(make, init_std=0.1)],
    )


class Run:
    """A model that trains, and goes on from the last checkpoint."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = build(options, device)
        self.growth = tables(self.model).grow(every=10)
        dense = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        self.optimizer = torch.optim.Adam(dense.values(), lr=1e-3)
        self.stream = Stream(options.seed)
        self.step, self.loss = 0, 0.0
        self.saving: Any = None
        if (path := last_checkpoint(options.out)) is not None:
            extra = load(self.model, path, optimizer=self.optimizer, growth=self.growth)
            self.step, self.loss = extra["step"], extra["loss"]
            say(f"step {self.step}: goes on from {path} on {self.world} ranks")

    def train(self) -> None:
        """To the last step."""
        while self.step < self.options.steps:
            if self.step == self.options.kill_at and self.rank == self.world - 1 and not restarts():
                os.kill(os.getpid(), signal.SIGKILL)
            features, clicks = self.stream.lines(self.step, self.rank, self.world)
            logit = self.model(features.to(self.device))  # predicted before it is learnt
            clicks = clicks.to(self.device)
            loss = F.binary_cross_entropy_with_logits(logit, clicks, reduction="sum")
            self.optimizer.zero_grad()
            # Gradients are means over the ranks: times their number, those of the batch's mean.
            (loss * self.world / BATCH).backward()
            self.optimizer.step()
            total = loss.detach()
            dist.all_reduce(total)
            self.step, self.loss = self.step + 1, self.loss + total.item()
            if self.step % self.options.save_every == 0 or self.step == self.options.steps:
                self.save()
        self.wait()

    def save(self) -> None:
        """Begin to write a checkpoint; the last one is there by then."""
        self.wait()
        path = self.options.out / f"step-{self.step:06d}"
        extra = {"step": self.step, "loss": self.loss}
        self.saving = save(
            self.model,
            path,
            optimizer=self.optimizer,
            growth=self.growth,
            extra=extra,
            wait=False,
        )
        say(f"step {self.step}: log loss {self.log_loss:.4f} so far, saves {path}")

    def wait(self) -> None:
        if self.saving is not None:
            self.saving.result()

    @property
    def log_loss(self) -> float:
        """Of all lines so far."""
        return self.loss / (max(self.step, 1) * BATCH)

    def result(self) -> dict[str, Any]:
        """What became of the rows of all ranks."""
        reports = tables(self.model).memory_report().values()
        rows = torch.tensor([list(r.rows_per_size.values()) for r in reports]).sum(0)
        mine = [sum(r.serving for r in reports), sum(r.budget or 0 for r in reports)]
        plain = sum(r.fixed for r in reports)
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, (*mine, plain, rows.tolist()))
        taken, budgets, fixed, counts = zip(*every, strict=True)
        sizes = next(iter(reports)).rows_per_size
        return {
            "ranks": self.world,
            "steps": self.step,
            "log_loss": self.log_loss,
            "bytes": taken,
            "budget": budgets,
            "plain": fixed,
            "rows": dict(zip(sizes, map(sum, zip(*counts, strict=True)), strict=True)),
        }


def restarts() -> int:
    """How often torchrun has started the processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def say(line: str) -> None:
    """Print once."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help=f"batches of {BATCH} lines")
    parser.add_argument(
        "--budget",
        default="25%",
        help="of a rank: as '1 MB', or '25%%' of its part of plain tables",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/sharded"), help="checkpoints")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=int, help="a process ends itself before this step, once")
    parser.add_argument("--seed", type=int, default=0, help="of the clicks and the model")
    options = parser.parse_args()
    if min(options.steps, options.save_every) < 1:
        parser.error("--steps and --save-every must be at least 1")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 examples/sharded.py")
    with ranks() as device:
        try:
            run = Run(options, device)
        except (OSError, RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        run.train()
        found = run.result()
        say(f"rows by size  {'  '.join(f'{d}: {n:,}' for d, n in found['rows'].items())}")
        for rank, (taken, most, plain) in enumerate(
            zip(found["bytes"], found["budget"], found["plain"], strict=True)
        ):
            say(f"rank {rank}: {taken:,} of {most:,} bytes; plain tables of {DIM} take {plain:,}")
        say(f"{found['steps']} steps: log loss {found['log_loss']:.4f}, predicted before learnt")
        if dist.get_rank() == 0:
            (options.out / "result.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
