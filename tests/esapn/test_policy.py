"""The policy of one side: REINFORCE by hand, masked norms, loss histories against deques."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esapn.data.load import load_ratings
from esapn.data.ratings import Ratings
from esapn.data.stream import build_stream
from esapn.idstate import num_features
from esapn.policy import (
    LossHistory,
    MaskedBatchNorm,
    Policy,
    RunningScale,
    entropy,
    policy_loss,
    reward,
    sample_actions,
)

MASKS = {
    "some": [True, False, True, True, False, True],
    "two": [False, False, True, False, False, True],
    "one": [False, True, False, False, False, False],
    "all": [True] * 6,
}

# REINFORCE


def test_reward_by_hand():
    baseline, loss = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.75])
    seen = torch.tensor([True, True, False])
    assert reward(baseline, loss, seen).tolist() == [0.25, -0.25, 0.0]


def test_policy_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # pi: (1/4, 3/4), (4/5, 1/5)
    action, gain = torch.tensor([1, 1]), torch.tensor([2.0, -1.0])
    first, second = -2 * math.log(3 / 4), math.log(1 / 5)
    assert policy_loss(logits, action, gain, None).item() == pytest.approx(first + second)
    mask = torch.tensor([True, False])
    assert policy_loss(logits, action, gain, mask).item() == pytest.approx(first)
    assert policy_loss(logits, action, gain, torch.zeros(2, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("action", [0, 1])
@pytest.mark.parametrize("gain", [0.7, -0.7])
def test_policy_gradient_by_hand(action, gain):
    logits = torch.tensor([[0.3, -0.4]], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([action])
    policy_loss(logits, chosen, torch.tensor([gain]), None).backward()
    pi = torch.softmax(logits.detach(), dim=1)
    expected = gain * (pi - torch.eye(2, dtype=torch.float64)[chosen])
    torch.testing.assert_close(logits.grad, expected)
    moved = torch.softmax(logits.detach() - 0.1 * logits.grad, dim=1)
    assert (moved[0, action] > pi[0, action]) == (gain > 0)


@pytest.mark.parametrize("action", [0, 1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_raises_what_was_rewarded_and_lowers_what_was_punished(action, sign):
    policy = Policy(3, max_frequency=20, frequency_dim=4, hidden=8)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    frequency, level = torch.arange(1, 9), torch.arange(8) % 2
    chosen, gain = torch.full((8,), action), torch.full((8,), sign)
    before = torch.log_softmax(policy(frequency, level), dim=1)[:, action].sum()
    policy_loss(policy(frequency, level), chosen, gain, None).backward()
    optimizer.step()
    after = torch.log_softmax(policy(frequency, level), dim=1)[:, action].sum()
    assert (after > before) if sign > 0 else (after < before)


def test_masked_entries_get_no_gradient():
    logits = torch.randn(6, 2, requires_grad=True)
    mask = torch.tensor(MASKS["some"])
    policy_loss(logits, torch.ones(6, dtype=torch.int64), torch.randn(6), mask).backward()
    assert logits.grad is not None
    assert logits.grad[~mask].eq(0).all() and logits.grad[mask].ne(0).all()


def test_masked_rewards_that_are_not_finite_do_not_leak():
    logits = torch.randn(3, 2, requires_grad=True)
    gain = torch.tensor([1.0, math.inf, math.nan])
    mask = torch.tensor([True, False, False])
    loss = policy_loss(logits, torch.tensor([0, 1, 0]), gain, mask)
    assert loss.isfinite()


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 5.0]])
    first = -(1 / 4 * math.log(1 / 4) + 3 / 4 * math.log(3 / 4))
    assert entropy(logits, None).item() == pytest.approx(first + math.log(2))
    assert entropy(logits, torch.tensor([True, False])).item() == pytest.approx(first)
    certain = torch.tensor([[0.0, 900.0]], requires_grad=True)
    entropy(certain, None).backward()
    assert entropy(certain, None).item() == 0.0 and certain.grad.eq(0).all()


def test_masked_ids_have_no_entropy():
    logits = torch.randn(6, 2, requires_grad=True)
    mask = torch.tensor(MASKS["some"])
    total = entropy(logits, mask)
    total.backward()
    torch.testing.assert_close(total.detach(), entropy(logits[mask].detach(), None))
    assert logits.grad[~mask].eq(0).all() and logits.grad[mask].ne(0).all()


def test_running_scale_by_hand():
    scale = RunningScale(decay=0.9)
    assert [value.item() for value in scale.moments()] == [0.0, 1.0]  # nothing known
    scale.update(torch.tensor([1.0, 3.0]), None)  # means 2 and 5
    scale.update(torch.tensor([-1.0, 5.0, 2.0]), torch.tensor([True, False, True]))  # 1/2, 5/2
    mean, spread = scale.moments()
    assert mean.item() == pytest.approx((0.9 * 2 + 0.5) / 1.9)
    assert spread.item() == pytest.approx(math.sqrt((0.9 * 5 + 2.5) / 1.9))


def test_running_scale_without_rewards_stays():
    scale = RunningScale()
    scale.update(torch.tensor([1.0, 3.0]), None)
    before = scale.sums.clone()
    scale.update(torch.empty(0), None)
    scale.update(torch.tensor([math.nan, math.inf]), torch.tensor([False, False]))
    assert torch.equal(scale.sums, before)
    scale.update(torch.tensor([2.0, math.inf]), torch.tensor([True, False]))
    assert scale.sums.isfinite().all()


def test_sample_actions_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [math.log(4), 0.0]])
    assert sample_actions(logits, torch.tensor([0.74, 0.76, 0.19])).tolist() == [1, 0, 1]


def test_sampled_frequency_is_the_probability():
    logits = torch.tensor([0.0, 1.0]).expand(20_000, 2)
    share = sample_actions(logits, torch.rand(20_000)).double().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.015)


# The network


@pytest.mark.parametrize("name", [*MASKS, "none given"])
def test_masked_norm_is_batch_norm_of_the_selected_rows(name):
    norm = MaskedBatchNorm(4).double()
    plain = torch.nn.BatchNorm1d(4).double()
    mask = torch.tensor(MASKS.get(name, MASKS["all"]))
    for parameter, other in zip(norm.parameters(), plain.parameters(), strict=True):
        torch.nn.init.normal_(parameter)
        other.data.copy_(parameter.data)
    x = torch.randn(6, 4, dtype=torch.float64).mul(3).add(5).requires_grad_()
    weight = torch.randn(6, 4, dtype=torch.float64)
    out = norm(x, mask if name in MASKS else None)
    (out * weight)[mask].sum().backward()
    if int(mask.sum()) == 1:  # nn.BatchNorm1d refuses a single row
        assert torch.equal(out[mask][0], norm.bias)
        assert x.grad.isfinite().all()
        return
    rows = x.detach()[mask].requires_grad_()
    expected = plain(rows)
    (expected * weight[mask]).sum().backward()
    torch.testing.assert_close(out[mask], expected)
    torch.testing.assert_close(x.grad[mask], rows.grad)
    assert x.grad[~mask].eq(0).all()
    for parameter, other in zip(norm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_no_selected_row_gives_no_nan():
    policy = Policy(3, max_frequency=9, frequency_dim=4, hidden=5)
    mask = torch.zeros(6, dtype=torch.bool)
    logits = policy(torch.arange(1, 7), torch.arange(6) % 3, mask)
    assert logits.isfinite().all()
    policy_loss(logits, torch.ones(6, dtype=torch.int64), torch.ones(6), mask).backward()
    assert all(p.grad.eq(0).all() for p in policy.parameters())


@pytest.mark.parametrize("name", MASKS)
def test_masked_policy_is_the_policy_of_the_selected_rows(name):
    policy = Policy(4, max_frequency=9, frequency_dim=3, hidden=7).double()
    frequency, level = torch.tensor([1, 5, 9, 2, 30, 2]), torch.tensor([0, 2, 1, 0, 3, 1])
    mask, action = torch.tensor(MASKS[name]), torch.tensor([0, 1, 1, 0, 1, 0])
    gain = torch.randn(6, dtype=torch.float64)
    gradients = []
    outputs = []
    for rows, given_mask in ((slice(None), mask), (mask.nonzero()[:, 0], None)):
        policy.zero_grad()
        logits = policy(frequency[rows], level[rows], given_mask)
        policy_loss(logits, action[rows], gain[rows], given_mask).backward()
        outputs.append(logits if given_mask is None else logits[given_mask])
        gradients.append([p.grad.clone() for p in policy.parameters()])
    torch.testing.assert_close(outputs[0], outputs[1])
    for masked, compressed in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, compressed)


def test_frequencies_from_the_last_on_share_a_row():
    policy = Policy(2, max_frequency=4, frequency_dim=3, hidden=5)
    level = torch.zeros(3, dtype=torch.int64)
    shared = policy(torch.tensor([1, 4, 9]), level)
    assert torch.equal(shared, policy(torch.tensor([1, 900, 4]), level))
    assert not torch.equal(shared, policy(torch.tensor([1, 3, 4]), level))


def test_policy_sees_frequency_and_level():
    # Whole vectors wide, as the default is: the remainder of a vector loop rounds otherwise.
    policy = Policy(3, frequency_dim=8, hidden=16)
    logits = policy(torch.tensor([1, 1, 2, 1]), torch.tensor([0, 1, 0, 0]))
    assert torch.equal(logits[0], logits[3])
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", MASKS)
def test_rich_policy_sees_statistics_and_level_of_the_id_only(name):
    policy = Policy(4, rich=True, hidden=7).double()
    for parameter in policy.norm.parameters():
        torch.nn.init.normal_(parameter)
    statistics = torch.randn(6, num_features()).double()
    level, mask = torch.tensor([0, 2, 1, 0, 3, 1]), torch.tensor(MASKS[name])
    frequency = torch.arange(1, 7)
    logits = policy(frequency, level, mask, statistics)
    for row in range(6):  # whatever other IDs decide
        one = slice(row, row + 1)
        alone = policy(frequency[one] + 50, level[one], None, statistics[one])
        torch.testing.assert_close(alone, logits[one])
    state = torch.cat([statistics, torch.eye(4).double()[level]], dim=1)
    hidden = state @ policy.linear1.weight.T + policy.linear1.bias
    hidden = hidden - hidden.mean(1, keepdim=True)
    hidden = hidden / (hidden.square().mean(1, keepdim=True) + 1e-5).sqrt()
    hidden = torch.tanh(hidden * policy.norm.weight + policy.norm.bias)
    torch.testing.assert_close(hidden @ policy.linear2.weight.T + policy.linear2.bias, logits)


def test_an_indifferent_policy_starts_even():
    policy = Policy(3, frequency_dim=4, hidden=5, indifferent=True)
    logits = policy(torch.arange(1, 9), torch.arange(8) % 3)
    assert logits.eq(0).all()
    policy_loss(logits, torch.ones(8, dtype=torch.int64), torch.randn(8), None).backward()
    assert policy.linear2.weight.grad.ne(0).any()


# Histories


def walk(stream, length: int, n_ids: int, side: str) -> None:
    """Ring against deques, batch by batch: mean, seen, and the losses that are kept."""
    history = LossHistory(n_ids, length)
    deques = [deque(maxlen=length) for _ in range(n_ids)]
    generator = torch.Generator().manual_seed(1)
    everyone = torch.arange(n_ids)
    for index in range(len(stream.bounds)):
        batch = stream.batch(index)._asdict()
        ids, loss = batch[side], torch.rand(len(batch[side]), generator=generator)
        history.record(ids, batch[f"{side}_freq"], loss, batch[f"{side}_keep"])
        for code, value in zip(ids.tolist(), loss.tolist(), strict=True):
            deques[code].append(value)
        mean, seen = history.mean(everyone)
        assert seen.tolist() == [bool(kept) for kept in deques]
        assert mean.tolist() == pytest.approx([np.mean(kept) if kept else 0.0 for kept in deques])
        for code, kept in enumerate(deques):
            assert sorted(history.losses[code, : len(kept)].tolist()) == sorted(kept)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("side", ["user", "item"])
def test_history_against_deques_on_a_synthetic_stream(length, side):
    ratings = load_ratings("synthetic", events=600)
    stream = build_stream(ratings, batch_size=60, history=length)
    ids, _ = stream.bounds[0]
    repeated = torch.bincount(getattr(stream, side)[:60]).max()
    assert ids == 0 and repeated > length  # more often in a batch than the ring is long
    walk(stream, length, ratings.n_users if side == "user" else ratings.n_items, side)


@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=4, max_size=50),
    batch_size=st.integers(2, 20),
    length=st.integers(1, 6),
)
def test_history_against_deques(ids, batch_size, length):
    codes = np.asarray(ids, np.int64)
    rating = np.full(len(codes), 4.0, np.float32)
    ratings = Ratings(codes, codes, rating, np.arange(len(codes)), 4, 4, "made", "")
    stream = build_stream(
        ratings, order="time", batch_size=min(batch_size, len(codes) // 2), history=length
    )
    walk(stream, length, 4, "user")


def test_history_of_an_id_never_seen():
    history = LossHistory(2, 3)
    ids = torch.tensor([1])
    history.record(ids, torch.tensor([1]), torch.tensor([0.0]), torch.tensor([True]))
    mean, seen = history.mean(torch.tensor([0, 1, 0]))
    assert mean.tolist() == [0.0] * 3 and seen.tolist() == [False, True, False]
