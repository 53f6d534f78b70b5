"""Whole steps against a slow search in which every row is a tensor of its own, in float64.

Nothing here uses the arena, the lookup, the policy's functions or ``torch.optim``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from esapn.config import SearchConfig
from esapn.data.stream import build_stream
from esapn.data.synthetic import synthetic_ratings
from esapn.run.loop import Run
from esapn_kernels.reference import split_chain

EPS = 1e-5
HISTORY = 2
# A bias in front of BatchNorm has a gradient of exactly zero; with torch's own 1e-8, Adam would
# turn the 1e-14 that rounding leaves of it into steps larger than what is compared.
ADAM_EPS = 1e-4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients_of(loss: torch.Tensor, tensors: dict) -> dict:
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(tensors.items(), found, strict=True)
    }


class Adam:
    """Dense Adam over named tensors; a name without gradient has a gradient of zero."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.moments: dict = {}

    def grown(self, name, old: torch.Tensor, new: torch.Tensor) -> None:
        self.moments.pop(name, None)

    def step(self, tensors: dict, gradients: dict) -> None:
        self.t += 1
        for name, x in tensors.items():
            g = gradients[name]
            m, v = self.moments.get(name, (torch.zeros_like(x), torch.zeros_like(x)))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.moments[name] = m, v
            m, v = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            with torch.no_grad():
                x -= self.lr * m / (v.sqrt() + ADAM_EPS)


class Adagrad:
    """Adagrad over named tensors; rows that grow by zeros or tails take their sums along."""

    def __init__(self, config: SearchConfig) -> None:
        self.lr, self.start = config.row_lr, config.row_accumulator
        self.sums: dict = {}

    def grown(self, name, old: torch.Tensor, new: torch.Tensor) -> None:
        gain = math.sqrt(len(new) / len(old))  # e' = g e, so dL/de = g dL/de'
        added = torch.full((len(new) - len(old),), self.start)
        self.sums[name] = torch.cat([self.of(name, old) / gain**2, added])

    def of(self, name, x: torch.Tensor) -> torch.Tensor:
        return self.sums.get(name, torch.full_like(x, self.start))

    def step(self, tensors: dict, gradients: dict) -> None:
        for name, x in tensors.items():
            self.sums[name] = self.of(name, x) + gradients[name] ** 2
            with torch.no_grad():
                x -= self.lr * gradients[name] / (self.sums[name].sqrt() + 1e-10)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def leaves(module: torch.nn.Module) -> dict:
    return {name: leaf(p) for name, p in module.named_parameters()}


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + EPS).sqrt() * weight + bias


class Seen(NamedTuple):
    """What an ID left behind in the batches before."""

    first: int  # steps
    latest: int
    decayed: float
    loss: float
    square: float
    norm: float


class Choice(NamedTuple):
    position: int  # in the batch
    probabilities: torch.Tensor
    action: int


class SlowSide:
    def __init__(self, field, config) -> None:
        self.name, self.sizes, self.config = field.name, config.sizes, config
        embedding = field.embedding
        self.rows = {i: leaf(embedding.arena.read(i)) for i in range(embedding.num_embeddings)}
        self.learnt = [(leaf(w), leaf(b)) for w, b in split_chain(embedding.chain, self.sizes)]
        if config.hops == "tails":
            self.learnt = [
                (leaf(w[d:]), leaf(b[d:]))
                for (w, b), d in zip(self.learnt, self.sizes, strict=False)
            ]
        self.policy = leaves(field.policy)
        self.adam = Adam(config.policy_lr)
        self.losses: dict = defaultdict(list)  # of an ID, oldest first
        self.count: dict = defaultdict(int)  # events of an ID
        self.seen: dict = {}
        self.rewards: list = []  # moments of every batch that has any
        self.y = torch.empty(0)

    @property
    def hops(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.config.hops != "tails":
            return self.learnt
        found = []
        for weight, bias in self.learnt:
            more, d = weight.shape
            kept = math.sqrt((d + more) / d) * torch.eye(d)
            found.append((torch.cat([kept, weight]), torch.cat([torch.zeros(d), bias])))
        return found

    def carried(self, index: int) -> torch.Tensor:
        row = self.rows[index]
        for weight, bias in self.hops[self.sizes.index(len(row)) :]:
            row = weight @ row + bias
        return row

    def deciding(self, ids: list[int]) -> list[int]:
        """Positions at which an ID decides: its last one, unless it is at the last size."""
        last = {i: position for position, i in enumerate(ids)}
        return sorted(p for i, p in last.items() if len(self.rows[i]) < self.sizes[-1])

    def features(self, index: int, step: int) -> torch.Tensor:
        """The rich state of an ID, its event now counted but nothing of it known."""
        count = self.count[index]
        bucket = [float(2**k <= count < 2 ** (k + 1)) for k in range(16)]
        seen = self.seen.get(index, Seen(step, step, 0.0, 0.0, 0.0, 0.0))
        faded = seen.decayed * 2 ** (-(step - seen.latest) / 500)
        spread = math.sqrt(max(seen.square - seen.loss**2, 0.0))
        events = [math.log2(count) / 8, math.log2(1 + faded) / 8]
        age, length = math.log2(1 + step - seen.first) / 8, math.log2(seen.norm + 1e-4) / 8
        return torch.tensor([*bucket, *events, age, seen.loss, spread, length])

    def logits(self, ids: list[int], step: int) -> torch.Tensor:
        p = self.policy
        if self.config.state == "rich":
            known = torch.stack([self.features(i, step) for i in ids])
        else:
            last = self.config.max_frequency
            known = p["frequency.weight"][[min(self.count[i], last) for i in ids]]
            known = norm(known, p["frequency_norm.weight"], p["frequency_norm.bias"])
        onehot = torch.eye(len(self.sizes))[[self.sizes.index(len(self.rows[i])) for i in ids]]
        hidden = torch.cat([known, onehot], 1) @ p["linear1.weight"].T + p["linear1.bias"]
        weight, bias = p["norm.weight"], p["norm.bias"]
        if self.config.state == "rich":  # over the numbers of each ID
            hidden = norm(hidden.T, weight[:, None], bias[:, None]).T
        else:  # over the IDs that decide
            hidden = norm(hidden, weight, bias)
        hidden = torch.tanh(hidden)
        return hidden @ p["linear2.weight"].T + p["linear2.bias"]

    def moments(self, gains: list[float]) -> tuple[float, float]:
        """Running mean and mean square of rewards, those of this batch included."""
        if gains:
            n = len(gains)
            self.rewards.append((sum(gains) / n, sum(g * g for g in gains) / n))
        if not self.rewards:
            return 0.0, 1.0
        weights = [0.99**age for age in reversed(range(len(self.rewards)))]
        return tuple(
            sum(w * moment[k] for w, moment in zip(weights, self.rewards, strict=True))
            / sum(weights)
            for k in (0, 1)
        )

    def remember(self, ids: list[int], losses: list[float], g: torch.Tensor, step: int) -> None:
        """All losses of the batch, and of the last event of an ID the rest."""
        for i, value in zip(ids, losses, strict=True):
            self.losses[i].append(value)
        for i, position in {i: position for position, i in enumerate(ids)}.items():
            loss, length = losses[position], g[position].square().sum().sqrt().item()
            if i not in self.seen:
                self.seen[i] = Seen(step, step, 1.0, loss, loss**2, length)
                continue
            old = self.seen[i]
            means = [
                0.9 * kept + 0.1 * new
                for kept, new in zip(old[3:], (loss, loss**2, length), strict=True)
            ]
            faded = old.decayed * 2 ** (-(step - old.latest) / 500)
            self.seen[i] = Seen(old.first, step, faded + 1, *means)


class SlowSearch:
    def __init__(self, run: Run) -> None:
        self.config, self.stream = run.config, run.stream
        self.sides = [SlowSide(field, run.config) for field in run.search.fields]
        self.head = {
            name: tensor
            for name, tensor in leaves(run.model).items()
            if name.startswith(("user_norm", "item_norm", "inference"))
        }
        self.adam = Adam(run.config.lr)
        self.tails_adam = Adam(run.config.tail_lr)
        adagrad = run.config.row_optimizer == "adagrad"
        self.row_optimizer = Adagrad(run.config) if adagrad else Adam(run.config.row_lr)
        self.generator = torch.Generator().manual_seed(run.config.seed)
        self.index = 0

    def losses(self, ids: dict, target: torch.Tensor) -> torch.Tensor:
        """Loss of every event."""
        h, towers = self.head, []
        for side in self.sides:
            side.y = torch.stack([side.carried(i) for i in ids[side.name]])
            prefix = f"{side.name}_norm.0"
            if self.config.tower == "plain":
                towers.append(side.y)
            else:
                weight, bias = h[f"{prefix}.weight"], h[f"{prefix}.bias"]
                towers.append(torch.tanh(norm(side.y, weight, bias)))
        x = torch.cat(towers, 1)
        if self.config.head == "plain":
            x = (x @ h["inference.0.weight"].T + h["inference.0.bias"]).clamp(min=0)
            z = x @ h["inference.2.weight"].T + h["inference.2.bias"]
        else:
            x = norm(x, h["inference.0.weight"], h["inference.0.bias"])
            x = x @ h["inference.1.weight"].T + h["inference.1.bias"]
            x = torch.tanh(norm(x, h["inference.2.weight"], h["inference.2.bias"]))
            z = x @ h["inference.4.weight"].T + h["inference.4.bias"]
        if self.config.task == "binary":
            return (1 / (1 + torch.exp(-z[:, 0])) - target) ** 2
        return -torch.log_softmax(z, 1)[torch.arange(len(z)), target]

    def events(self) -> tuple[dict, torch.Tensor]:
        start, end = self.stream.bounds[self.index]
        ids = {
            side.name: getattr(self.stream, side.name)[start:end].tolist() for side in self.sides
        }
        return ids, self.stream.labels(start, end)

    def step(self) -> torch.Tensor:
        ids, target = self.events()
        chosen = [self.grow(side, ids[side.name]) for side in self.sides]
        losses = self.losses(ids, target)
        to_outputs = gradients_of(losses.sum(), {side.name: side.y for side in self.sides})
        for side, choices in zip(self.sides, chosen, strict=True):
            mine, g = ids[side.name], to_outputs[side.name]
            self.learn_policy(side, mine, choices, losses.detach())
            side.remember(mine, losses.tolist(), g, self.index)
        self.learn(losses)
        self.index += 1
        return losses.detach()

    def grow(self, side: SlowSide, mine: list[int]) -> list[Choice]:
        """Positions that decide, their probabilities and actions; rows grow."""
        u = torch.rand(len(mine), generator=self.generator)
        for i in mine:
            side.count[i] += 1
        where = side.deciding(mine)
        assert where
        pi = torch.softmax(side.logits([mine[p] for p in where], self.index), 1)
        choices = [
            Choice(p, q, int((u[p] if self.config.acting == "sample" else 0.5) < q[1]))
            for p, q in zip(where, pi, strict=True)
        ]
        for p, _, action in choices:
            if action:
                row = side.rows[mine[p]]
                weight, bias = side.hops[side.sizes.index(len(row))]
                side.rows[mine[p]] = leaf(weight @ row + bias)
                self.row_optimizer.grown((side.name, mine[p]), row, side.rows[mine[p]])
        return choices

    def learn_policy(
        self,
        side: SlowSide,
        mine: list[int],
        choices: list[Choice],
        now: torch.Tensor,
    ) -> None:
        config = self.config
        loss = 0 * sum(c.probabilities.sum() for c in choices)
        known = [c for c in choices if side.losses[mine[c.position]]]
        gains = []
        for c in known:
            before = side.losses[mine[c.position]][-HISTORY:]
            gains.append(sum(before) / len(before) - now[c.position].item())
        if config.advantage == "normalised":
            mean, square = side.moments(gains)
            deviation = math.sqrt(max(square - mean**2, 1e-12))
            gains = [(gain - mean) / deviation for gain in gains]
        for c, gain in zip(known, gains, strict=True):
            loss = loss - gain * torch.log(c.probabilities[c.action])
        for _, q, _ in choices:
            loss = loss + config.entropy * (q * torch.log(q)).sum()
        side.adam.step(side.policy, gradients_of(loss, side.policy))

    def learn(self, losses: torch.Tensor) -> None:
        rows: dict = {}
        tails: dict = {}
        rest = dict(self.head)
        for side in self.sides:
            rows |= {(side.name, i): row for i, row in side.rows.items()}
            if self.config.hops == "padded":  # as they were made
                continue
            into = tails if self.config.hops == "tails" else rest
            for k, (weight, bias) in enumerate(side.learnt):
                into |= {(side.name, "W", k): weight, (side.name, "b", k): bias}
        gradients = gradients_of(losses.sum(), rows | rest | tails)
        self.row_optimizer.step(rows, gradients)
        self.adam.step(rest, gradients)
        self.tails_adam.step(tails, gradients)


TUNED = {
    "row_optimizer": "adagrad",
    "row_lr": 0.05,
    "hops": "padded",
    "tower": "plain",
    "head": "plain",
    "init_std": 0.3,
}
VARIANTS = {
    "paper": {},
    "own rate of rows": {"row_lr": 3e-2},
    "tuned": TUNED,
    "normalised": {"advantage": "normalised"},
    "entropy": {"entropy": 0.3},
    "rich": {"state": "rich"},
    "all": {"state": "rich", "advantage": "normalised", "entropy": 0.1} | TUNED,
    "argmax": {"acting": "argmax"},
    "tails": TUNED | {"hops": "tails", "tail_lr": 0.03},
    "accumulator": TUNED | {"row_accumulator": 0.02},
}


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_those_of_the_slow_search(variant, task, sizes):
    stream = build_stream(
        synthetic_ratings(200, n_users=30, n_items=40), task=task, batch_size=20, history=HISTORY
    )
    if task == "binary":
        stream = replace(stream, target=stream.target.double())
    assert stream.user[:20].bincount().max() > HISTORY
    settings = {
        "task": task,
        "sizes": sizes,
        "batch_size": 20,
        "hidden": 5,
        "history": HISTORY,
        "policy_hidden": 6,
        "frequency_dim": 3,
        "max_frequency": 2,
        "lr": 1e-2,
        "row_lr": 1e-2,
        "policy_lr": 1e-2,
        "seed": 3,
    }
    run = Run(SearchConfig(**settings | VARIANTS[variant]), stream)
    for optimizer in (*run.optimizers, run.search.optimizer):
        if isinstance(optimizer, torch.optim.Adam):
            optimizer.param_groups[0]["eps"] = ADAM_EPS
    slow = SlowSearch(run)
    for _ in range(5):
        torch.testing.assert_close(run.step(), slow.step(), atol=1e-9, rtol=1e-8)
    moved = 0
    for field, expected in zip(run.search.fields, slow.sides, strict=True):
        for i, row in expected.rows.items():
            moved += len(row) > sizes[0]
            torch.testing.assert_close(
                field.embedding.arena.read(i), row.detach(), atol=1e-8, rtol=0
            )
        hops = split_chain(field.embedding.chain.detach(), sizes)
        for pair, other in zip(hops, expected.hops, strict=True):
            for x, y in zip(pair, other, strict=True):
                torch.testing.assert_close(x, y.detach(), atol=1e-8, rtol=0)
        for name, p in field.policy.named_parameters():
            torch.testing.assert_close(
                p.detach(), expected.policy[name].detach(), atol=1e-7, rtol=0
            )
    assert moved > (20 if run.config.acting == "sample" else 5)
