"""Tanh by way of the sigmoid against torch's own: values, gradients, and a head that learns."""

from __future__ import annotations

import copy

import pytest
import torch

from esapn.models.soft import SoftEmbedding
from esapn.models.tanh import Tanh, tanh
from esapn.models.two_tower import SoftTwoTower, TwoTower, event_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_within_two_eps(dtype):
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.randn(10_000) * 1e-3]).to(dtype)
    error = (tanh(x).double() - torch.tanh(x.double())).abs().max().item()
    assert error <= 2 * torch.finfo(dtype).eps
    ends = torch.tensor([-torch.inf, -1e30, -0.0, 0.0, 1e30, torch.inf, torch.nan], dtype=dtype)
    assert torch.equal(tanh(ends[:-1]), torch.tensor([-1.0, -1, 0, 0, 1, 1], dtype=dtype))
    assert tanh(ends).isnan().tolist() == [False] * 6 + [True]


def test_gradients():
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tanh, x)
    # A slice of a wider tensor, and from one: what torch.cat's backward passes on.
    assert torch.autograd.gradcheck(lambda x: torch.cat([tanh(x[:, :3]), tanh(x[:, 3:])], 1), x)


def test_the_argument_stays_as_it_is():
    x = torch.randn(5)
    before = x.clone()
    tanh(x)
    assert torch.equal(x, before)


def test_other_devices_take_torch_tanh():
    y = tanh(torch.empty(3, device="meta", requires_grad=True))
    assert y.grad_fn is not None and y.grad_fn.name() == "TanhBackward0"


def with_torch_tanh(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Tanh):
                setattr(parent, name, torch.nn.Tanh())
                replaced += 1
    assert replaced
    return model


def soft() -> SoftTwoTower:
    tables = [SoftEmbedding(n, (2, 4), method="autoemb", hidden=6) for n in (12, 9)]
    return SoftTwoTower(*tables, n_outputs=1, hidden=8)


def two_tower() -> TwoTower:
    return TwoTower(12, 9, sizes=(2, 4), n_outputs=1, hidden=8)


@pytest.mark.parametrize("build", [two_tower, soft])
def test_learns_as_with_torch_tanh(build, monkeypatch):
    """Losses, gradients, parameters and running statistics of several steps."""
    torch.manual_seed(0)
    ours = build().double()
    theirs = with_torch_tanh(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    frequency = torch.ones(20, dtype=torch.int32)
    for _ in range(5):
        user, item = torch.randint(12, (20,)), torch.randint(9, (20,))
        target = torch.randint(2, (20,)).double()
        found = []
        for model in (ours, theirs):
            if model is theirs:
                monkeypatch.setattr("esapn.models.soft.tanh", torch.tanh)
            sides = (user, item)
            if build is soft:
                sides = tuple((ids, frequency) for ids in sides)
            loss = event_losses(model(*sides), target)
            model.zero_grad()
            loss.sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.05 * p.grad
            found.append((loss.detach(), gradients, dict(model.state_dict())))
            monkeypatch.undo()
        assert len(found[0][1]) == len(found[1][1])
        torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_single_precision_head(training):
    """Both modes of BatchNorm, with statistics that are not what they start as."""
    torch.manual_seed(0)
    ours = two_tower()
    user, item = torch.randint(12, (64,)), torch.randint(9, (64,))
    for _ in range(3):
        ours(user, item)
    theirs = with_torch_tanh(ours)
    logits = [model.train(training)(user, item) for model in (ours, theirs)]
    torch.testing.assert_close(*logits, atol=2e-6, rtol=0)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
