"""The recommender: losses and predictions by hand, the network against plain tensors."""

from __future__ import annotations

import math

import pytest
import torch

from esapn.models.two_tower import TwoTower, event_losses, predictions
from esapn_kernels.reference import split_chain

EPS = 1e-5


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_binary_losses_by_hand():
    logits = torch.tensor([[logit(0.9)], [logit(0.9)], [logit(0.25)], [0.0]])
    target = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = torch.tensor([0.01, 0.81, 0.0625, 0.25])
    torch.testing.assert_close(event_losses(logits, target), expected)
    assert predictions(logits).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_multiclass_losses_by_hand():
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25], [0.6, 0.1, 0.1, 0.1, 0.1]])
    target = torch.tensor([1, 0])
    losses = event_losses(probabilities.log() + 3.0, target)
    torch.testing.assert_close(losses, torch.tensor([-math.log(0.2), -math.log(0.6)]))
    assert predictions(probabilities.log()).tolist() == [2, 0]


@pytest.mark.parametrize("n_outputs", [1, 5])
def test_losses_keep_one_number_per_event(n_outputs):
    target = torch.ones(7) if n_outputs == 1 else torch.ones(7, dtype=torch.int64)
    assert event_losses(torch.randn(7, n_outputs), target).shape == (7,)
    assert predictions(torch.randn(7, n_outputs)).dtype == target.dtype


def normalised(x: torch.Tensor, norm: torch.nn.BatchNorm1d) -> torch.Tensor:
    var = (x - x.mean(0)).square().mean(0)
    return (x - x.mean(0)) / (var + EPS).sqrt() * norm.weight + norm.bias


def carried(embedding, ids: torch.Tensor) -> torch.Tensor:
    """y(x) of every id, row by row."""
    rows = []
    for index in ids.tolist():
        row = embedding.arena.read(index)
        level = embedding.sizes.index(len(row))
        for weight, bias in split_chain(embedding.chain, embedding.sizes)[level:]:
            row = weight @ row + bias
        rows.append(row)
    return torch.stack(rows)


def mixed_model(n_outputs: int) -> TwoTower:
    """Rows of all three sizes, and norms that are not the identity."""
    model = TwoTower(12, 9, sizes=(1, 3, 4), n_outputs=n_outputs, hidden=6).double()
    for embedding in (model.user, model.item):
        embedding.promote(torch.arange(2, embedding.num_embeddings))
        embedding.promote(torch.arange(5, embedding.num_embeddings))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("n_outputs", [1, 5])
def test_output_against_plain_tensors(n_outputs):
    model = mixed_model(n_outputs)
    user = torch.tensor([0, 3, 3, 7, 11, 0, 6])
    item = torch.tensor([8, 1, 4, 4, 0, 2, 8])
    towers = torch.cat(
        [
            torch.tanh(normalised(carried(model.user, user), model.user_norm[0])),
            torch.tanh(normalised(carried(model.item, item), model.item_norm[0])),
        ],
        dim=1,
    )
    norm0, linear1, norm1, _, linear2 = model.inference
    hidden = normalised(towers, norm0) @ linear1.weight.T + linear1.bias
    expected = torch.tanh(normalised(hidden, norm1)) @ linear2.weight.T + linear2.bias
    assert expected.shape == (7, n_outputs)
    torch.testing.assert_close(model(user, item), expected)


def test_plain_towers_pass_the_carried_rows_on():
    model = TwoTower(12, 9, sizes=(1, 3, 4), n_outputs=1, hidden=6, plain=True).double()
    model.user.promote(torch.arange(4))
    user, item = torch.tensor([0, 3, 11, 6]), torch.tensor([8, 1, 0, 2])
    rows = torch.cat([carried(model.user, user), carried(model.item, item)], dim=1)
    torch.testing.assert_close(model(user, item), model.inference(rows))


@pytest.mark.parametrize("n_outputs", [1, 5])
def test_a_plain_head_is_one_relu_layer(n_outputs):
    options = {"sizes": (1, 3, 4), "n_outputs": n_outputs, "hidden": 6}
    model = TwoTower(12, 9, **options, plain=True, plain_head=True).double()
    model.user.promote(torch.arange(4))
    user, item = torch.tensor([0, 3, 11, 6]), torch.tensor([8, 1, 0, 2])
    rows = torch.cat([carried(model.user, user), carried(model.item, item)], dim=1)
    linear1, _, linear2 = model.inference
    hidden = (rows @ linear1.weight.T + linear1.bias).clamp(min=0)
    expected = hidden @ linear2.weight.T + linear2.bias
    assert expected.shape == (4, n_outputs)
    torch.testing.assert_close(model(user, item), expected)
    # Without norms an event does not depend on the others of its batch.
    torch.testing.assert_close(model(user[:1], item[:1]), expected[:1])


def test_padded_hops_stay_as_they_were_made():
    model = TwoTower(12, 9, sizes=(1, 3, 4), n_outputs=1, hidden=6, hops="padded")
    for embedding in (model.user, model.item):
        assert embedding.init == "padded" and not embedding.chain.requires_grad
    model(torch.tensor([0, 3]), torch.tensor([8, 1])).sum().backward()
    assert model.user.chain.grad is None and model.user.arena.storage.grad is not None
    linear = TwoTower(12, 9, sizes=(1, 3, 4), n_outputs=1, hidden=6)
    assert linear.user.init == "linear" and linear.user.chain.requires_grad


def test_tails_are_trained():
    model = TwoTower(12, 9, sizes=(1, 3, 4), n_outputs=1, hidden=6, hops="tails", plain=True)
    assert [id(p) for p in model.tails()] == [id(t.chain) for t in (model.user, model.item)]
    assert all(chain.requires_grad and not chain.any() for chain in model.tails())
    model(torch.tensor([0, 3]), torch.tensor([8, 1])).sum().backward()
    assert all(chain.grad.any() for chain in model.tails())
    for options in ({"sizes": (4,), "hops": "tails"}, {"sizes": (1, 4)}):
        assert not TwoTower(12, 9, n_outputs=1, hidden=6, **options).tails()


def test_batch_statistics_are_those_of_the_selected_rows():
    model = mixed_model(1)
    user, item = torch.tensor([0, 3, 11, 6]), torch.tensor([8, 1, 0, 2])
    model(user, item)
    for norm, embedding, ids in (
        (model.user_norm[0], model.user, user),
        (model.item_norm[0], model.item, item),
    ):
        y = carried(embedding, ids)
        torch.testing.assert_close(norm.running_mean, 0.1 * y.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * y.var(0))


def test_rows_that_are_not_selected_do_not_matter():
    model = mixed_model(1)
    user, item = torch.tensor([0, 3, 11, 6]), torch.tensor([8, 1, 0, 2])
    before = model(user, item)
    with torch.no_grad():
        start = int(model.user.arena.row_start[4])
        model.user.arena.storage[start] += 100.0
    assert torch.equal(model(user, item), before)
    assert not torch.equal(model(torch.tensor([0, 3, 4, 6]), item), before)


def test_one_size_has_no_hops():
    model = TwoTower(4, 5, sizes=(3,), n_outputs=1, hidden=2)
    assert model.user.chain is None and model.item.chain is None
    assert model.user.sizes_of().tolist() == [3] * 4


@pytest.mark.parametrize("init_std", [0.0, 0.01, 1.0])
def test_rows_start_at_the_smallest_size_with_the_given_spread(init_std):
    model = TwoTower(2000, 1000, sizes=(2, 4), n_outputs=1, hidden=2, init_std=init_std)
    for embedding in (model.user, model.item):
        assert set(embedding.sizes_of().tolist()) == {2}
        rows = torch.stack([embedding.arena.read(i) for i in range(1000)])
        assert rows.std().item() == pytest.approx(init_std, rel=0.1)
