"""The search step: what it learns from, knows and changes, and the paths that must agree."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import esapn.search
from esapn.config import SearchConfig
from esapn.data.load import load_ratings
from esapn.data.stream import build_stream
from esapn.data.synthetic import synthetic_ratings
from esapn.models.two_tower import event_losses
from esapn.run.loop import Run
from esapn.table_state import Decision
from esapn_kernels.storage.arena import Arena

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml-100k"
TINY = {
    "sizes": (1, 2, 3),
    "hidden": 6,
    "policy_hidden": 6,
    "frequency_dim": 3,
    "max_frequency": 16,
    "batch_size": 50,
    "policy_lr": 1e-2,
    "lr": 1e-2,
    "row_lr": 1e-2,
}


def tiny_stream(events=1_000, task="binary", device="cpu", history=5, **counts):
    ratings = synthetic_ratings(events, **counts)
    return build_stream(ratings, task=task, batch_size=50, history=history, device=device)


@pytest.fixture
def double():
    """Everything that a search makes is float64: rounding does not hide a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(stream, **settings) -> Run:
    return Run(SearchConfig(**{**TINY, **settings}), stream)


def levels(run: Run) -> dict[str, torch.Tensor]:
    return {field.name: field.embedding.arena.level().clone() for field in run.search.fields}


def walk(run: Run, steps: int) -> torch.Tensor:
    return torch.cat([run.step() for _ in range(steps)])


# Rewards


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_loss_under_sampled_sizes_is_the_loss_under_present_sizes(task, share):
    stream = tiny_stream(task=task, n_users=200, n_items=200)
    run = tiny(stream, task=task, sizes=(1, 2, 3, 4, 6, 8))
    walk(run, 5)
    batch = stream.batch(4)
    promoted = deepcopy(run.model)
    for name in ("user", "item"):
        ids = getattr(batch, name).unique()
        embedding = getattr(promoted, name)
        before = embedding.sizes_of(ids)
        embedding.promote(ids, torch.rand(len(ids)) < share)
        assert (embedding.sizes_of(ids) > before).any()
    with torch.no_grad():
        present = event_losses(run.model(batch.user, batch.item), batch.target)
        sampled = event_losses(promoted(batch.user, batch.item), batch.target)
    torch.testing.assert_close(sampled, present, atol=1e-5, rtol=1e-5)


def test_rewards_use_what_was_known_before_the_batch(monkeypatch):
    """Baselines, seen flags, frequencies and losses of every policy step, against deques."""
    stream = tiny_stream(history=3)
    run = tiny(stream, history=3, sizes=(1, 2, 3, 4, 5, 6))
    rewards, frequencies, real_reward = [], [], esapn.search.reward
    monkeypatch.setattr(
        esapn.search, "reward", lambda *args: rewards.append(args) or real_reward(*args)
    )
    for field in run.search.fields:
        field.policy.register_forward_pre_hook(lambda _, args: frequencies.append(args[0]))
    names = ("user", "item")
    history = {name: {} for name in names}  # before the batch that is rewarded
    count = {name: {} for name in names}
    for index in range(12):
        rewards.clear(), frequencies.clear()
        batch, sizes = stream.batch(index), levels(run)
        losses = run.step()
        assert len(rewards) == 2
        for (baseline, loss, seen), frequency, name in zip(
            rewards, frequencies, names, strict=True
        ):
            ids = getattr(batch, name).tolist()
            rows = [
                row
                for row, code in enumerate(ids)
                if code not in ids[row + 1 :] and sizes[name][code] < 5
            ]
            kept = [history[name].get(ids[row], ()) for row in rows]
            assert seen.tolist() == [bool(k) for k in kept]
            assert baseline.tolist() == pytest.approx([sum(k) / max(len(k), 1) for k in kept])
            assert torch.equal(loss, losses[rows])
            for code in ids:
                count[name][code] = count[name].get(code, 0) + 1
            assert frequency.tolist() == [count[name][ids[row]] for row in rows]
            # Only now do the losses of the batch become known.
            for code, value in zip(ids, losses.tolist(), strict=True):
                history[name].setdefault(code, deque(maxlen=3)).append(value)


# What a step knows, and what it may change


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_prediction_does_not_depend_on_labels_to_come(task):
    stream = tiny_stream(task=task)
    seen = 6
    cut = stream.bounds[seen][0]
    other = stream.target.clone()
    other[cut:] = 1 - other[cut:] if task == "binary" else 4 - other[cut:]
    logits = []
    for target in (stream.target, other):
        run = tiny(replace(stream, target=target), task=task)
        logits.append([])
        run.model.register_forward_hook(lambda _, __, out: logits[-1].append(out.detach()))
        walk(run, seen + 1)
        assert len(logits[-1]) == seen + 1
        run.step()
    before = seen + 1
    for one, two in zip(logits[0][:before], logits[1][:before], strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(logits[0][-1], logits[1][-1])  # labels seen do matter


@pytest.mark.parametrize("always", [True, False])
def test_an_id_decides_once_and_moves_one_size(always, monkeypatch):
    if always:
        monkeypatch.setattr(
            esapn.search, "sample_actions", lambda logits, _: torch.ones(len(logits)).long()
        )
    stream = tiny_stream()
    run = tiny(stream)
    assert any(stream.batch(0).user.bincount() > 2)  # IDs come more than once
    promoted = []
    for field in run.search.fields:
        promote = field.embedding.promote
        monkeypatch.setattr(
            field.embedding,
            "promote",
            lambda ids, mask, p=promote: promoted.append(ids) or p(ids, mask),
        )
    for index in range(len(stream.bounds)):
        before, _ = levels(run), promoted.clear()
        run.step()
        after = levels(run)
        for ids in promoted:
            assert len(ids) == len(ids.unique())
        for field in run.search.fields:
            ids = getattr(stream.batch(index), field.name).unique()
            grown = after[field.name] - before[field.name]
            present = torch.zeros_like(grown, dtype=torch.bool)
            present[ids] = True
            assert grown[~present].eq(0).all()
            assert ((grown == 0) | (grown == 1)).all()
            assert grown[before[field.name] == 2].eq(0).all()
            if always:
                assert grown[present & (before[field.name] < 2)].eq(1).all()
    assert max(level.max() for level in after.values()) == 2


def test_ids_at_the_last_size_decide_nothing():
    stream = tiny_stream()
    run = tiny(stream)
    for field in run.search.fields:
        everyone = torch.arange(field.embedding.num_embeddings)
        field.embedding.promote(everyone)
        field.embedding.promote(everyone)
        field.policy.register_forward_hook(lambda *_: pytest.fail("a policy was called"))
    losses = walk(run, 3)
    assert losses.isfinite().all()
    assert all(level.eq(2).all() for level in levels(run).values())


# Reproducibility and agreement of the paths


def trace(stream, steps=20, **settings) -> list[torch.Tensor]:
    run = tiny(stream, **settings)
    out = []
    for _ in range(steps):
        out += [run.step(), *levels(run).values()]
    return out + [p.detach() for p in run.search.parameters()]


def test_equal_seeds_give_equal_runs_and_others_do_not():
    stream = tiny_stream()
    one, two, other = (trace(stream, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    assert any(not torch.equal(a, b) for a, b in zip(one[1::3], other[1::3], strict=False))


def masked(level, last, n_levels):
    return Decision(slice(None), last & (level < n_levels - 1))


@pytest.mark.parametrize("sizes", [(1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize(("task", "n"), [("binary", 200), ("multiclass", 200), ("binary", 20)])
def test_masked_and_compressed_decisions_agree(task, n, sizes, double, monkeypatch):
    """The masked form is that of a GPU; with 20 IDs there are batches in which none decides."""
    stream = tiny_stream(task=task, n_users=n, n_items=n)
    if task == "binary":
        stream = replace(stream, target=stream.target.double())
    compressed = trace(stream, sizes=sizes, task=task)
    monkeypatch.setattr(esapn.search, "deciding", masked)
    for one, two in zip(compressed, trace(stream, sizes=sizes, task=task), strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-7)


VARIANTS = {
    "normalised": {"advantage": "normalised", "entropy": 0.1},
    "rich": {"state": "rich"},
    "argmax": {"acting": "argmax"},
    "tuned": {"row_optimizer": "adagrad", "hops": "padded", "tower": "plain", "head": "plain"},
    "tails": {"row_optimizer": "adagrad", "hops": "tails"},
    "random": {"method": "random"},
    "thresholds": {"method": "thresholds", "threshold": 2.0},
    "power": {"method": "power"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [200, 20])
def test_masked_and_compressed_decisions_agree_in_every_variant(variant, n, double, monkeypatch):
    stream = tiny_stream(n_users=n, n_items=n)
    stream = replace(stream, target=stream.target.double())
    compressed = trace(stream, **VARIANTS[variant])
    monkeypatch.setattr(esapn.search, "deciding", masked)
    for one, two in zip(compressed, trace(stream, **VARIANTS[variant]), strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-7)


def test_draws_go_on_where_no_id_decides(monkeypatch):
    stream = tiny_stream()
    drawn = []
    for form in (esapn.search.deciding, masked):
        monkeypatch.setattr(esapn.search, "deciding", form)
        run = tiny(stream, sizes=(4,))
        walk(run, 3)
        drawn.append(torch.rand(8, generator=run.search.generator))
    assert torch.equal(*drawn)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"advantage": "normalised", "entropy": 0.1},
        {"state": "rich"},
        {"row_optimizer": "adagrad", "hops": "padded", "tower": "plain", "head": "plain"},
        {"acting": "argmax"},
        {"method": "thresholds", "threshold": 2.0},
        {"method": "random"},
    ],
    ids=str,
)
def test_a_step_does_not_wait_for_the_device(settings, device, monkeypatch):
    stream = tiny_stream(device=device)
    run = tiny(stream, **settings)
    walk(run, 3)
    reserve = Arena.reserve

    def looking(self, *args):  # the one place that may: when the arena runs out of room
        torch.cuda.set_sync_debug_mode("default")
        reserve(self, *args)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Arena, "reserve", looking)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [run.step() for _ in range(3, 12)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(losses).isfinite().all()


# FIXED


class PlainTower(torch.nn.Module):
    """TwoTower with one size, on ``nn.Embedding``."""

    def __init__(self, model) -> None:
        super().__init__()
        for name in ("user", "item"):
            weight = getattr(model, name).to_embedding().weight
            setattr(self, name, torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False))
        self.user_norm, self.item_norm = deepcopy(model.user_norm), deepcopy(model.item_norm)
        self.inference = deepcopy(model.inference)

    def forward(self, user, item):
        towers = [self.user_norm(self.user(user)), self.item_norm(self.item(item))]
        return self.inference(torch.cat(towers, 1))


@pytest.mark.parametrize(("task", "tower"), [("binary", "norm"), ("multiclass", "plain")])
def test_fixed_is_a_plain_embedding_model(task, tower):
    stream = tiny_stream(task=task)
    run = tiny(stream, task=task, method="fixed", tower=tower, fixed_size=4, seed=5)
    assert run.search is None
    plain = PlainTower(run.model)
    assert plain.user.weight.shape == (stream.n_users, 4)
    optimizer = torch.optim.Adam(plain.parameters(), lr=TINY["lr"])
    for index in range(6):
        batch = stream.batch(index)
        losses = event_losses(plain(batch.user, batch.item), batch.target)
        torch.testing.assert_close(run.step(), losses.detach(), atol=1e-4, rtol=1e-4)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    for name in ("user", "item"):
        rows = getattr(run.model, name).to_embedding().weight
        expected = getattr(plain, name).weight.detach()
        torch.testing.assert_close(rows, expected, atol=1e-3, rtol=1e-3)


# Learning


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("method", ["esapn", "fixed"])
def test_it_learns(task, method):
    settings = {"task": task, "method": method, "batch_size": 500, "sizes": (2, 4, 8)}
    settings |= {"fixed_size": 8, "hidden": 32, "policy_hidden": 32, "max_frequency": 64}
    config = SearchConfig(**settings, init_std=0.1, lr=2e-2, row_lr=2e-2)
    stream = build_stream(load_ratings("synthetic", events=20_000), task=task)
    result = Run(config, stream).walk()
    label = stream.labels(stream.n_train, len(stream.user)).double()
    if task == "binary":
        base_rate = label.var(correction=0).item()
    else:
        p = label.long().bincount() / len(label)
        base_rate = -(p * p.log()).sum().item()
    assert result.test["events"] == 5_000
    assert result.test["loss"] < 0.93 * base_rate
    assert np.mean([line["loss"] for line in result.log[-1:]]) < result.log[0]["loss"]


@pytest.mark.parametrize("order", ["shuffle", "time"])
def test_real_data(order):
    if not REAL.is_dir():
        pytest.skip("MovieLens may not be redistributed and ml-100k is not beside this checkout")
    stream = build_stream(load_ratings(REAL), order=order)
    run = Run(SearchConfig(hidden=32, policy_hidden=32, sizes=(2, 4, 8, 16)), stream)
    losses = walk(run, 20)
    assert losses.shape == (10_000,) and losses.isfinite().all()
    assert 0.15 < losses.mean() < 0.35
    for field in run.search.fields:
        seen = getattr(stream, field.name)[:10_000].unique()
        sizes = field.embedding.sizes_of()
        untouched = torch.ones_like(sizes, dtype=torch.bool)
        untouched[seen] = False
        assert sizes[seen].double().mean() > 4 and sizes[untouched].eq(2).all()
