"""The search on a model of one's own: tables of several ids, what a user may get wrong."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch

import esapn
from esapn import SearchConfig, SizeSearch
from esapn_kernels import ResizableEmbedding
from tests.helpers import same


class Recommender(torch.nn.Module):
    """Of three tables one is looked up with several ids an example."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.user = ResizableEmbedding(20, sizes=(1, 2, 4), **options)
        self.item = ResizableEmbedding(30, sizes=(2, 4), **options)
        self.words = ResizableEmbedding(50, sizes=(1, 4), **options)
        self.out = torch.nn.Linear(12, 1)

    def forward(self, ids):
        user, item = self.user(ids["user"]), self.item(ids["item"])
        words = self.words(ids["words"]).mean(1)
        return self.out(torch.cat([user, item, words], 1))[:, 0]


SEARCH = {"policy_hidden": 6, "frequency_dim": 3, "max_frequency": 16, "history": 2}


def batches(n: int):
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, *shape: int) -> torch.Tensor:
        return torch.randint(rows, shape, generator=generator)

    for _ in range(n):
        ids = {"user": draw(20, 8), "item": draw(30, 8), "words": draw(50, 8, 5)}
        yield ids, torch.rand(8, generator=generator)


def library(**settings) -> tuple[Recommender, SizeSearch]:
    torch.manual_seed(3)
    model = Recommender()
    config = SearchConfig(**SEARCH, **settings)
    tables = {"user": model.user, "item": model.item, "words": model.words}
    return model, SizeSearch(tables, config)


@pytest.mark.parametrize(
    "settings",
    [{}, {"state": "rich"}, {"advantage": "normalised"}, {"method": "always"}],
    ids=str,
)
def test_any_model_with_any_tables(settings):
    model, search = library(**settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = [p.clone() for p in search.parameters()]
    count = {name: Counter() for name in ("user", "item", "words")}
    events = {name: {} for name in count}
    came = {name: Counter() for name in count}
    for ids, target in batches(10):
        sizes = {name: getattr(model, name).sizes_of() for name in ids}
        search.grow(ids)
        loss = (model(ids) - target) ** 2
        loss.sum().backward()
        search.learn(loss)
        optimizer.step()
        optimizer.zero_grad()
        for field in search.fields:
            flat = ids[field.name].reshape(-1).tolist()
            each = len(flat) // 8
            count[field.name].update(flat)
            came[field.name].update(set(flat))
            for place, i in enumerate(flat):
                events[field.name].setdefault(i, []).append(loss[place // each].item())
            grown = getattr(model, field.name).sizes_of() != sizes[field.name]
            assert set(grown.nonzero()[:, 0].tolist()) <= set(flat)
    for field in search.fields:
        assert dict(enumerate(field.seen.tolist())) == {
            i: count[field.name][i] for i in range(field.embedding.num_embeddings)
        }
        if settings.get("method") == "always":
            level = field.embedding.arena.level().tolist()
            last = len(field.embedding.sizes) - 1
            assert level == [min(came[field.name][i], last) for i in range(len(level))]
            continue
        for i, losses in events[field.name].items():
            mean, seen = field.history.mean(torch.tensor([i]))
            kept = losses[-2:]
            assert seen.item() and mean.item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    moved = [not torch.equal(p, q) for p, q in zip(before, search.parameters(), strict=True)]
    assert all(moved)
    assert search.step == 10


def test_the_rich_state_sees_the_gradient_of_every_id():
    model, search = library(state="rich")
    ids, target = next(batches(1))
    search.grow(ids)
    loss = (model(ids) - target) ** 2
    (model_of_words,) = [field for field in search.fields if field.name == "words"]
    loss.sum().backward()
    search.learn(loss)
    residual = 2 * (model(ids) - target).detach()
    length = model.out.weight[0, 8:].detach().norm() / 5  # a fifth of the mean
    flat = ids["words"].reshape(-1)
    for place, i in enumerate(flat.tolist()):
        if i not in flat[place + 1 :].tolist():
            norm = model_of_words.statistics.norm[i]
            torch.testing.assert_close(norm, residual[place // 5].abs() * length)


def test_a_library_search_goes_on_bit_for_bit():
    runs = []
    for _ in range(2):
        model, search = library(state="rich")
        runs.append((model, search, torch.optim.SGD(model.parameters(), lr=2e-3)))
    stream = list(batches(12))
    losses: list[list[torch.Tensor]] = [[], []]

    def walk(which: int, begin: int, end: int) -> None:
        model, search, optimizer = runs[which]
        for ids, target in stream[begin:end]:
            search.grow(ids)
            loss = (model(ids) - target) ** 2
            loss.sum().backward()
            search.learn(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[which].append(loss.detach())

    walk(0, 0, 5)
    for module, other in zip(runs[1][:2], runs[0][:2], strict=True):
        module.load_state_dict(deepcopy(other.state_dict()))
    walk(0, 5, 12), walk(1, 5, 12)
    assert torch.cat(losses[1]).isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(losses[0][5:], losses[1], strict=True))
    same(dict(runs[0][1].state_dict()), dict(runs[1][1].state_dict()))


def test_an_empty_batch_changes_nothing_of_the_tables():
    model, search = library()
    empty = {"user": torch.empty(0).long(), "item": torch.empty(0).long()}
    empty["words"] = torch.empty(0, 5).long()
    search.grow(empty)
    search.learn(torch.empty(0))
    for field in search.fields:
        assert field.seen.eq(0).all() and field.embedding.arena.level().eq(0).all()


def test_adam_waits_for_a_first_decision_and_then_steps_every_batch():
    """Where no ID decides gradients are zeros: moments decay, and policies follow them."""
    torch.manual_seed(0)
    sizes = (1, 2, 4, 8)
    table = ResizableEmbedding(10, sizes=sizes)
    grown, fresh = torch.arange(5), torch.arange(5, 10)
    for _ in sizes[1:]:
        table.promote(grown)
    search = SizeSearch({"id": table}, SearchConfig(sizes=sizes))
    bias = search.fields[0].policy.linear1.bias

    def learn(ids: torch.Tensor) -> torch.Tensor:
        search.grow({"id": ids})
        search.learn(torch.rand(5))
        return bias.detach().clone()

    before = bias.detach().clone()
    assert torch.equal(learn(grown), before) and not search.optimizer.state
    learn(fresh)
    moved = learn(fresh)  # with histories, so with rewards
    state = search.optimizer.state[bias]
    moment = state["exp_avg"].clone()
    assert moment.abs().max() > 0 and state["step"] == 2
    assert not torch.equal(learn(grown), moved)
    torch.testing.assert_close(state["exp_avg"], 0.9 * moment)
    assert state["step"] == 3


def test_what_the_package_exports():
    assert sorted(esapn.__all__) == ["SearchConfig", "SizeSearch"]
    with pytest.raises(AttributeError, match="no attribute 'Search'"):
        _ = esapn.Search


# Mistakes


def test_tables_that_cannot_be_searched():
    with pytest.raises(ValueError, match="at least one table"):
        SizeSearch({}, SearchConfig())
    with pytest.raises(TypeError, match="'word' is a Embedding, not a ResizableEmbedding"):
        SizeSearch({"word": torch.nn.Embedding(3, 2)}, SearchConfig())


@pytest.mark.parametrize("method", ["fixed", "darts", "autoemb", "biases", "counts"])
def test_a_method_without_growth_is_no_search(method):
    settings = {"budget": "90%"} if method == "counts" else {}
    table = ResizableEmbedding(3, sizes=(1, 2))
    with pytest.raises(ValueError, match=f"'{method}' is not one of a search"):
        SizeSearch({"word": table}, SearchConfig(method=method, **settings))


@pytest.mark.parametrize("given", ["argument", "config"])
def test_tables_share_a_budget(given):
    """Rows grow until it is spent, and no further."""
    rows = {"user": 900, "item": 300}

    def build(budget):
        tables = {name: ResizableEmbedding(n, sizes=(1, 2, 4)) for name, n in rows.items()}
        settings = {"method": "always", "sizes": (1, 2, 4)}
        if given == "config":
            return tables, SizeSearch(tables, SearchConfig(**settings, budget=budget))
        return tables, SizeSearch(tables, SearchConfig(**settings), budget)

    with pytest.raises(ValueError, match=r"does not hold the rows as they are: \d+ bytes do$") as e:
        build("1 B")
    least = int(str(e.value).split()[-3])
    tables, search = build(f"{least + 3000} B")
    ids = torch.arange(300)
    for _ in range(3):
        search.grow({name: ids for name in rows})
        search.learn(torch.zeros(300))
        serving = sum(table.memory_report().serving for table in tables.values())
        assert least < serving <= least + 3000
    assert all(table.refused > 0 for table in tables.values())
    # A search begun again on the same tables leaves them as they are.
    own = {name: table.budget for name, table in tables.items()}
    SizeSearch(tables, SearchConfig(method="always", budget="90%"))
    assert {name: table.budget for name, table in tables.items()} == own


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_ids_of_exactly_the_tables_are_taken(change):
    _, search = library()
    ids, _ = next(batches(1))
    if change == "missing":
        del ids["item"]
    else:
        ids["genre"] = ids["item"]
    with pytest.raises(KeyError, match="grow takes ids of"):
        search.grow(ids)


@pytest.mark.parametrize("shape", [(7,), (8, 1), ()])
def test_one_loss_for_each_example(shape):
    model, search = library()
    ids, _ = next(batches(1))
    search.grow(ids)
    model(ids).sum().backward()
    with pytest.raises(ValueError, match="one loss for each of the 8 examples"):
        search.learn(torch.zeros(shape))


@pytest.mark.parametrize("mistake", ["no backward", "no lookup", "other ids"])
def test_the_rich_state_needs_backward_before_learn(mistake):
    model, search = library(state="rich")
    ids, target = next(batches(1))
    search.grow(ids)
    if mistake == "no lookup":
        loss = torch.zeros(8)
    else:
        given = {name: i[:5] for name, i in ids.items()} if mistake == "other ids" else ids
        loss = (model(given) - target[: len(given["user"])]) ** 2
    if mistake == "other ids":
        loss.sum().backward()
        loss = torch.zeros(8)
    with pytest.raises(RuntimeError, match="'user' need.*before learn"):
        search.learn(loss)
