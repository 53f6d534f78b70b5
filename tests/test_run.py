"""Whole runs: every method in both modes, resumed ones bit for bit, and the search as a library."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import esapn.search
from esapn import checkpoint
from esapn.config import CHOICES, MODES, SearchConfig
from esapn.data import build_stream, load_ratings, synthetic_ratings
from esapn.model import TwoTower
from esapn.run import Run
from esapn.search import SizeSearch, basis, count_ids
from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.reference import split_chain

METHODS = CHOICES["method"]
RULES = ("always", "never", "random", "thresholds", "power")
TINY = {
    "sizes": (1, 2, 4),
    "fixed_size": 4,
    "hidden": 6,
    "policy_hidden": 6,
    "frequency_dim": 3,
    "max_frequency": 16,
    "batch_size": 50,
    "log_every": 3,
    "threshold": 2.0,
    "history": 2,
}
USERS, ITEMS, EVENTS = 70, 50, 700


def tiny_stream(task="binary", events=EVENTS, history=2):
    ratings = synthetic_ratings(events, n_users=USERS, n_items=ITEMS)
    return build_stream(ratings, task=task, batch_size=50, history=history)


def tiny(mode="paper", stream=None, **settings) -> Run:
    config = SearchConfig.of_mode(mode, **{**TINY, **settings})
    return Run(config, tiny_stream(config.task) if stream is None else stream)


every_method = pytest.mark.parametrize("method", METHODS)
both_modes = pytest.mark.parametrize("mode", MODES)
VARIANTS = [{"method": method} for method in METHODS] + [
    {"state": "rich", "reward": "lookahead", "byte_price": 0.1},
    {"state": "rich", "advantage": "normalised", "entropy": 0.1},
    {"row_optimizer": "adagrad", "hops": "linear"},
    {"row_optimizer": "adam", "row_lr": 0.02, "hops": "padded"},
    {"method": "darts", "row_optimizer": "adam", "row_lr": 0.02},
]
every_variant = pytest.mark.parametrize(
    "variant", VARIANTS, ids=["-".join(map(str, v.values())) for v in VARIANTS]
)


# Every method


@every_method
@both_modes
@pytest.mark.parametrize("task", CHOICES["task"])
def test_a_run_gives_finite_measures_and_consistent_memory(method, mode, task):
    stream = tiny_stream(task)
    result = tiny(mode, stream, method=method, task=task).walk()
    assert not result.stopped_early and result.run.done
    assert result.train["events"] == stream.n_train == 500 and result.test["events"] == 200
    for part in (result.train, result.test):
        assert all(torch.tensor(value).isfinite() for value in part.values())
        assert 0 <= part["accuracy"] <= 1 and part["loss"] > 0 and part["log_loss"] > 0
    assert ("auc" in result.test) == (task == "binary")
    assert [line["events"] for line in result.log] == [150, 300, 450, 600, 700]
    check_memory(result, method)


def check_memory(result, method: str) -> None:
    serving = training = 0
    rows = {"user": USERS, "item": ITEMS}
    for (name, n), side in zip(rows.items(), result.memory.values(), strict=True):
        counts = {int(size): count for size, count in side["rows_per_size"].items()}
        parts = ("payload", "slack", "locations", "chain")
        assert side["serving"] == sum(side[part] for part in parts)
        assert side["fixed"] == n * 4 * 4 and side["optimizer"] >= 0
        serving, training = (
            serving + side["serving"],
            training + side["serving"] + side["optimizer"],
        )
        if method == "biases":
            assert not counts and side["payload"] == getattr(result.run.model, name).nbytes
            continue
        assert sum(counts.values()) == n
        if method in ("darts", "autoemb"):
            ids = n + (method == "autoemb")  # the sink row is allocated as well
            assert counts == {7: n} and side["payload"] == 4 * (7 * n + 3 * ids)
        else:
            assert side["payload"] == 4 * sum(size * count for size, count in counts.items())
        assert side["slack"] == 0 or method not in ("fixed", "darts", "autoemb")
    assert result.bytes["serving"] == serving
    assert result.bytes["fixed128"] == sum(side["fixed"] for side in result.memory.values())
    assert result.bytes["training"] >= training
    logged = [line["serving_bytes"] for line in result.log]
    assert result.bytes["serving_peak"] == max(*logged, serving)
    events = [150, 150, 150, 150, 100]
    mean = sum(b * n for b, n in zip(logged, events, strict=True)) / EVENTS
    assert result.bytes["serving_mean"] == pytest.approx(mean)


@pytest.mark.parametrize("method", ["esapn", *RULES])
def test_log_and_sizes_say_what_the_tables_say(method):
    result = tiny(method=method).walk()
    run, last = result.run, result.log[-1]
    for name, n in (("user", USERS), ("item", ITEMS)):
        sizes = getattr(run.model, name).sizes_of()
        assert last[f"mean_{name}_size"] == pytest.approx(sizes.double().mean().item())
        assert last[f"{name}_rows"] == [int((sizes == size).sum()) for size in TINY["sizes"]]
        seen = Counter(getattr(run.stream, name).tolist())
        found = result.sizes_by_frequency[name]
        assert sum(bucket["ids"] for bucket in found) == len(seen) <= n
        for bucket in found:
            mine = [i for i, count in seen.items() if bucket["from"] <= count < bucket["to"]]
            assert bucket["ids"] == len(mine) > 0
            assert bucket["mean_size"] == pytest.approx(sizes[mine].double().mean().item())
    for buckets in result.by_frequency.values():
        assert sum(bucket["events"] for bucket in buckets) == result.test["events"]


def test_a_paper_run_has_the_published_parts():
    stream = tiny_stream()
    config = SearchConfig(batch_size=50)
    assert config == SearchConfig.of_mode("paper", batch_size=50)
    run = Run(config, stream)
    assert isinstance(run.model, TwoTower)
    for name in ("user", "item"):
        norm, activation = getattr(run.model, f"{name}_norm")
        assert isinstance(norm, torch.nn.BatchNorm1d) and isinstance(activation, torch.nn.Tanh)
        table = getattr(run.model, name)
        assert table.sizes == (2, 4, 8, 16, 64, 128) and table.chain.requires_grad
        assert table.arena.storage.std().item() > 0.5
    shapes = [tuple(p.shape) for p in run.model.inference.parameters()]
    assert shapes == [(256,), (256,), (512, 256), (512,), (512,), (512,), (1, 512), (1,)]
    (adam,) = run.optimizers
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["lr"] == 1e-3
    assert {id(p) for p in adam.param_groups[0]["params"]} == {
        id(p) for p in run.model.parameters()
    }
    assert run.search.optimizer.param_groups[0]["lr"] == 1e-4
    for field in run.search.fields:
        assert field.history.length == 5 and not field.policy.rich
        assert field.policy.linear1.weight.shape == (512, 32 + 6)
        assert field.policy.frequency.weight.shape == (4097, 32)


def test_a_tuned_run_has_adagrad_rows_that_keep_their_sums():
    run = tiny("tuned", row_lr=0.3)
    rows, adam = run.optimizers
    assert isinstance(rows, optim.Adagrad) and rows.param_groups[0]["lr"] == 0.3
    named = {id(p): name for name, p in run.model.named_parameters()}
    learnt = {named[id(p)] for p in adam.param_groups[0]["params"]}
    assert learnt == {f"inference.{k}.{part}" for k in (0, 2) for part in ("weight", "bias")}
    table = run.model.user
    chain = table.chain.clone()
    asked = []
    real = esapn.search.promote_keeping
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            esapn.search, "promote_keeping", lambda *args: asked.append(args) or real(*args)
        )
        run.walk()
    assert asked and all(args[3] == "sum" for args in asked)
    assert torch.equal(table.chain, chain) and (table.sizes_of() > 1).any()


@pytest.mark.parametrize("method", ["darts", "autoemb"])
@both_modes
def test_soft_weights_have_an_optimizer_of_their_own(method, mode):
    run = tiny(mode, method=method, policy_lr=0.7)
    soft = {id(p) for table in (run.model.user, run.model.item) for p in table.soft_parameters()}
    groups = [optimizer.param_groups[0] for optimizer in run.optimizers]
    assert {id(p) for p in groups[0]["params"]} == soft and groups[0]["lr"] == 0.7
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in run.model.parameters())


@every_method
@both_modes
def test_a_prediction_does_not_depend_on_labels_to_come(method, mode):
    stream = tiny_stream()
    other = stream.target.clone()
    other[300:] = 1 - other[300:]  # batches 6 and later
    logits: list[list[torch.Tensor]] = []
    for target in (stream.target, other):
        run = tiny(mode, replace(stream, target=target), method=method)
        logits.append([])
        run.model.register_forward_hook(lambda _, __, out: logits[-1].append(out.detach()))
        for _ in range(8):
            run.step()
    assert len(logits[0]) == len(logits[1]) == 8
    assert all(torch.equal(logits[0][k], logits[1][k]) for k in range(7))
    assert not torch.equal(logits[0][7], logits[1][7])


@pytest.mark.parametrize("method", ["esapn", "fixed", "darts", "biases"])
def test_the_seed_says_where_everything_starts(method):
    stream = tiny_stream()
    one, two, other = (tiny(stream=stream, method=method, seed=seed) for seed in (1, 1, 2))
    first = one.step()
    assert torch.equal(two.step(), first)
    assert torch.equal(other.step(), first) == (method == "biases")


# The walk


def test_step_walks_by_itself():
    run, stream = tiny(), tiny_stream()
    assert not run.done and run.index == 0
    losses = [run.step() for _ in range(14)]
    assert run.done and run.index == 14 and run.measures.seen == EVENTS
    assert [len(loss) for loss in losses] == [50] * 14 and len(stream.bounds) == 14
    assert all(not loss.requires_grad for loss in losses)
    total = torch.cat(losses[10:]).double().mean().item()
    assert run.measures.summary("test")["loss"] == pytest.approx(total, rel=1e-5)


def test_progress_and_pause_are_called_with_every_line():
    calls: list[tuple[Any, ...]] = []
    run = tiny()
    result = run.walk(
        progress=lambda done, line: calls.append(("progress", done, line["events"])),
        pause=lambda r: calls.append(("pause", r.index, r is run)),
    )
    lines = [(3, 150), (6, 300), (9, 450), (12, 600), (14, 700)]
    expected = [
        call for done, n in lines for call in (("progress", done, n), ("pause", done, True))
    ]
    assert calls == expected
    assert result.cpu_seconds > 0 and result.wall_seconds > 0


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_early(patience):
    """With a learning rate of nothing no line is better for long."""
    run = tiny(lr=1e-30, row_lr=1e-30, method="never", patience=patience, log_every=1)
    result = run.walk()
    losses = [line["loss"] for line in result.log]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert result.stopped_early and len(losses) == best + 1 + patience < 14
    for k in range(best):  # and nowhere before
        assert min(losses[k + 1 : k + 1 + patience]) < min(losses[: k + 1])
    assert result.train["events"] + result.test["events"] == 50 * len(losses)


def test_patience_of_zero_never_stops():
    assert not tiny(lr=1e-30, row_lr=1e-30, method="never", log_every=1).walk().stopped_early


@pytest.mark.parametrize("steps", [4, 10, 12])
def test_a_run_that_stops_in_either_part_has_a_result(steps):
    run = tiny()
    for _ in range(steps):
        run.step()
    result = run.result()
    assert result.train["events"] == min(50 * steps, 500)
    assert result.test["events"] == max(50 * steps - 500, 0)
    assert result.stopped_early


# Resuming


def same(one: Any, two: Any, where: str = "") -> None:
    """Nested state, tensor by tensor and bit by bit; the clocks aside."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            if key != "seconds":
                same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for k, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}[{k}]")
    else:
        assert one == two or (one != one and two != two), where


def place_of(variant: dict[str, Any], mode: str) -> int:
    """Where to stop: drawn once for every case, the first step and the last among them."""
    return sum(map(ord, f"{mode}{sorted(variant.items())}")) % 13 + 1


@every_variant
@both_modes
def test_a_run_goes_on_bit_for_bit_where_it_was_saved(variant, mode, tmp_path):
    stream = tiny_stream()
    whole, first = tiny(mode, stream, **variant), tiny(mode, stream, **variant)
    place = place_of(variant, mode)
    losses = [whole.step() for _ in range(14)]
    for k in range(place):
        assert torch.equal(first.step(), losses[k])
    checkpoint.save(tmp_path, first.index, first.state_dict())
    torch.manual_seed(999)
    second = tiny(mode, stream, **variant)
    found = checkpoint.load(tmp_path)
    assert found is not None and found.step == place
    second.load_state_dict(found.state)
    assert second.index == place
    same(second.state_dict(), first.state_dict())
    for k in range(place, 14):
        assert torch.equal(second.step(), losses[k])
    assert second.done
    same(second.state_dict(), whole.state_dict())


@both_modes
def test_a_walk_goes_on_with_its_log(mode, tmp_path):
    stream = tiny_stream()
    whole = tiny(mode, stream).walk()

    class Killed(Exception):
        pass

    def pause(run):
        checkpoint.save(tmp_path, run.index, run.state_dict())
        if run.index == 9:
            raise Killed

    with pytest.raises(Killed):
        tiny(mode, stream).walk(pause=pause)
    second = tiny(mode, stream)
    found = checkpoint.load(tmp_path)
    assert found is not None
    second.load_state_dict(found.state)
    result = second.walk()
    same(result.log, whole.log)
    same([result.train, result.test, result.memory], [whole.train, whole.test, whole.memory])
    same([result.bytes, result.by_frequency], [whole.bytes, whole.by_frequency])
    assert result.cpu_seconds > 0


@pytest.mark.parametrize("place", [1, 3])
def test_patience_goes_on_where_it_was(place, tmp_path):
    settings = {"lr": 1e-30, "row_lr": 1e-30, "method": "never", "patience": 2, "log_every": 1}
    whole = tiny(**settings).walk()
    assert place < len(whole.log) < 14

    def pause(run):
        if run.index == place:
            checkpoint.save(tmp_path, place, run.state_dict())

    tiny(**settings).walk(pause=pause)
    second = tiny(**settings)
    found = checkpoint.load(tmp_path)
    assert found is not None
    second.load_state_dict(found.state)
    assert second.best["line"] in range(place)
    result = second.walk()
    same(result.log, whole.log)
    assert result.stopped_early and second.best == whole.run.best


def test_a_run_that_has_walked_can_go_back(tmp_path):
    """A state loads into a run that is further on, whose rows have other sizes."""
    run = tiny("tuned", state="rich")
    for _ in range(3):
        run.step()
    checkpoint.save(tmp_path, 3, run.state_dict())
    losses = [run.step() for _ in range(11)]
    found = checkpoint.load(tmp_path)
    assert found is not None
    run.load_state_dict(found.state)
    assert all(torch.equal(run.step(), loss) for loss in losses)


# Counting


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 5), max_size=30),
    seen=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    history=st.integers(1, 4),
)
def test_counts_against_a_dictionary(ids, seen, history):
    found = count_ids(torch.tensor(ids, dtype=torch.int64), torch.tensor(seen).int(), history)
    count, left = dict(enumerate(seen)), Counter(ids)
    frequency, last, keep = [], [], []
    for i in ids:
        count[i] += 1
        left[i] -= 1
        frequency.append(count[i])
        last.append(left[i] == 0)
        keep.append(left[i] < history)
    assert found.frequency.tolist() == frequency
    assert found.last.tolist() == last and found.keep.tolist() == keep
    assert found.last.dtype == found.keep.dtype == torch.bool


def test_counts_of_the_search_are_those_of_the_stream():
    stream = tiny_stream(history=2)
    seen = torch.zeros(USERS, dtype=torch.int32)
    for index in range(len(stream.bounds)):
        batch = stream.batch(index)
        found = count_ids(batch.user, seen, 2)
        for mine, theirs in zip(
            found, (batch.user_freq, batch.user_last, batch.user_keep), strict=True
        ):
            assert torch.equal(mine.to(theirs.dtype), theirs)
        seen.index_add_(0, batch.user, torch.ones(50, dtype=torch.int32))


# As a library


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


# The look-ahead


def looked_at(run: Run) -> list[torch.Tensor]:
    """What look_ahead finds, table by table and step by step."""
    found: list[torch.Tensor] = []
    real = run.search.look_ahead

    def look(loss, again):
        real(loss, again)
        found.extend(field.gain for field in run.search.fields)

    run.search.look_ahead = look
    return found


@both_modes
def test_a_shadow_of_nothing_gains_nothing(mode):
    """Both losses are of rows that know nothing of the batch."""
    run = tiny(mode, reward="lookahead")
    found = looked_at(run)
    run.step()
    assert len(found) == 2 and all(gain.shape == (50,) and gain.eq(0).all() for gain in found)
    run.step()
    assert all(gain.ne(0).any() for gain in found[2:])


@pytest.mark.parametrize("init", ["linear", "isometric", "padded"])
def test_the_basis_spans_what_every_size_reaches(init):
    sizes = (1, 3, 4, 7)
    table = ResizableEmbedding(9, sizes=sizes, init=init).double()
    columns = basis(table)
    assert columns.dtype == torch.float64
    torch.testing.assert_close(columns.T @ columns, torch.eye(7).double())
    product = torch.eye(7).double()
    spans = [product]
    for weight, _ in reversed(split_chain(table.chain.detach(), sizes)):
        product = product @ weight
        spans.insert(0, product)
    for size, span in zip(sizes, spans, strict=True):
        inside = columns[:, :size]
        torch.testing.assert_close(inside @ inside.T @ span, span)
    if init == "padded":
        torch.testing.assert_close(columns, torch.eye(7).double())


def test_the_basis_turns_no_more_than_the_hops():
    """Numbers of a shadow keep their meaning while the hops learn."""
    table = ResizableEmbedding(9, sizes=(1, 3, 4, 8))
    before = basis(table)
    with torch.no_grad():
        table.chain += 1e-6 * torch.randn_like(table.chain)
    torch.testing.assert_close(basis(table), before, atol=1e-3, rtol=0)


def test_the_look_ahead_of_a_library():
    model, search = library(reward="lookahead", row_lr=0.1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    before = [p.clone() for p in search.parameters()]
    for ids, target in batches(10):

        def losses(ids=ids, target=target):
            return (model(ids) - target) ** 2

        search.grow(ids)
        loss = losses()
        search.look_ahead(loss, losses)
        loss.sum().backward()
        search.learn(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(p, q) for p, q in zip(before, search.parameters(), strict=True))
    for field in search.fields:
        assert field.shadow[:-1].isfinite().all() and field.shadow[:-1].ne(0).any()
        assert not field.tries


def test_a_look_ahead_that_fails_leaves_the_tables_as_they_were():
    model, search = library(reward="lookahead")
    ids, target = next(batches(1))
    search.grow(ids)
    loss = (model(ids) - target) ** 2

    def failing():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        search.look_ahead(loss, failing)
    torch.testing.assert_close((model(ids) - target) ** 2, loss)


# Mistakes


def test_tables_that_cannot_be_searched():
    with pytest.raises(ValueError, match="at least one table"):
        SizeSearch({}, SearchConfig())
    with pytest.raises(TypeError, match="'word' is a Embedding, not a ResizableEmbedding"):
        SizeSearch({"word": torch.nn.Embedding(3, 2)}, SearchConfig())


@pytest.mark.parametrize("method", ["fixed", "darts", "autoemb", "biases"])
def test_a_method_without_growth_is_no_search(method):
    table = ResizableEmbedding(3, sizes=(1, 2))
    with pytest.raises(ValueError, match=f"'{method}' does not grow rows"):
        SizeSearch({"word": table}, SearchConfig(method=method))


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


def test_the_look_ahead_comes_before_learn():
    model, search = library(reward="lookahead")
    ids, target = next(batches(1))
    search.grow(ids)
    loss = (model(ids) - target) ** 2
    loss.sum().backward()
    with pytest.raises(ValueError, match=r"needs look_ahead\(loss, again\) before backward"):
        search.learn(loss)


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


def test_load_ratings_and_run_from_the_top():
    """The quickstart of the library, as a user writes it."""
    stream = build_stream(load_ratings("synthetic", events=2_000), batch_size=100)
    result = Run(SearchConfig(batch_size=100, hidden=8, policy_hidden=8), stream).walk()
    assert result.test["events"] == 500 and result.log
