"""collection.py: several tables in one arena are what they would be each for itself."""

import copy
from unittest import mock

import pytest
import torch

from esapn_kernels import ResizableEmbeddingCollection
from esapn_kernels.collection import Jagged

TABLES = {"user": 7, "item": 5, "tag": 3}
SIZES = (2, 3, 8)
IDS = {
    "user": torch.tensor([[6, 0], [6, 3]]),
    "tag": torch.tensor([2, 2, 0], dtype=torch.int32),
    "item": torch.tensor(4),
}
FIRST = {"user": 0, "item": 7, "tag": 12}


def build(**options):
    return ResizableEmbeddingCollection(TABLES, sizes=SIZES, **options)


def whole(ids):
    """The same ids as rows of the one table below."""
    return torch.cat([(part.long() + FIRST[name]).flatten() for name, part in ids.items()])


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same_state(module, before):
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_one_lookup_for_all_tables():
    tables = build(initial_size=3)
    twin = copy.deepcopy(tables.rows)
    with mock.patch.object(tables.rows, "forward", wraps=tables.rows.forward) as forward:
        tables(IDS)
        assert forward.call_count == 1
    out = tables(IDS)
    assert list(out) == list(IDS)
    assert all(out[name].shape == (*ids.shape, 8) for name, ids in IDS.items())
    expected = twin(whole(IDS))
    assert torch.equal(torch.cat([y.reshape(-1, 8) for y in out.values()]), expected)
    upstream = {name: torch.randn_like(y) for name, y in out.items()}
    sum((out[name] * g).sum() for name, g in upstream.items()).backward()
    expected.backward(torch.cat([g.reshape(-1, 8) for g in upstream.values()]))
    for ours, theirs in zip(tables.rows.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_tables_are_apart():
    tables = build()
    dense = {name: plain.weight for name, plain in tables.to_embeddings().items()}
    assert {name: len(w) for name, w in dense.items()} == TABLES
    for name, ids in IDS.items():
        torch.testing.assert_close(
            tables({name: ids})[name].detach(), dense[name].detach()[ids.long()]
        )
    tables({"item": torch.tensor([1])})["item"].sum().backward()
    grad = tables.rows.arena.storage.grad
    start = int(tables.rows.arena.row_start[FIRST["item"] + 1])
    assert grad[start : start + 2].all() and int(grad.count_nonzero()) == 2


def test_features_share_a_table():
    features = {"clicked": "item", "seen": "item", "user": "user"}
    tables = build(features=features)
    ids = torch.tensor([1, 4])
    out = tables({"clicked": ids, "seen": ids})
    assert torch.equal(out["clicked"], out["seen"])
    moved = tables.promote({"clicked": ids[:1], "seen": ids})
    assert moved["clicked"].tolist() == [True] and moved["seen"].tolist() == [True, True]
    assert tables.sizes_of()["item"].tolist() == [2, 3, 2, 2, 3]
    assert "clicked" in repr(tables) and "'user': 7" in repr(tables)


def test_growing():
    tables = build()
    before = {name: y.detach() for name, y in tables(IDS).items()}
    masks = {"user": torch.tensor([[True, False], [False, True]])}
    moved = tables.promote(IDS, masks)
    assert moved["user"].tolist() == [[True, False], [False, True]]
    assert moved["tag"].tolist() == [True, True, True] and moved["item"].shape == ()
    assert tables.sizes_of(IDS)["user"].tolist() == [[3, 2], [3, 3]]
    assert tables.sizes_of()["tag"].tolist() == [3, 2, 3]
    assert all(r.all() for r in tables.resize({"tag": IDS["tag"]}, 8).values())
    assert tables.sizes_of({"tag": IDS["tag"]})["tag"].tolist() == [8, 8, 8]
    for name, y in tables(IDS).items():
        torch.testing.assert_close(y.detach(), before[name], rtol=1e-5, atol=1e-6)
    report = tables.memory_report()
    assert report.fixed == 15 * 8 * 4 and sum(report.rows_per_size.values()) == 15


class Batch:
    """Lists of ids per line and key, in the layout of KeyedJaggedTensor."""

    def __init__(self, lists, counts=True):
        self.lists = lists
        if counts:
            self.length_per_key = lambda: [sum(map(len, of_key)) for of_key in lists.values()]

    def keys(self):
        return list(self.lists)

    def values(self):
        ids = [i for of_key in self.lists.values() for line in of_key for i in line]
        return torch.tensor(ids, dtype=torch.long)

    def lengths(self):
        found = [len(line) for of_key in self.lists.values() for line in of_key]
        return torch.tensor(found, dtype=torch.long)


@pytest.mark.parametrize("counts", [True, False])
def test_keyed_jagged_input(counts):
    tables = build()
    lists = {"item": [[4], [], [0, 4]], "user": [[], [6, 6], [1]]}
    out = tables(Batch(lists, counts))
    assert list(out) == ["item", "user"] and isinstance(out["item"], Jagged)
    for key, of_key in lists.items():
        ids = torch.tensor([i for line in of_key for i in line])
        assert out[key].lengths.tolist() == [len(line) for line in of_key]
        torch.testing.assert_close(out[key].values, tables({key: ids})[key])


def test_features_left_out_and_empty():
    tables = build()
    empty = torch.zeros(0, 2, dtype=torch.long)
    out = tables({"user": empty, "item": torch.tensor([0])})
    assert out["user"].shape == (0, 2, 8) and out["item"].shape == (1, 8)
    assert tables({}) == {} and tables.promote({}) == {}
    assert tables.promote({"user": empty})["user"].shape == (0, 2)


@pytest.mark.parametrize("sizes", [(8,), SIZES], ids=["one", "ragged"])
@pytest.mark.parametrize("tables", [{"a": 0}, {"a": 0, "b": 3}, {"b": 3, "a": 0}], ids=str)
def test_tables_without_rows(tables, sizes):
    module = ResizableEmbeddingCollection(tables, sizes=sizes)
    nothing = torch.zeros(2, 0, dtype=torch.long)
    out = module({"a": nothing})
    assert out["a"].shape == (2, 0, 8)
    out["a"].sum().backward()
    assert module({}) == {} and module.sizes_of()["a"].shape == (0,)
    assert module.promote({"a": nothing})["a"].shape == (2, 0)
    assert module.resize({"a": nothing}, 8)["a"].shape == (2, 0)
    for call in (module, module.promote):
        with pytest.raises(IndexError, match="out of range"):
            call({"a": torch.tensor([0])})
    assert module.to_embeddings()["a"].weight.shape == (0, 8)
    assert module.memory_report().fixed == 32 * sum(tables.values()) and "'a': 0" in repr(module)
    other = ResizableEmbeddingCollection(tables, sizes=sizes)
    other.load_state_dict(module.state_dict())
    assert copy.deepcopy(other)({"a": nothing})["a"].shape == (2, 0, 8)
    found = module(Batch({"a": [[], []]}))["a"]
    assert found.values.shape == (0, 8) and found.lengths.tolist() == [0, 0]


def test_a_batch_without_keys():
    assert build()(Batch({})) == {}


def test_saving_and_copying():
    tables = build()
    tables.promote(IDS)
    fresh = build(initial_size=3)
    fresh.load_state_dict(tables.state_dict())
    for other in (fresh, copy.deepcopy(tables)):
        for name, y in other(IDS).items():
            assert torch.equal(y, tables(IDS)[name])


GOOD = torch.tensor([0])
MISUSES = {
    # In range of the whole, but rows of the next table.
    "above": (lambda t: t({"user": torch.tensor([7])}), IndexError, "out of range"),
    "above-sizes": (lambda t: t.sizes_of({"user": torch.tensor([7])}), IndexError, "out of range"),
    "negative": (lambda t: t({"item": torch.tensor([-1])}), IndexError, "out of range"),
    "promote-above": (
        lambda t: t.promote({"user": GOOD, "item": torch.tensor([5])}),
        IndexError,
        "out of range",
    ),
    "resize-above": (lambda t: t.resize({"item": torch.tensor([5])}, 8), IndexError, "range"),
    "feature": (lambda t: t({"users": GOOD}), KeyError, "users"),
    "promote-feature": (lambda t: t.promote({"user": GOOD, "x": GOOD}), KeyError, "'x'"),
    "float": (lambda t: t({"user": torch.tensor([1.0])}), RuntimeError, "Long, Int"),
    "list": (lambda t: t({"user": [1]}), TypeError, "indices"),
    "tensor": (lambda t: t(GOOD), TypeError, "mapping"),
    "promote-tensor": (lambda t: t.promote(GOOD), TypeError, "mapping"),
    "mask-shape": (
        lambda t: t.promote({"user": GOOD}, {"user": torch.tensor([True, False])}),
        ValueError,
        "mask of 'user'",
    ),
    "mask-of-nobody": (
        lambda t: t.promote({"user": GOOD}, {"item": torch.tensor([True])}),
        KeyError,
        "item",
    ),
}


@pytest.mark.parametrize("call, error, words", MISUSES.values(), ids=MISUSES.keys())
def test_misuse_changes_nothing(call, error, words):
    tables = build()
    before = state_of(tables)
    with pytest.raises(error, match=words):
        call(tables)
    assert_same_state(tables, before)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (({},), ValueError),
        (({"user": 3}, {"clicked": "item"}), ValueError),
        (({"user": 3}, None, {"padding_idx": 0}), TypeError),
        (({"user": 3}, None, {"_weight": torch.zeros(3, 8)}), TypeError),
        (({"user": 3}, None, {"sizes": (4, 2)}), ValueError),
        (({"user": -1},), RuntimeError),
        (({"user": -1, "item": 5},), RuntimeError),
        (({"user": 2.5, "item": 3},), TypeError),
    ],
)
def test_bad_construction(arguments, error):
    tables, features, options = (*arguments, None, {})[:3] if len(arguments) < 3 else arguments
    with pytest.raises(error):
        ResizableEmbeddingCollection(tables, features=features, **(options or {}))
