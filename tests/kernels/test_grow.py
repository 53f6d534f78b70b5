"""grow.py: rows that grow and shrink by their counts within a budget; the loop stays as it is."""

import copy
import functools
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    grow,
    optim,
)
from esapn_kernels.averaging import AveragedModel
from esapn_kernels.grow import Growth
from esapn_kernels.ops.backend import BACKENDS
from esapn_kernels.row_counts import RowCounts
from tests.helpers import same

SIZES, ROWS = (2, 4, 8, 16), 600
# As the budget allows, whatever the counts, but where that is tested.
ByCounts = functools.partial(grow.ByCounts, scale=math.inf)
CPU = [name for name in ("native", "torch") if name in BACKENDS]


def table(rows=ROWS, sizes=SIZES, **options):
    return ResizableEmbedding(rows, sizes=sizes, **options)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table = table(**options)
        self.head = nn.Linear(16, 1)

    def forward(self, ids):
        return self.head(self.table(ids).tanh())


def draw(step, n=96, rows=ROWS, shift=0):
    """Skewed ids; those that are frequent differ by ``shift``."""
    generator = torch.Generator().manual_seed(step)
    u = torch.rand(n, generator=generator)
    return ((rows * u**3).long() + shift) % rows


def train(model, optimizer, steps, first=0, drift=0, after=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(draw(step, shift=drift * step)).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


def counted(growth, name="table"):
    """What was counted so far, with what waits for its turn: undecayed, without noise."""
    ids, times = growth._merge(name)
    total = growth._counts[name].u.clone()
    total[ids] += times
    return total


def serving(model):
    tables = (m for m in model.modules() if isinstance(m, ResizableEmbedding))
    return sum(table.memory_report().serving for table in tables)


# Counts, histogram and fit.


def arena_of(rows, sizes, pages, padding=None):
    module = table(rows, sizes, padding_idx=padding)
    least = module.least_budget
    while module.arena.page_level.numel() - 1 < pages:
        least += module.arena.page * 4 + 1
        module.set_budget(least)
    return module.arena


def rounded(u):
    """Counts with three bits of their fractions, as bins are."""
    return (u.view(torch.int32) >> 20 << 20).view(torch.float32).double()


def brute_fit(u, sizes, arena, room, padding):
    """Levels by definition, of the largest s at which a bin begins to have the second size."""
    for edge in rounded(torch.arange(8 << 20, 2040 << 20, 1 << 20, dtype=torch.int32)).tolist():
        level = torch.zeros(len(u), dtype=torch.int64)
        for k, d in enumerate(sizes[1:], start=1):  # d <= s sqrt(u), s = d_1 / sqrt(edge)
            level[d * d * edge <= sizes[1] ** 2 * rounded(u)] = k
        if padding is not None:
            level[padding] = len(sizes) - 1
        rows = torch.bincount(level, minlength=len(sizes)).tolist()
        if sum(-(-n // per) for n, per in zip(rows, arena.rows_per_page, strict=True)) <= room:
            return level.tolist()
    raise AssertionError("no s fits")


@pytest.mark.parametrize("sizes", [(2, 4, 8, 16), (2, 3, 7, 12), (1, 5)])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_fit_is_that_of_a_search_by_definition(sizes, padding, share, monkeypatch):
    generator = torch.Generator().manual_seed(len(sizes))
    rows = 260
    arena = arena_of(rows, sizes, 1, padding)
    times = (2 ** (14 * torch.rand(rows, generator=generator) ** 2) - 1).long()
    if padding is not None:
        times[padding] = 0
    counts = RowCounts(arena, padding=padding is not None)
    ids = times.nonzero()[:, 0]
    counts.add(ids, times[ids])
    most = sum(-(-rows // per) for per in arena.rows_per_page[-1:])
    least = -(-rows // arena.rows_per_page[0]) + 1
    room = least + round(share * (most - least))
    arena.page_level = torch.full((room + 2,), -1, dtype=torch.int8)
    counts.fit(1 / (room + 1) - 1e-9)  # a page is reserved
    reserved = counts.least
    arena.page_level = torch.full((room + 1,), -1, dtype=torch.int8)
    counts.fit(0.0)
    assert torch.equal(counts.least, reserved)
    wanted = brute_fit(counts.u, sizes, arena, room, padding)
    found = counts.levels(torch.arange(rows))
    if padding is not None:
        found[padding] = len(sizes) - 1
    assert found.tolist() == wanted
    assert found.sum() > 0 and len(found.unique()) > 1


def test_no_row_is_worth_a_larger_size_while_nothing_fits():
    counts = RowCounts(arena_of(ROWS, SIZES, 22))
    counts.add(torch.tensor([1, 2]), torch.tensor([5, 500]))
    assert counts.levels(torch.arange(ROWS)).sum() == 0
    counts.fit(0.0)
    assert counts.levels(torch.tensor([0, 2])).tolist() == [0, 3]
    counts.fit(1.0)
    assert counts.levels(torch.arange(ROWS)).sum() == 0


@given(
    st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=30), max_size=40),
    st.sampled_from([math.inf, 100.0, 3.0, 0.4]),
)
@settings(max_examples=40)
def test_counts_and_histogram_are_those_of_a_dict(stream, half_life):
    counts = RowCounts(table(40).arena, half_life)
    plain = dict.fromkeys(range(40), 0.0)
    for batch in stream:
        ids, times = torch.tensor(batch).unique(return_counts=True)
        counts.add(ids, times)
        for row, n in zip(ids.tolist(), times.tolist(), strict=True):
            plain[row] += n
        plain = {row: u * 2 ** (-len(batch) / half_life) for row, u in plain.items()}
    found = counts.u.double() / 2.0**counts.log_weight
    wanted = torch.tensor(list(plain.values()), dtype=torch.float64)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-20)
    assert torch.equal(counts.histogram, counts._count_bins())
    assert counts.histogram.sum() == 40 and counts.log_weight <= 60


@pytest.mark.parametrize("half_life", [1.0, 40.0])
def test_rows_that_are_forgotten_have_the_smallest_size(half_life):
    """Also where rows of all counts have the largest, and where all are forgotten at once."""
    counts = RowCounts(arena_of(200, SIZES, 300), half_life)
    ids, some = torch.arange(200), torch.arange(20)
    for _ in range(8):
        counts.add(some, torch.full((20,), 150))
        assert not counts.levels(ids)[20:].any() and not counts.least.isnan().any()
        counts.fit(0.0)


def test_dividing_the_counts_changes_no_size():
    counts = RowCounts(arena_of(200, SIZES, 60))
    generator = torch.Generator().manual_seed(0)
    counts.add(torch.arange(200), torch.randint(1, 900, (200,), generator=generator))
    counts.fit(0.0)
    before = counts.levels(torch.arange(200))
    assert len(before.unique()) > 1
    counts.log_weight = 61.3
    counts._rescale()
    assert counts.log_weight < 1 and torch.equal(counts.levels(torch.arange(200)), before)
    counts.fit(0.0)
    assert torch.equal(counts.levels(torch.arange(200)), before)


# Training.


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("init", ["isometric", "tails"])
def test_rows_get_the_sizes_that_the_rule_says(backend, init):
    torch.manual_seed(0)
    model = Model(backend=backend, init=init)
    growth = ByCounts(model, "45%", every=2, hysteresis=1.0, reserve=0.1, refit=1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    largest = []
    train(model, optimizer, 60, after=lambda: largest.append(serving(model)))
    assert max(largest) <= model.table.budget
    report = growth.report().tables["table"]
    assert report.promoted > 100 and report.demoted > 50
    # The stream stands still: every row, in its turn, comes to its size.
    counts = growth._counts["table"]
    for _ in range(20):
        growth._move("table", torch.arange(ROWS))
    level = model.table.arena.level()
    assert torch.equal(level, counts.levels(torch.arange(ROWS)))
    assert len(level.unique()) == 4
    # s sqrt(u): a count four times as large has twice the size.
    u, size = counts.u, model.table.sizes_of().double()
    s2 = float(SIZES[1] ** 2 / counts.least[0])
    low = rounded(u)
    for d in SIZES[1:]:
        assert torch.equal(size >= d, d * d <= s2 * low)


def test_triton_grows_and_shrinks_rows():
    torch.manual_seed(0)
    model = Model(rows=60, backend="triton")
    growth = ByCounts(model, model.table.least_budget + 20 * model.table.arena.page, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        model(draw(step, 24, 60, shift=20 * (step // 3))).square().mean().backward()
        optimizer.step()
        assert serving(model) <= model.table.budget
    report = growth.report().tables["table"]
    assert report.promoted and report.demoted
    assert report.rows == model.table.memory_report().rows_per_size


def test_between_two_counts_rows_keep_their_sizes():
    model = Model()
    growth = ByCounts(model, "100%", hysteresis=1.5)
    counts = growth._counts["table"]
    ids = torch.arange(6)
    model.table.promote(ids[:4])
    counts.u[ids] = torch.tensor([0.0, 99.0, 100.0, 149.0, 149.0, 150.0])
    counts.least = torch.tensor([100.0, math.inf, math.inf])
    least, most = growth.wanted("table", ids)
    assert least.tolist() == [0, 0, 0, 0, 0, 1] and most.tolist() == [0, 0, 1, 1, 1, 1]
    growth._move("table", ids)
    assert model.table.sizes_of(ids).tolist() == [2, 2, 4, 4, 2, 4]
    growth.hysteresis = math.inf
    assert growth.wanted("table", ids)[0].tolist() == [0] * 6


@pytest.mark.parametrize("backend", CPU)
def test_rows_that_become_frequent_find_room(backend):
    """The ids that were frequent are not any more: others take their place, at once."""
    torch.manual_seed(0)
    model = Model(backend=backend, rows=2000)
    growth = ByCounts(model, "40%", every=1, half_life=20_000)
    for step in range(60):
        growth.note("table", draw(step, 400, 2000))
        growth.step()
    ids = torch.arange(2000)
    assert model.table.sizes_of(ids[:20]).tolist() == [16] * 20
    for step in range(60):
        growth.note("table", draw(step, 400, 2000, shift=1000))
        growth.step()
        assert serving(model) <= model.table.budget
    level, counts = model.table.arena.level(), growth._counts["table"]
    assert model.table.sizes_of(ids[1000:1020]).tolist() == [16] * 20
    # None that is worth twice as much as its size takes is without room.
    assert torch.equal(level >= counts.levels(ids, 0.5), torch.ones(2000, dtype=torch.bool))


def test_turns_pass_through_the_whole_table():
    model = Model()
    growth = ByCounts(model, "100%")
    seen = []
    growth.wanted = lambda name, ids: (torch.zeros_like(ids), seen.append(ids) or ids * 0)
    for _ in range(7):
        growth._move("table", torch.arange(97))
    turns = torch.cat(seen[::2])
    assert turns.tolist() == [i % ROWS for i in range(7 * 97)]
    growth._move("table", torch.arange(ROWS))
    assert sorted(seen[-2].tolist()) == list(range(ROWS))


@pytest.mark.parametrize("half_life", [math.inf, 5000.0])
def test_few_lookups_are_worth_no_long_row(half_life):
    """Whatever the budget: (d / scale)^2 of them, decayed, are the least for a row of size d."""
    every, times = torch.arange(80), torch.arange(80) // 3
    growth = grow.ByCounts(table(80, budget="400%"), every=1, half_life=half_life, refit=1)
    counts, least = torch.zeros(80, dtype=torch.float64), (torch.tensor(SIZES[1:]) / 2).square()
    for _ in range(4):
        growth.note("", every.repeat_interleave(times))
        growth.step()
        counts = (counts + times) * 2 ** (-int(times.sum()) / half_life)
        deserved = torch.bucketize(counts, least.double(), right=True)
        assert torch.equal(growth.wanted("", every)[1], deserved)
    assert deserved.unique().tolist() == [0, 1, 2, 3]
    loose = grow.ByCounts(table(80, budget="400%"), every=1, scale=math.inf)
    loose.note("", every[1:])
    loose.step()
    assert (loose.wanted("", every[1:])[1] == 3).all()


@pytest.mark.parametrize(
    ("every", "moves"),
    [(1, [1, 2, 3]), (4, [1, 2, 4, 8, 12, 16]), (10, [1, 2, 4, 8, 10, 20, 30, 40])],
)
def test_rows_move_sooner_at_first(every, moves):
    """Else a short training had ended before rows grew."""
    growth = ByCounts(table(budget="60%"), every=every)
    counted, count = [], growth.count
    for step in range(1, moves[-1] + 1):
        growth.count = lambda *given, step=step: (counted.append(step), count(*given))
        growth.note("", torch.tensor([step]))
        growth.step()
    assert counted == moves


def test_a_row_shrinks_several_sizes_at_one_turn():
    large = torch.arange(ROWS) < 200
    model = Model(initial_size=torch.where(large, 16, 2))
    growth = ByCounts(model, "80%", every=1)
    growth.note("table", torch.arange(200, ROWS))
    growth.step()
    turn = torch.arange(400)  # as many as were looked up
    assert model.table.sizes_of(turn[:200]).tolist() == [2] * 200
    assert growth.report().tables["table"].demoted == 600
    assert growth.report().tables["table"].promoted > 0


# What is counted.


def test_only_training_lookups_in_range_count():
    model = Model(padding_idx=0)
    growth = ByCounts(model, "100%")
    model(torch.tensor([0, 1, 1, 599], dtype=torch.int32))
    model.table(input=torch.tensor([[1, 2]]))
    with torch.no_grad():
        model(torch.tensor([3]))
    model.eval()(torch.tensor([4]))
    model.train()
    assert model.table.weight.shape == (ROWS, 16)
    model.table.to_embedding()
    for bad in (ROWS, -1):
        with pytest.raises(IndexError):
            model(torch.tensor([5, bad]))
    with pytest.raises(RuntimeError):
        model(torch.tensor([1.0]))
    total = counted(growth)
    assert total.nonzero()[:, 0].tolist() == [1, 2, 599]
    assert total[[1, 2, 599]].tolist() == [3, 1, 1]


@pytest.mark.filterwarnings("ignore:.*out of range")
def test_ids_out_of_range_are_not_counted_as_the_row_that_stands_in():
    model = Model(on_bad_ids=7)
    growth = ByCounts(model, "100%")
    model(torch.tensor([-1, 7, 8, ROWS, 10**12]))
    total = counted(growth)
    assert total.sum() == 2 and total[7] == total[8] == 1


def test_bags_collections_and_nested_ids_are_counted():
    bag = ResizableEmbeddingBag(50, sizes=SIZES, padding_idx=2, mode="sum")
    tables = ResizableEmbeddingCollection({"user": 50, "item": 30}, sizes=SIZES)
    plain = table(50)
    model = nn.ModuleDict({"bag": bag, "tables": tables, "plain": plain})
    growth = ByCounts(model, "200%")
    bag(torch.tensor([[1, 2], [1, 3]]))
    bag(torch.tensor([4, 2, 4]), torch.tensor([0, 1]))
    tables({"user": torch.tensor([7]), "item": torch.tensor([[3], [3]])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, which calls strided ones a prototype
        for layout in (torch.jagged, torch.strided):
            parts = [torch.tensor([1, 5]), torch.tensor([5])]
            plain(torch.nested.nested_tensor(parts, layout=layout))
    assert list(growth.tables) == ["bag", "tables.rows", "plain"]
    assert {i: int(n) for i, n in enumerate(counted(growth, "bag")) if n} == {1: 2, 3: 1, 4: 2}
    assert {i: int(n) for i, n in enumerate(counted(growth, "tables.rows")) if n} == {7: 1, 53: 2}
    assert {i: int(n) for i, n in enumerate(counted(growth, "plain")) if n} == {1: 2, 5: 4}


def test_a_batch_that_is_overwritten_was_counted_before():
    model = Model()
    growth = ByCounts(model, "100%")
    batch = torch.empty(4, dtype=torch.int64)
    for row in (3, 5):
        model(batch.fill_(row))
    assert counted(growth)[[3, 5]].tolist() == [4, 4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_computed_again_counts_once(reentrant):
    model = Model()
    growth = ByCounts(model, "100%")
    anchor = torch.ones(1, requires_grad=True)

    def run(ids, x):
        return model(ids) * x

    ids = torch.tensor([3, 3, 9])
    checkpoint(run, ids, anchor, use_reentrant=reentrant).sum().backward()
    total = counted(growth)
    assert total.sum() == 3 and total[3] == 2


def test_many_lookups_without_a_step_take_bounded_memory():
    model = Model(rows=50)
    growth = ByCounts(model, "200%")
    for step in range(3 * grow._CONDENSE + 5):
        model(draw(step, 20, 50))
    assert len(growth._noted["table"]) == 5
    assert len(growth._merged["table"][0]) <= 50
    assert counted(growth).sum() == 20 * (3 * grow._CONDENSE + 5)
    for _ in range(3):
        growth.note("table", torch.arange(grow._MANY // 2 + 1) % 50)
        assert sum(map(len, growth._noted["table"])) <= grow._MANY


# Optimizers and loops.


def moves_of(growth):
    return sum(t.promoted for t in growth.report().tables.values())


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("deferred", [False, True])
def test_fused_optimizers(backend, deferred):
    torch.manual_seed(0)
    model = Model(backend=backend)
    growth = ByCounts(model, "50%", every=2)
    rows = optim.Adam(model.table, deferred=deferred)
    storage = model.table.arena.parameter
    # A dense optimizer of immediate rows may hold them, too: a step counts once.
    held = [p for p in model.parameters() if not deferred or p is not storage]
    dense = torch.optim.Adam(held)
    for step in range(12):
        model(draw(step)).square().mean().backward()
        dense.step()
        rows.step()
        rows.zero_grad()
        dense.zero_grad()
        assert growth._steps["table"] == step + 1
        assert serving(model) <= model.table.budget
    assert moves_of(growth) > 50


def test_a_fused_optimizer_alone_moves_rows_at_its_own_step():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    rows = optim.SGD(model.table, 0.1)
    model(draw(0)).sum().backward()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    other.step()
    assert moves_of(growth) == 0
    rows.step()
    assert moves_of(growth) > 0


def test_a_skipped_step_of_a_scaler_moves_nothing():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, broken in enumerate((True, False)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(draw(step)).float().sum()
        scaler.scale(loss * math.inf if broken else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (moves_of(growth) > 0) is not broken
    assert growth._steps["table"] == 1 and growth._counts["table"].u.sum() == 2 * 96


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)
def test_two_ranks_grow_as_one_process_does(tmp_path):
    code = Path(__file__).with_name("grow_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(code.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(code), str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(world), str(rank)], env=environment)
        for world, rank in ((1, 0), (2, 0), (2, 1))
    ]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1.0", "2.0", "2.1"))
    assert one["report"] == two[0]["report"] == two[1]["report"]
    same(two[0]["state"], two[1]["state"])
    for key in ("sizes", "counts", "steps", "next"):
        same(one[key], two[0][key], key)
        same(one[key], two[1][key], key)
    assert one["promoted"] > 50 and one["demoted"] > 20


def test_accumulated_lookups_count_and_rows_move_once():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    optimizer = torch.optim.Adam(model.parameters())
    for part in range(4):
        model(draw(part)).sum().backward()
        assert moves_of(growth) == 0
    optimizer.step()
    assert moves_of(growth) > 0 and growth._counts["table"].u.sum() == 4 * 96


def test_rows_move_after_the_step_of_the_optimizer_that_holds_them():
    model = nn.ModuleList([table(), table(), nn.Linear(16, 1)])
    growth = ByCounts(model, "50%", every=1)
    one, two, head = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    (model[2](model[0](draw(0)) + model[1](draw(1)))).sum().backward()
    head.step()
    assert moves_of(growth) == 0
    one.step()
    report = growth.report().tables
    assert report["0"].promoted > 0 and report["1"].promoted == 0
    assert model[1].arena.storage.grad.abs().sum() > 0
    two.step()
    assert growth.report().tables["1"].promoted > 0
    assert growth.report().tables["0"] == report["0"]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_models_grow_alike_without_compiling_again(fullgraph):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Model()
        growth = ByCounts(model, "50%", every=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        graphs = torch._dynamo.testing.CompileCounter()
        run = torch.compile(model, backend=graphs, fullgraph=fullgraph) if compiled else model
        for step in range(7):
            optimizer.zero_grad()
            run(draw(step)).square().mean().backward()
            optimizer.step()
        results.append((growth.state_dict()["counts"], growth.report()))
    same(*[r[0] for r in results])
    assert results[0][1] == results[1][1]
    # Once, and at most once more as the arena's objects are replaced.
    assert 1 <= graphs.frame_count <= 2


def test_code_that_was_compiled_notes_every_lookup():
    torch._dynamo.reset()
    model = Model()
    growth = ByCounts(model, "50%")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        run(draw(step)).sum().backward()
    wanted = sum(torch.bincount(draw(step), minlength=ROWS) for step in range(3))
    assert torch.equal(counted(growth), wanted.float())
    torch.compile(model.eval(), backend="aot_eager")(draw(4))
    assert counted(growth).sum() == 3 * 96


def test_compiled_code_that_is_computed_again_counts_once():
    torch._dynamo.reset()
    model = Model()
    growth = ByCounts(model, "50%")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(ids, x):
        return checkpoint(lambda i, x: model(i) * x, ids, x, use_reentrant=False).sum()

    for _ in range(2):
        run(torch.arange(10), torch.ones(1, requires_grad=True)).backward()
    assert counted(growth)[:10].tolist() == [2] * 10


def test_traced_and_transformed_code():
    model = Model()
    growth = ByCounts(model, "50%")
    ids = torch.arange(10)
    torch.export.export(model, (ids,))
    torch.fx.symbolic_trace(model)
    assert counted(growth).sum() == 0
    torch.func.vmap(model)(ids.view(2, 5))
    assert counted(growth)[:10].tolist() == [1] * 10


# Checkpoints.


def run_of(backend):
    torch.manual_seed(1)
    model = Model(backend=backend, padding_idx=1)
    growth = ByCounts(model, "30%", every=3, half_life=1500.0, refit=2)
    return model, growth, torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("at", [27, 33])
def test_a_run_that_was_killed_goes_on_to_the_bit(backend, at, tmp_path):
    whole = run_of(backend)
    train(whole[0], whole[2], 70, drift=5)
    first = run_of(backend)
    train(first[0], first[2], at, drift=5)
    assert moves_of(first[1]) and first[1].report().tables["table"].demoted
    torch.save([part.state_dict() for part in first], tmp_path / "run.pt")
    torch.manual_seed(2)
    again = run_of(backend)
    for part, state in zip(again, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert again[1].report() == first[1].report()
    train(again[0], again[2], 70 - at, first=at, drift=5)
    assert again[1].report() == whole[1].report()
    assert whole[1].report().tables["table"].refused > 0
    for one, two in zip(again, whole, strict=True):
        same(one.state_dict(), two.state_dict())


def test_state_of_other_tables_or_another_rule_is_refused():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    before = growth.state_dict()
    other = ByCounts(nn.Sequential(table(40)), "100%").state_dict()
    for state in (other, ByCounts(Model(rows=40), "100%").state_dict(), {}):
        with pytest.raises(ValueError, match=r"^the state is of the tables .*$"):
            growth.load_state_dict(state)
    base = Growth(Model(), "50%").state_dict()
    with pytest.raises(ValueError, match=r"^the state is of another rule than ByCounts$"):
        growth.load_state_dict(base)
    same(growth.state_dict(), before)


@pytest.mark.parametrize("backend", CPU)
def test_a_model_without_its_state_is_refused(backend, monkeypatch):
    monkeypatch.setenv("ESAPN_CPU_BACKEND", backend)
    model, fresh = Model(), Model()
    growth = ByCounts(model, "50%", every=1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    other = ByCounts(fresh, "50%", every=1)
    before = other.state_dict()
    with pytest.raises(ValueError, match="^the rows have other sizes .*: load the model's first$"):
        other.load_state_dict(growth.state_dict())
    same(other.state_dict(), before)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(growth.state_dict())
    same(other.state_dict(), growth.state_dict())


# Budgets.


@pytest.mark.parametrize("backend", CPU)
def test_a_full_table_follows_a_stream_that_drifts(backend, monkeypatch):
    """Rows that were frequent once give way to those that are now, though no page is free."""
    monkeypatch.setenv("ESAPN_CPU_BACKEND", backend)
    model = Model()
    growth = ByCounts(model, "40%", every=2, half_life=2000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    head = torch.arange(60)
    for shift in (0, 300, 100):
        for step in range(150):
            optimizer.zero_grad()
            model(draw(step, n=200, shift=shift)).square().mean().backward()
            optimizer.step()
            assert serving(model) <= model.table.budget + model.head.weight.nbytes
        sizes = model.table.sizes_of().double()
        now, before = (head + shift) % ROWS, (head + shift - 300) % ROWS
        assert sizes[now].mean() > 1.5 * sizes.mean() > 1.5 * sizes[before].mean()
    assert growth.report().tables["table"].demoted > 100
    # Every id has its turn, and the size that its count is worth, or, between two counts, the next.
    for _ in range(8):
        growth.note("table", torch.arange(ROWS))
        growth.step()
        growth.step()
    level, (least, most) = model.table.arena.level(), growth.wanted("table", torch.arange(ROWS))
    assert (level <= most).all() and (level >= least).all()


@pytest.mark.parametrize("backend", CPU)
def test_rows_find_the_room_that_was_fitted(backend, monkeypatch):
    """At one move; none is kept small by those that take the places on its way."""
    monkeypatch.setenv("ESAPN_CPU_BACKEND", backend)
    for budget, top in (("33%", 250), ("34%", 350), ("36%", 350)):
        module = table(4000, budget=budget)
        growth = ByCounts(module, every=1)
        times = torch.ones(4000, dtype=torch.int64)
        times[-1500:], times[-top:] = 30, 400
        growth.note("", torch.arange(4000).repeat_interleave(times))
        growth.step()
        level = growth.wanted("", torch.arange(4000))[0]
        assert level.bincount().tolist() == [2500, 1500 - top, 0, top]
        assert torch.equal(module.sizes_of(), torch.tensor(SIZES)[level])
        assert growth.report().tables[""].refused == 0


def test_a_table_with_another_cap_is_refused():
    model = nn.ModuleDict({"a": table(), "b": table(max_elements=9000)})
    with pytest.raises(ValueError, match="^the table has max_elements: give it or a budget, not"):
        ByCounts(model, "50%")
    assert model["a"].budget is None
    with pytest.raises(ValueError, match="^the table has max_elements: give it or a budget, not"):
        model["b"].set_budget("50%")
    assert model["b"].budget is None and model["b"].arena.budget is None


def test_several_tables_share_a_budget():
    model = nn.ModuleList([table(900), table(300), ResizableEmbedding(100, sizes=(16,))])
    plain = 16 * 4 * 1300
    growth = ByCounts(model, "60%", every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(10):
        optimizer.zero_grad()
        sum(
            m(draw(step, rows=n)).sum() for m, n in zip(model, (900, 300, 100), strict=True)
        ).backward()
        optimizer.step()
        assert serving(model) <= 0.6 * plain
    assert list(growth.report().tables) == ["0", "1"]
    assert serving(model) > 0.5 * plain
    assert model[0].budget > 2 * model[1].budget and model[2].budget == 100 * 16 * 4


def test_too_small_a_budget_names_the_smallest():
    def build():
        return nn.ModuleList([table(900), table(300), ResizableEmbedding(100, sizes=(16,))])

    with pytest.raises(
        ValueError, match=r"^.* does not hold the rows as they are: \d+ bytes do$"
    ) as e:
        ByCounts(build(), "1%")
    least = int(str(e.value).split()[-3])
    model = build()
    with pytest.raises(ValueError, match=f"{least} bytes do"):
        ByCounts(model, least - 1)
    assert model[0].budget is None
    ByCounts(model, least)
    assert serving(model) <= least


def test_a_table_may_bring_its_own_budget():
    model = Model(budget="40%")
    growth = ByCounts(model, every=1)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    assert moves_of(growth) and growth.report().tables["table"].budget == 0.4 * ROWS * 64
    with pytest.raises(ValueError, match="^table 'table' has no budget: give one for all, as "):
        ByCounts(Model())


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": 1.5},
        {"half_life": 0},
        {"half_life": 0.9},
        {"scale": 0},
        {"hysteresis": 0.5},
        {"hysteresis": math.nan},
        {"reserve": 0.7},
        {"refit": 0},
    ],
)
def test_settings_out_of_range_are_refused(options):
    model = Model()
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must .*$"):
        ByCounts(model, "50%", **options)
    assert model.table.budget is None
    ByCounts(model, "50%")


def test_models_that_cannot_grow_are_refused():
    with pytest.raises(
        ValueError, match=r"^the model holds no ResizableEmbedding of several sizes: put one in "
    ):
        ByCounts(nn.Sequential(nn.Embedding(3, 2), ResizableEmbedding(3, 2, sizes=(2,))), "50%")
    model = Model()
    first = ByCounts(model, "50%")
    with pytest.raises(ValueError, match=r"^table 'table' grows already: remove\(\) the "):
        ByCounts(model, "60%")
    with pytest.raises(ValueError, match=r"^the table grows already"):
        Growth(model.table, "60%")
    with pytest.raises(NotImplementedError, match=r"^Growth needs a method wanted\(name, ids\)$"):
        ruleless = Growth(Model(), "60%", every=1)
        ruleless.note("table", torch.tensor([1]))
        ruleless.step()
    budget = model.table.budget
    first.remove()
    ByCounts(model, "60%")
    assert model.table.budget > budget


# Copies and lifetimes.


def test_copies_of_a_model_note_nothing():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), 2)
        assert torch.equal(other.table.arena.level(), torch.zeros(ROWS, dtype=torch.int64))
        assert other.table.arena.kept_pages == 0  # all pages serve rows that its owner promotes
    assert counted(growth).sum() == 0 and moves_of(growth) == 0
    own = ByCounts(copies[0], every=1)
    train(copies[0], torch.optim.SGD(copies[0].parameters(), lr=0.1), 2)
    assert moves_of(own) > 0 and moves_of(growth) == 0


def test_an_average_of_a_growing_model_follows_its_sizes():
    torch.manual_seed(0)
    model = Model()
    early = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    growth = ByCounts(model, "50%", every=2)
    late = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def update():
        for average in (early, late):
            average.update_parameters(model)
            average(draw(0))

    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 12, after=update)
    assert moves_of(growth) > 0 and counted(growth).sum() == 12 * 96
    for average in (early, late):
        assert torch.equal(average.module.table.sizes_of(), model.table.sizes_of())


def test_removed_it_notes_and_moves_nothing():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    before, total = growth.report(), counted(growth)
    growth.remove()
    train(model, optimizer, 2, first=2, drift=50)
    assert growth.report() == before and torch.equal(counted(growth), total)


def test_removed_twice_it_leaves_what_grows_since():
    model = Model()
    first = ByCounts(model, "50%")
    first.remove()
    assert model.table.arena.kept_pages == 0
    ByCounts(model, "50%")
    first.remove()
    assert model.table.arena.kept_pages == len(SIZES) - 1
    with pytest.raises(ValueError, match="grows already"):
        ByCounts(model)


def test_it_lives_as_long_as_the_model():
    model = Model()
    growth = weakref.ref(ByCounts(model, "50%", every=1))
    gc.collect()
    assert growth() is not None
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert moves_of(growth()) > 0
    del model
    gc.collect()
    assert growth() is None


def test_one_may_end_while_another_steps():
    """Torch walks through the hooks of all optimizers then; there is one for all growths."""

    class Collecting(grow.ByCounts):
        def fit(self, name):
            gc.collect()
            super().fit(name)

    others = [Model(), Model()]
    ended = weakref.ref(ByCounts(others[0], "50%"))
    model = Model()
    growth = Collecting(model, "50%", every=1)
    ByCounts(others[1], "50%")
    hooks = list(_global_optimizer_post_hooks)
    del others
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    gc.collect()
    assert ended() is None and moves_of(growth) > 0
    assert list(_global_optimizer_post_hooks) == hooks


# Rules of one's own, and reports.


class Everything(Growth):
    """The largest size for every row that was looked up, the smallest for those below 100."""

    def wanted(self, name, ids):
        last = torch.full_like(ids, 3)
        return torch.where(ids < 100, 0, last), torch.where(ids < 100, 0, last)


def test_a_rule_of_ones_own_plugs_in():
    model = Model(initial_size=4)
    growth = Everything(model, "100%", every=1)
    ids = torch.tensor([5, 100, 400])
    model(ids).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert model.table.sizes_of(torch.tensor([0, 1, 2, 3, 100, 400])).tolist() == [
        2,
        2,
        2,
        4,
        16,
        16,
    ]
    for wrong in (
        lambda name, ids: growth.wanted(name, ids)[0],
        lambda name, ids: (ids[:1], ids[:1]),
        lambda name, ids: (torch.full_like(ids, 4), torch.full_like(ids, 16)),  # sizes
    ):
        other = Everything(Model(initial_size=4), "100%", every=1)
        other.wanted = wrong
        other.note("table", ids)
        with pytest.raises(ValueError, match="^wanted must give "):
            other.step()
    with pytest.raises(NotImplementedError):
        Growth(Model(), "50%").wanted("table", ids)
    state = growth.state_dict()
    growth.load_state_dict(state)
    same(growth.state_dict(), state)


def test_lookups_and_steps_by_other_means():
    model = Model()
    growth = ByCounts(model, "50%", every=1)
    growth.note("table", torch.tensor([[4, 4, 9]]))
    growth.step()
    assert model.table.sizes_of(torch.tensor([4, 9, 10])).tolist() == [16, 16, 2]
    growth.step(["table"])
    assert growth._steps["table"] == 2


def test_report(tmp_path):
    model = nn.ModuleDict({"user": table(), "item": table(200)})
    growth = ByCounts(model, "60%", every=1)
    for ids in (torch.arange(0, 40), torch.arange(20)):
        growth.note("user", ids)
        growth.step(["user"])
    report = growth.report()
    user, item = report.tables["user"], report.tables["item"]
    assert user.rows == {2: ROWS - 40, 4: 0, 8: 0, 16: 40} and item.rows == {
        2: 200,
        4: 0,
        8: 0,
        16: 0,
    }
    assert (user.promoted, user.demoted, item.promoted) == (120, 0, 0)
    assert user.serving == model["user"].memory_report().serving <= user.budget
    # A count of 4 bytes for every row, and a histogram.
    assert user.counters - 4 * ROWS == item.counters - 4 * 200 > 0
    lines = str(report).splitlines()
    assert len(lines) == 6
    payload = 4 * (2 * (ROWS - 40) + 16 * 40)
    assert lines[:3] == [
        f"user: {user.serving:,} of {user.budget:,} B ({user.serving / user.budget:.1%}), "
        f"rows {payload:,} B; counters beside {user.counters:,} B",
        "  60 lookups, 2 steps; 120 up, 0 down, 0 refused",
        "  rows by size  2: 560  4: 0  8: 0  16: 40",
    ]
    report.plot(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"
