"""The metrics of every client's models with each kind of embedding, on synthetic data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from esapn_kernels import ResizableEmbedding
from tests.clients.shared import tables

SEEDS = (0, 1)
# Column of the table: kind of embedding, and whether rows grow; the first is not trained.
RUNS = {
    "untrained": ("plain", False),
    "plain": ("plain", False),
    "one size": ("one size", False),
    "default, never grown": ("default sizes", False),
    "default, grown": ("default sizes", True),
    "from half the width, grown": ("from half the width", True),
}
# The second table: rows grow and shrink by counts within a part of the plain tables' bytes.
# What ``ByCounts`` takes beside the model; of plain tables nothing.
BUDGETS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "50%": {"budget": "50%"},
    "25%": {"budget": "25%"},
    "25%, every=10": {"budget": "25%", "every": 10},
}
BUDGET_SEEDS = (0, 1, 2)
MOST_BEHIND = 0.005  # of an AUC that plain tables have
RISING = ("AUC", "NDCG@10", "Recall@10")
FIELDS = (300, 150, 30)  # ids of each


def popularity(n: int) -> np.ndarray:
    """The probabilities of ``n`` ids; they fall with the id."""
    weights = 1 / np.arange(10, n + 10)
    return weights / weights.sum()


def clicks(seed: int, events: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids ``[events]`` of every field, few of them often, and labels, drawn from their logits.

    A logit sums a number of every id, and for every two fields the product of four factors.
    """
    fixed = np.random.default_rng(0)
    numbers = [fixed.normal(0, 0.5, n) for n in FIELDS]
    factors = [fixed.normal(0, 0.9, (n, 4)) for n in FIELDS]
    draws = np.random.default_rng(seed)
    ids = [draws.choice(n, events, p=popularity(n)) for n in FIELDS]
    logits = sum(number[column] for number, column in zip(numbers, ids, strict=True))
    parts = [factor[column] for factor, column in zip(factors, ids, strict=True)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        logits = logits + (parts[one] * parts[other]).sum(1)
    return ids, (draws.random(events) < 1 / (1 + np.exp(-logits))).astype(np.float32)


def ratings(users: int = 300, items: int = 200, each: int = 30) -> list[tuple[int, int, int]]:
    """User, item and rating from 1 to 5: every user rates ``each`` items, rather liked ones."""
    draws = np.random.default_rng(0)
    liking = draws.normal(0, 0.8, (users, 4)) @ draws.normal(0, 0.8, (4, items))
    # By Gumbel's trick, a draw without replacement.
    chosen = 2 * liking + np.log(popularity(items)) + draws.gumbel(size=liking.shape)
    user, column = np.arange(users)[:, None], np.argsort(-chosen)[:, :each]
    noisy = 3 + 1.5 * (liking - liking.mean(1, keepdims=True)) + draws.normal(size=liking.shape)
    stars = noisy.round().clip(1, 5).astype(int)[user, column]
    rows = np.stack(np.broadcast_arrays(user, column, stars), axis=-1)
    return [tuple(row) for row in rows.reshape(-1, 3).tolist()]


class Epochs:
    """The epochs of one run, between which rows grow by the rule, where they are to.

    The rule: a row moves up one size if twice the next size is at most the square root of how often
    the row has been looked up in training so far.

    Args:
        count: how many.
        growing: whether rows grow.
    """

    def __init__(self, count: int, growing: bool) -> None:
        self.count = count
        self.growing = growing
        self.seen: dict[nn.Module, torch.Tensor] | None = None

    def begin(self, model: nn.Module) -> None:
        """Let rows grow, if this epoch is not the first."""
        if self.seen is None:
            self.seen = {t: torch.zeros(t.num_embeddings).long() for t in tables(model)}
            for table in self.seen:
                table.register_forward_pre_hook(self._count)
        elif self.growing:
            for table, seen in self.seen.items():
                following = dict(zip(table.sizes, (*table.sizes[1:], math.inf), strict=True))
                least = [(2 * following[size]) ** 2 for size in table.sizes_of().tolist()]
                table.promote(torch.arange(len(seen)), seen >= torch.tensor(least))

    def _count(self, table: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if table.training:
            assert self.seen is not None
            self.seen[table] += inputs[0].flatten().bincount(minlength=table.num_embeddings)

    def share(self) -> float:
        """How many numbers the rows have, of those that plain tables have."""
        assert self.seen
        held = sum(int(table.sizes_of().sum()) for table in self.seen)
        return held / sum(table.num_embeddings * table.embedding_dim for table in self.seen)


def measure(
    name: str,
    run: Callable[[int, Epochs], dict[str, float]],
    embeddings: Callable[[str], None],
    epochs: int,
) -> list[str]:
    """Rows of the table, one a metric: means over the seeds, and how far they are apart.

    One size must give the numbers of plain; trained models must be better than untrained ones.

    Args:
        name: of the client and its model.
        run: gives the metrics of a model that it builds and trains, from a seed and its epochs.
        embeddings: the fixture.
        epochs: how many.
    """
    found: dict[str, list[dict[str, float]]] = {}
    shares = dict.fromkeys(RUNS, 0.0)
    for column, (kind, growing) in RUNS.items():
        embeddings(kind)
        found[column] = []
        for seed in SEEDS:
            left = Epochs(0 if column == "untrained" else epochs, growing)
            found[column].append(run(seed, left))
            if growing:
                shares[column] += left.share() / len(SEEDS)
    assert found["one size"] == found["plain"]
    rows = []
    for metric in found["plain"][0]:
        cells, sign = [], 1 if metric in RISING else -1
        untrained = statistics.mean(scores[metric] for scores in found["untrained"])
        for column, runs in found.items():
            values = [scores[metric] for scores in runs]
            assert all(map(math.isfinite, values))
            mean, spread = statistics.mean(values), max(values) - min(values)
            assert column == "untrained" or sign * mean > sign * untrained, (column, metric)
            share = f" {shares[column]:.0%}" if shares[column] else ""
            cells.append(f"{mean:.4f} ({spread * 1e4:.0f}){share}")
        rows.append(f"| {name} | {metric} | {' | '.join(cells)} |")
    return rows


def measure_within(
    name: str,
    run: Callable[[int, dict[str, Any] | None], tuple[nn.Module, dict[str, float]]],
    embeddings: Callable[[str], None],
) -> list[str]:
    """Rows of the second table, one a metric: means over the seeds, and how far they are apart.

    No AUC may be more than ``MOST_BEHIND`` behind that of plain tables.

    Args:
        name: of the client and its model.
        run: gives a model that it builds and trains, and its metrics, from a seed and from what
            ``ByCounts`` takes, if it is to grow.
        embeddings: the fixture.
    """
    found: dict[str, list[dict[str, float]]] = {}
    shares = {}
    for column, options in BUDGETS.items():
        embeddings("plain" if options is None else "default sizes")
        runs = [run(seed, options) for seed in BUDGET_SEEDS]
        found[column] = [scores for _, scores in runs]
        shares[column] = ""
        if options is not None:
            shares[column] = f" {max(share_of_bytes(model) for model, _ in runs):.1%}"
    rows = []
    for metric in found["plain"][0]:
        cells, means = [], {}
        for column, runs in found.items():
            values = [scores[metric] for scores in runs]
            assert all(map(math.isfinite, values))
            means[column], spread = statistics.mean(values), max(values) - min(values)
            cells.append(f"{means[column]:.4f} ({spread * 1e4:.0f}){shares[column]}")
        if metric == "AUC":
            assert all(mean >= means["plain"] - MOST_BEHIND for mean in means.values()), means
        rows.append(f"| {name} | {metric} | {' | '.join(cells)} |")
    return rows


def share_of_bytes(model: nn.Module) -> float:
    """What the tables take to serve, of what plain ones do."""
    found = [m for m in model.modules() if isinstance(m, ResizableEmbedding)]
    plain = sum(table.num_embeddings * table.embedding_dim * 4 for table in found)
    return sum(table.memory_report().serving for table in found) / plain


def lines(columns: Iterable[str], rows: list[str]) -> list[str]:
    """The lines of a table, in Markdown."""
    names = ("client and model", "metric", *columns)
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *rows]
