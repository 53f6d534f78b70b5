"""Whole steps against a slow search in which every row is a tensor of its own, in float64.

Nothing here uses the arena, the lookup, the policy's functions or ``torch.optim``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from esapn.config import SearchConfig
from esapn.data import build_stream, synthetic_ratings
from esapn.search import Search
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


class Adam:
    """Dense Adam over named tensors; a name without gradient has a gradient of zero."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.moments: dict = {}

    def forget(self, name) -> None:
        self.moments.pop(name, None)

    def step(self, tensors: dict, loss: torch.Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        self.t += 1
        for (name, x), g in zip(tensors.items(), gradients, strict=True):
            g = torch.zeros_like(x) if g is None else g
            m, v = self.moments.get(name, (torch.zeros_like(x), torch.zeros_like(x)))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.moments[name] = m, v
            m, v = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            with torch.no_grad():
                x -= self.lr * m / (v.sqrt() + ADAM_EPS)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def leaves(module: torch.nn.Module) -> dict:
    return {name: leaf(p) for name, p in module.named_parameters()}


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + EPS).sqrt() * weight + bias


class SlowSide:
    def __init__(self, side, sizes, policy_lr) -> None:
        self.name, self.sizes = side.name, sizes
        embedding = side.embedding
        self.rows = {i: leaf(embedding.arena.read(i)) for i in range(embedding.num_embeddings)}
        self.hops = [(leaf(w), leaf(b)) for w, b in split_chain(embedding.chain, sizes)]
        self.policy = leaves(side.policy)
        self.max_frequency = side.policy.max_frequency
        self.adam = Adam(policy_lr)
        self.losses: dict = defaultdict(list)  # of an ID, oldest first
        self.count: dict = defaultdict(int)  # events of an ID

    def carried(self, index: int) -> torch.Tensor:
        row = self.rows[index]
        for weight, bias in self.hops[self.sizes.index(len(row)) :]:
            row = weight @ row + bias
        return row

    def deciding(self, ids: list[int]) -> list[int]:
        """Positions at which an ID decides: its last one, unless it is at the last size."""
        last = {i: position for position, i in enumerate(ids)}
        return sorted(p for i, p in last.items() if len(self.rows[i]) < self.sizes[-1])

    def logits(self, ids: list[int], count: dict) -> torch.Tensor:
        p = self.policy
        row = [min(count[i], self.max_frequency) for i in ids]
        seen = norm(
            p["frequency.weight"][row], p["frequency_norm.weight"], p["frequency_norm.bias"]
        )
        onehot = torch.eye(len(self.sizes))[[self.sizes.index(len(self.rows[i])) for i in ids]]
        hidden = torch.cat([seen, onehot], 1) @ p["linear1.weight"].T + p["linear1.bias"]
        hidden = torch.tanh(norm(hidden, p["norm.weight"], p["norm.bias"]))
        return hidden @ p["linear2.weight"].T + p["linear2.bias"]


class SlowSearch:
    def __init__(self, search: Search) -> None:
        self.config, self.stream = search.config, search.stream
        sizes = search.config.sizes
        self.sides = [SlowSide(side, sizes, search.config.policy_lr) for side in search.sides]
        self.head = {
            name: tensor
            for name, tensor in leaves(search.model).items()
            if name.startswith(("user_norm", "item_norm", "inference"))
        }
        self.adam = Adam(search.config.lr)
        self.generator = torch.Generator().manual_seed(search.config.seed)

    def losses(self, ids: dict, target: torch.Tensor) -> torch.Tensor:
        h, towers = self.head, []
        for side in self.sides:
            y = torch.stack([side.carried(i) for i in ids[side.name]])
            prefix = f"{side.name}_norm.0"
            towers.append(torch.tanh(norm(y, h[f"{prefix}.weight"], h[f"{prefix}.bias"])))
        x = norm(torch.cat(towers, 1), h["inference.0.weight"], h["inference.0.bias"])
        x = x @ h["inference.1.weight"].T + h["inference.1.bias"]
        x = torch.tanh(norm(x, h["inference.2.weight"], h["inference.2.bias"]))
        z = x @ h["inference.4.weight"].T + h["inference.4.bias"]
        if self.config.task == "binary":
            return (1 / (1 + torch.exp(-z[:, 0])) - target) ** 2
        return -torch.log_softmax(z, 1)[torch.arange(len(z)), target]

    def events(self, index: int) -> tuple[dict, torch.Tensor]:
        part = slice(*self.stream.bounds[index])
        ids = {side.name: getattr(self.stream, side.name)[part].tolist() for side in self.sides}
        return ids, self.stream.target[part]

    def step(self, index: int) -> torch.Tensor:
        ids, target = self.events(index)
        chosen = [self.grow(side, ids[side.name]) for side in self.sides]
        losses = self.losses(ids, target)
        for side, choices in zip(self.sides, chosen, strict=True):
            self.learn_policy(side, ids[side.name], choices, losses.detach())
            for i, value in zip(ids[side.name], losses.tolist(), strict=True):
                side.losses[i].append(value)
        self.learn(losses)
        return losses.detach()

    def grow(self, side: SlowSide, mine: list[int]) -> list[tuple[int, torch.Tensor, int]]:
        """Positions that decide, their probabilities and actions; rows grow."""
        u = torch.rand(len(mine), generator=self.generator)
        for i in mine:
            side.count[i] += 1
        where = side.deciding(mine)
        assert where
        pi = torch.softmax(side.logits([mine[p] for p in where], side.count), 1)
        choices = [(p, q, int(u[p] < q[1])) for p, q in zip(where, pi, strict=True)]
        for p, _, action in choices:
            if action:
                row = side.rows[mine[p]]
                weight, bias = side.hops[side.sizes.index(len(row))]
                side.rows[mine[p]] = leaf(weight @ row + bias)
                self.adam.forget((side.name, mine[p]))
        return choices

    def learn_policy(
        self, side: SlowSide, mine: list[int], choices: list, now: torch.Tensor
    ) -> None:
        loss = torch.zeros(())
        for p, probabilities, action in choices:
            before = side.losses[mine[p]][-HISTORY:]
            if before:
                gain = sum(before) / len(before) - now[p]
                loss = loss - gain * torch.log(probabilities[action])
        if loss.requires_grad:
            side.adam.step(side.policy, loss)
        else:  # no ID has a history yet: a gradient of zero
            side.adam.step(side.policy, 0 * sum(q.sum() for _, q, _ in choices))

    def learn(self, losses: torch.Tensor) -> None:
        tensors = dict(self.head)
        for side in self.sides:
            tensors |= {(side.name, i): row for i, row in side.rows.items()}
            for k, (weight, bias) in enumerate(side.hops):
                tensors |= {(side.name, "W", k): weight, (side.name, "b", k): bias}
        self.adam.step(tensors, losses.sum())


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (2, 5)])
def test_steps_equal_those_of_the_slow_search(task, sizes):
    stream = build_stream(
        synthetic_ratings(200, n_users=30, n_items=40), task=task, batch_size=20, history=HISTORY
    )
    if task == "binary":
        stream = replace(stream, target=stream.target.double())
    assert stream.user[:20].bincount().max() > HISTORY
    config = SearchConfig(
        task=task,
        sizes=sizes,
        batch_size=20,
        hidden=5,
        history=HISTORY,
        policy_hidden=6,
        frequency_dim=3,
        max_frequency=2,
        lr=1e-2,
        policy_lr=1e-2,
        seed=3,
    )
    search = Search(config, stream)
    for optimizer in (search.optimizer, search.policy_optimizer):
        optimizer.param_groups[0]["eps"] = ADAM_EPS
    slow = SlowSearch(search)
    for index in range(4):
        torch.testing.assert_close(search.step(index), slow.step(index), atol=1e-9, rtol=1e-8)
    moved = 0
    for side, expected in zip(search.sides, slow.sides, strict=True):
        for i, row in expected.rows.items():
            moved += len(row) > sizes[0]
            torch.testing.assert_close(
                side.embedding.arena.read(i), row.detach(), atol=1e-8, rtol=0
            )
        hops = split_chain(side.embedding.chain.detach(), sizes)
        for pair, other in zip(hops, expected.hops, strict=True):
            for x, y in zip(pair, other, strict=True):
                torch.testing.assert_close(x, y.detach(), atol=1e-8, rtol=0)
        for name, p in side.policy.named_parameters():
            torch.testing.assert_close(
                p.detach(), expected.policy[name].detach(), atol=1e-7, rtol=0
            )
    assert moved > 20
