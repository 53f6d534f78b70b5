"""Soft sizes: outputs against plain tensors, what is remembered, and who gets which gradient."""

from __future__ import annotations

import pytest
import torch

from esapn.models.recommender import Events
from esapn.models.soft import SoftEmbedding
from esapn.models.two_tower import SoftTwoTower, inference_layer

EPS = 1e-5
SIZES = (1, 2, 4)
IDS = torch.tensor([5, 0, 5, 3, 8, 0])
FREQUENCY = torch.tensor([3, 1, 4, 2, 30, 2], dtype=torch.int32)
LAST = torch.tensor([False, False, True, True, True, True])


def made(method: str, plain: bool = False) -> SoftEmbedding:
    """Ten rows with weights and norms that are not what they start as."""
    options = {"frequency_dim": 3, "max_frequency": 9, "hidden": 5, "plain": plain}
    table = SoftEmbedding(10, SIZES, method=method, **options).double()
    for module in table.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    with torch.no_grad():
        if method == "darts":
            table.logits.normal_()
        else:
            table.previous.copy_(torch.softmax(torch.randn(11, 3), dim=1))
    return table


def norm(x: torch.Tensor, module: torch.nn.BatchNorm1d) -> torch.Tensor:
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + EPS).sqrt() * module.weight + module.bias


def weights(table: SoftEmbedding, previous: torch.Tensor | None) -> torch.Tensor:
    if previous is None:
        z = table.logits[IDS]
    else:
        seen = norm(table.frequency.weight[[3, 1, 4, 2, 9, 2]], table.frequency_norm)
        linear1, norm1, _, linear2 = table.controller
        hidden = torch.cat([seen, previous[IDS]], 1) @ linear1.weight.T + linear1.bias
        z = torch.tanh(norm(hidden, norm1)) @ linear2.weight.T + linear2.bias
    return z.exp() / z.exp().sum(1, keepdim=True)


def expected(table: SoftEmbedding, w: torch.Tensor) -> torch.Tensor:
    """Every size by itself: its slice, its lift, the norm of its own batch."""
    total, begin = torch.zeros(len(IDS), SIZES[-1]).double(), 0
    for k, size in enumerate(SIZES):
        rows = table.rows.weight[IDS][:, begin : begin + size]
        h = rows @ table.lifts[k].weight.T + table.lifts[k].bias
        total = total + w[:, k : k + 1] * (
            h if table.norm is None else torch.tanh(norm(h, table.norm))
        )
        begin += size
    return total


@pytest.mark.parametrize("method", ["darts", "autoemb"])
@pytest.mark.parametrize("plain", [False, True])
def test_output_against_plain_tensors(method, plain):
    table = made(method, plain)
    previous = None if method == "darts" else table.previous.clone()
    w = weights(table, previous)
    torch.testing.assert_close(table.weights(IDS, FREQUENCY), w)
    torch.testing.assert_close(w.sum(1), torch.ones(6).double())
    torch.testing.assert_close(table(IDS, FREQUENCY, LAST), expected(table, w))


@pytest.mark.parametrize("method", ["darts", "autoemb"])
def test_statistics_are_those_of_each_size(method):
    """A size whose slice is a hundred times as large changes nothing of another one's part."""
    table = made(method)
    with torch.no_grad():
        before = expected(table, torch.eye(3).double()[[0] * 6])
        table.rows.weight[:, 1:] *= 100
    torch.testing.assert_close(expected(table, torch.eye(3).double()[[0] * 6]), before)
    w = table.weights(IDS, FREQUENCY)
    previous = None if method == "darts" else table.previous.clone()
    torch.testing.assert_close(w, weights(table, previous))
    torch.testing.assert_close(table(IDS, FREQUENCY), expected(table, w))


def test_all_sizes_start_alike_in_darts():
    table = SoftEmbedding(4, SIZES, method="darts")
    assert (
        table.weights(torch.arange(4), torch.ones(4).int()).tolist()
        == [pytest.approx([1 / 3] * 3)] * 4
    )


def test_autoemb_starts_from_the_smallest_size():
    assert SoftEmbedding(4, SIZES, method="autoemb").previous.tolist() == [[1.0, 0.0, 0.0]] * 5


def test_autoemb_remembers_the_weights_of_last_events():
    table = made("autoemb")
    before = table.previous.clone()
    w = table.weights(IDS, FREQUENCY).detach()
    assert torch.equal(table.previous, before)  # looking remembers nothing
    table(IDS, FREQUENCY)
    assert torch.equal(table.previous, before)
    table(IDS, FREQUENCY, LAST)
    for index in range(10):
        events = [row for row in range(6) if IDS[row] == index]
        kept = w[events[-1]] if events else before[index]
        torch.testing.assert_close(table.previous[index], kept)
    assert not table.previous.requires_grad
    with torch.no_grad():  # nor does the row of other events reach any ID
        table.previous[10] = float("nan")
    assert table(IDS, FREQUENCY, LAST).isfinite().all()


def test_the_event_that_is_flagged_is_remembered_wherever_it_stands():
    table = made("autoemb")
    w = table.weights(IDS, FREQUENCY).detach()
    table(IDS, FREQUENCY, torch.tensor([True, True, False, True, True, False]))
    torch.testing.assert_close(table.previous[[5, 0, 3, 8]], w[[0, 1, 3, 4]])


def test_autoemb_state_follows_what_it_remembers():
    table = made("autoemb")
    first = table.weights(IDS, FREQUENCY).detach()
    table(IDS, FREQUENCY, LAST)
    second = table.weights(IDS, FREQUENCY).detach()
    torch.testing.assert_close(second, weights(table, table.previous).detach())
    assert not torch.allclose(first, second)


def test_darts_logits_get_the_gradient_of_their_events():
    table = made("darts")
    upstream = torch.randn(6, 4).double()
    (table(IDS, FREQUENCY) * upstream).sum().backward()
    w = torch.softmax(table.logits.detach()[IDS], 1)
    parts = torch.stack(
        [expected(table, torch.eye(3).double()[[k] * 6]).detach() for k in range(3)], dim=1
    )  # [6, 3, 4]
    worth = (parts * upstream[:, None]).sum(2)  # dL/dw
    each = w * (worth - (w * worth).sum(1, keepdim=True))
    gradient = torch.zeros(10, 3).double().index_add_(0, IDS, each)
    torch.testing.assert_close(table.logits.grad, gradient)
    assert table.logits.grad[[1, 2, 4, 6, 7, 9]].eq(0).all()
    assert table.rows.weight.grad[IDS].ne(0).any(1).all()


@pytest.mark.parametrize("method", ["darts", "autoemb"])
def test_soft_parameters_are_what_the_weights_depend_on(method):
    table = made(method)
    probe = torch.randn(6, 3).double()
    (table.weights(IDS, FREQUENCY) * probe).sum().backward()
    reached = {id(p) for p in table.parameters() if p.grad is not None}
    assert reached == {id(p) for p in table.soft_parameters()}
    rest = {name for name, p in table.named_parameters() if id(p) not in reached}
    lifts = {f"lifts.{k}.{part}" for k in range(3) for part in ("weight", "bias")}
    assert rest == {"rows.weight", "norm.weight", "norm.bias"} | lifts


@pytest.mark.parametrize("init_std", [0.0, 0.1, 1.0])
def test_rows_start_with_the_given_spread(init_std):
    table = SoftEmbedding(2000, SIZES, method="darts", init_std=init_std)
    assert table.rows.weight.shape == (2000, 7) and table.embedding_dim == 4
    assert table.rows.weight.std().item() == pytest.approx(init_std, rel=0.05)


@pytest.mark.parametrize("plain_head", [False, True])
def test_both_sides_meet_in_the_inference_layer(plain_head):
    user, item = made("darts"), made("autoemb")
    model = SoftTwoTower(user, item, n_outputs=5, hidden=6, plain_head=plain_head).double()
    w = weights(item, item.previous.clone())
    towers = torch.cat([expected(user, weights(user, None)), expected(item, w)], dim=1)
    events = Events(IDS, FREQUENCY, LAST)
    logits = model(events, events)
    assert logits.shape == (6, 5)
    torch.testing.assert_close(logits, model.inference(towers))
    torch.testing.assert_close(item.previous[8], w[4].detach())
    assert isinstance(inference_layer(4, 6, 5, plain_head)[0], torch.nn.BatchNorm1d) != plain_head
