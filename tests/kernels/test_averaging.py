"""averaging.py: an average is of ids, wherever their rows lie and whatever their sizes."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim import swa_utils

from esapn_kernels import (
    ResizableEmbedding,
    ResizableEmbeddingBag,
    ResizableEmbeddingCollection,
    optim,
)
from esapn_kernels.averaging import AveragedModel, match_rows
from esapn_kernels.ops.backend import BACKENDS
from esapn_kernels.reference import promote_reference, split_chain
from esapn_kernels.storage.arena import Arena
from tests.helpers import same

SIZES = (2, 4, 8)
N, STEPS = 60, 200
LENT = torch.arange(50, N)  # ids whose rows come and go
IDS = torch.arange(50)
DECAY = 0.9
KINDS = {
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
    "ema, one by one": {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)},
    "swa": {},
}
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def table(**options):
    torch.manual_seed(0)
    return ResizableEmbedding(N, sizes=SIZES, **{"dtype": torch.float64, **options})


def change(module, seed=1):
    """Other numbers in rows and hops."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.mul_(0.9).add_(0.1 * noise.to(p.dtype))


def rows_of(module):
    """Id to its level and its row, of those that have one."""
    arena = module.arena
    levels = enumerate(arena.level().tolist())
    return {x: (level, arena.read(x)) for x, level in levels if level >= 0}


class ById:
    """The same average, in dictionaries: a row per id."""

    def __init__(self, kind):
        self.kind, self.updates = kind, 0

    def update(self, module):
        rows, chain = rows_of(module), module.chain.detach().clone()
        if not self.updates:
            self.rows, self.chain = rows, chain
        weight = 1 - DECAY if self.kind.startswith("ema") else 1 / (self.updates + 1)
        averaged = {}
        for x, (level, row) in rows.items():
            was, old = self.rows.get(x, (level, row))
            while was < level:
                was, old = was + 1, promote_reference(old, was, self.chain, SIZES)
            old = old if was == level else row
            averaged[x] = level, old + weight * (row - old)
        self.rows = averaged
        self.chain = self.chain + weight * (chain - self.chain)
        self.updates += 1

    def outputs(self, ids):
        found = []
        for level, row in (self.rows[x] for x in ids.tolist()):
            for weight, bias in split_chain(self.chain, SIZES)[level:]:
                row = weight @ row + bias
            found.append(row)
        return torch.stack(found)


def optimizers(module, name):
    if name == "torch":
        return [torch.optim.Adam(module.parameters(), lr=0.02)]
    if name == "sgd":
        return [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.5)]
    fused = optim.Adagrad(module, lr=0.05) if name == "adagrad" else optim.Adam(module, lr=0.02)
    return [fused, torch.optim.Adam(module.parameters(), lr=0.02)]


def disturb(module, step, generator):
    """Rows grow, one by one and many levels at once, come and go; the arena grows and shrinks."""
    arena = module.arena
    if step % 5 == 2:
        module.promote(torch.randint(50, (3,), generator=generator))
    if step % 40 == 11:
        module.resize(torch.randint(5, (2,), generator=generator) + step // 40, SIZES[-1])
    if step % 50 == 20:
        arena.free(LENT[: 1 + step // 50])
    if step % 50 == 30:
        arena.insert(LENT[: 1 + step // 50], step // 100)
    if step in (60, 140):
        module.compact()
    if step == 100:
        module.reserve(40)
    if step == 170:
        arena.reclaim()


def train(module, average, using, *, steps=range(STEPS), each=lambda step: None):
    """The optimizers are built anew before the steps."""
    stepping = optimizers(module, using)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(50, (16,), generator=generator)
        target = torch.sin(ids.double())[:, None] * torch.linspace(0, 1, SIZES[-1])
        (module(ids) - target).square().mean().backward()
        for optimizer in stepping:
            optimizer.step()
            optimizer.zero_grad()
        disturb(module, step, generator)
        if step >= 7:  # rows have grown before the first update
            average.update_parameters(module)
        each(step)


def same_rows(one, two):
    same(
        {x: list(row) for x, row in rows_of(one).items()},
        {x: list(r) for x, r in rows_of(two).items()},
    )
    assert torch.equal(one.chain, two.chain)


def is_matched(average, module):
    """Places, state dict and copies are whole."""
    for name in ("row_start", "page_level", "row_size"):
        assert torch.equal(getattr(average.arena, name), getattr(module.arena, name))
    assert average.arena.storage.shape == module.arena.storage.shape
    return torch.equal(average.sizes_of(), module.sizes_of())


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("using", ["torch", "sgd", "adam", "adagrad"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_average_by_id(kind, using):
    module, expected = table(), ById(kind)
    average = AveragedModel(module, **KINDS[kind])

    def each(step):
        if step < 7:
            return
        expected.update(module)
        if step % 9 == 0 or step == STEPS - 1:
            found = rows_of(average.module)
            assert found.keys() == expected.rows.keys()
            for x, (level, row) in expected.rows.items():
                assert found[x][0] == level
                torch.testing.assert_close(found[x][1], row, **CLOSE)
            torch.testing.assert_close(average.module.chain, expected.chain, **CLOSE)
            torch.testing.assert_close(average(IDS), expected.outputs(IDS), **CLOSE)

    train(module, average, using, each=each)
    assert set(module.sizes_of(IDS).tolist()) == set(SIZES) and average.n_averaged == STEPS - 7


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("init", ["padded", "isometric"])
def test_of_fixed_hops_it_is_the_average_of_the_outputs(kind, init):
    module = table(init=init)
    module.chain.requires_grad_(False)
    average, outputs = AveragedModel(module, **KINDS[kind]), []

    def each(step):
        if step < 7:
            return
        y = module(IDS).detach()
        weight = 1 - DECAY if kind == "ema" else 1 / (len(outputs) + 1)
        outputs.append(outputs[-1].lerp(y, weight) if outputs else y)
        torch.testing.assert_close(average(IDS), outputs[-1], **CLOSE)

    train(module, average, "adagrad", each=each)
    assert torch.equal(average.module.chain, module.chain)


def test_equal_bits_in_two_runs_also_when_evaluated_in_between():
    runs = []
    for evaluated in (False, False, True):
        module = table()
        average = AveragedModel(module, **KINDS["ema"])
        seen = []

        def each(step, average=average, seen=seen, evaluated=evaluated):
            if evaluated:
                seen.append(average(IDS).detach())

        train(module, average, "adam", each=each)
        assert len(seen) == STEPS * evaluated
        runs.append((average.state_dict(), average(IDS).detach(), *seen[-1:]))
    same(runs[0][0], runs[1][0])
    same(runs[0][0], runs[2][0])
    assert torch.equal(runs[2][1], runs[2][2]) and torch.equal(runs[0][1], runs[2][1])


GROWING = {
    "promoted": lambda m: m.promote(IDS[10:20]),
    "several levels": lambda m: m.resize(IDS[:9], 8),
    "all": lambda m: m.resize(IDS, 8),
    "compacted": lambda m: (m.promote(IDS), m.compact()),
    "reserved": lambda m: m.reserve(300),
    "in reserved room": lambda m: (m.reserve(300), m.promote(IDS[7:30])),
    "shrunk": lambda m: (m.reserve(300), m.compact()),
    "pages of another size": lambda m: (m.resize(IDS, 8), m.arena.reclaim(), m.promote(LENT)),
    "nothing": lambda m: None,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grow", GROWING)
def test_matching_does_not_change_the_outputs(grow, dtype):
    module = table(dtype=dtype)
    module.promote(IDS[30:])
    average = AveragedModel(module)
    change(average)
    before = average(torch.arange(N)).detach()
    GROWING[grow](module)
    source = copy.deepcopy(module.state_dict())
    match_rows(average, module)
    assert is_matched(average.module, module)
    bound = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(average(torch.arange(N)), before, **bound)
    same(module.state_dict(), source)
    # Its own rows move on as those of any table.
    average.module.promote(IDS)
    torch.testing.assert_close(average(torch.arange(N)), before, **bound)


def test_rows_that_did_not_grow_keep_their_bits():
    module = table()
    average = AveragedModel(module)
    change(average)
    before = rows_of(average.module)
    module.promote(IDS[:20])
    module.compact()
    match_rows(average, module)
    after = rows_of(average.module)
    assert all(torch.equal(after[x][1], before[x][1]) for x in range(20, N))
    assert all(after[x][0] == 1 for x in range(20))


@pytest.mark.parametrize("grow", GROWING)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_copies_the_model(kind, grow):
    module = table()
    average = AveragedModel(module, **KINDS[kind])
    change(module)
    GROWING[grow](module)
    average.update_parameters(module)
    same_rows(average.module, module)
    assert torch.equal(average(IDS), module(IDS)) and average.n_averaged == 1


def test_shorter_and_missing_rows_take_the_models_numbers():
    small = table()
    module = table()
    module.promote(IDS)
    module.arena.free(LENT[:4])
    average = AveragedModel(module, **KINDS["ema"])
    average.update_parameters(module)
    change(module)
    average.update_parameters(module)
    kept = rows_of(average.module)
    change(small, seed=5)
    small.promote(IDS[:7])
    small.arena.free(LENT[-3:])
    module.load_state_dict(small.state_dict())
    average.update_parameters(module)
    assert is_matched(average.module, module)
    found, now = rows_of(average.module), rows_of(module)
    assert found.keys() == now.keys() == set(range(N - 3))
    for x, (level, row) in found.items():
        longer = x not in kept or kept[x][0] > level
        expected = now[x][1] if longer else kept[x][1].lerp(now[x][1], 1 - DECAY)
        torch.testing.assert_close(row, expected, **CLOSE)
        assert longer == (7 <= x < 54)


# ---- states and copies --------------------------------------------------------------------------


def test_a_state_dict_goes_on_in_a_fresh_average():
    module = table()
    average = AveragedModel(module, **KINDS["ema"])
    train(module, average, "sgd", steps=range(90))
    saved = copy.deepcopy((module.state_dict(), average.state_dict()))
    places = module.arena.free_places()
    copied = copy.deepcopy((module, average))
    fresh = table()
    averages = [average, AveragedModel(fresh, **KINDS["ema"]), copied[1]]
    fresh.load_state_dict(saved[0])
    fresh.arena.order_free_places(places)
    copied[0].arena.order_free_places(places)
    averages[1].load_state_dict(saved[1])
    same_rows(averages[1].module, average.module)
    assert averages[1].n_averaged == average.n_averaged > 80
    for each, own in zip((module, fresh, copied[0]), averages, strict=True):
        train(each, own, "sgd", steps=range(90, 150))
    for own in averages[1:]:
        same_rows(own.module, average.module)
        assert torch.equal(own(IDS), average(IDS)) and own.n_averaged == average.n_averaged


def test_a_state_kept_by_reference_stays_whole():
    """Rows of a present size move in place; aliases see the table of the moment."""
    module = table()
    module.reserve(300)
    average = AveragedModel(module)
    held = average.module.state_dict()
    for grow in (lambda: module.promote(IDS[:9]), lambda: module.resize(IDS, 8)):
        change(module)
        grow()
        average.update_parameters(module)
        other = table()
        other.load_state_dict(held)
        same_rows(other, average.module)
    module.reserve(3000)
    before = copy.deepcopy(held)
    match_rows(average, module)
    same(held, before)
    assert is_matched(average.module, module)


def test_what_an_optimizer_holds_for_an_average_goes_with_its_rows():
    module = table()
    average = copy.deepcopy(module)
    stepping = torch.optim.Adagrad(average.parameters(), initial_accumulator_value=0.25)
    average(IDS).square().sum().backward()
    stepping.step()
    state = stepping.state[average.arena.storage]

    def by_id(flat):
        layout = average.arena.layout
        starts, sizes = layout.row_start.tolist(), average.sizes_of().tolist()
        return [flat[s : s + d].clone() for s, d in zip(starts, sizes, strict=True)]

    before = by_id(state["sum"]), by_id(average.arena.storage.grad)
    for grow in (lambda: module.promote(IDS[:9]), module.compact, lambda: module.reserve(200)):
        grow()
        match_rows(average, module)
        after = by_id(state["sum"]), by_id(average.arena.storage.grad)
        for old, new, fresh in zip(before, after, (0.25, 0.0), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old[9:], new[9:], strict=True))
            assert all(torch.equal(b, torch.full((4,), fresh).double()) for b in new[:9])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_fused_optimizer_of_an_average_follows(sparse):
    module = table(sparse=sparse)
    average = copy.deepcopy(module)
    stepping = optim.Adagrad(average, rowwise=True)
    average(IDS).square().sum().backward()
    before = stepping.state[average.arena.storage]["sum"].clone()
    module.promote(IDS[:9])
    match_rows(average, module)
    after = stepping.state[average.arena.storage]["sum"]
    assert torch.equal(after[9:], before[9:]) and before[:9].all() and not after[:9].any()


# ---- models of several kinds --------------------------------------------------------------------


class Model(nn.Module):
    """Tables of several kinds, one of them twice, a frozen one, and buffers that are averaged."""

    def __init__(self, sizes=SIZES):
        super().__init__()
        torch.manual_seed(0)
        self.table = ResizableEmbedding(N, sizes=sizes)
        self.again = self.table
        self.bag = ResizableEmbeddingBag(N, sizes=sizes, mode="sum", padding_idx=0)
        self.pair = ResizableEmbeddingCollection({"a": N, "b": 9}, sizes=sizes)
        self.frozen = ResizableEmbedding(N, sizes=sizes, _freeze=True)
        self.plain = nn.Embedding(N, sizes[-1])
        self.norm = nn.BatchNorm1d(sizes[-1])
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, ids):
        pair = self.pair({"a": ids, "b": ids % 9})
        y = self.table(ids) + self.again(ids + 1) + self.frozen(ids) + self.plain(ids)
        return self.norm(y + self.bag(ids[:, None]) + pair["a"] + pair["b"])

    def grow(self, step):
        for one in (self.table, self.bag, self.frozen):
            one.promote(IDS[step::5])
        self.pair.promote({"a": IDS[step::4], "b": torch.tensor([step])})


def fit(model, average, steps=6, grows=True):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        model(IDS[:40]).square().mul(torch.linspace(0, 1, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 2
        if grows:
            model.grow(step)
        average.update_parameters(model)


@pytest.mark.parametrize("buffers", [False, True])
def test_all_tables_of_a_model(buffers):
    model = Model()
    average = AveragedModel(model, use_buffers=buffers, **KINDS["ema"])
    by_id = {}

    class Watching:
        """Updates the expected averages beside it."""

        @staticmethod
        def update_parameters(model):
            average.update_parameters(model)
            for name, one in tables(model).items():
                by_id.setdefault(name, ById("ema")).update(one)

    def tables(model):
        return {n: m for n, m in model.named_modules() if isinstance(m, ResizableEmbedding)}

    fit(model, Watching)
    found = tables(average.module)
    assert found.keys() == {"table", "bag", "pair.rows", "frozen"} == by_id.keys()
    for name, one in found.items():
        assert is_matched(one, tables(model)[name])
        for x, (level, row) in by_id[name].rows.items():
            assert one.arena.level()[x] == level
            torch.testing.assert_close(one.arena.read(x), row, rtol=1e-4, atol=1e-5)
    assert average.module.again is average.module.table
    assert (average.module.norm.running_mean != model.norm.running_mean).any() == buffers
    assert torch.isfinite(average(IDS[:40])).all()


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(8,), SIZES])
def test_where_no_row_moves_it_is_torchs(sizes, kind, buffers):
    """Bit by bit, other integers too. torch's own rounds locations, if buffers are averaged."""
    models = Model(sizes), Model(sizes)
    averages = [
        cls(model, use_buffers=buffers, **KINDS[kind])
        for cls, model in zip((AveragedModel, swa_utils.AveragedModel), models, strict=True)
    ]
    for model, average in zip(models, averages, strict=True):
        fit(model, average, grows=False)
    ours, theirs, source = (
        dict([*one.named_parameters(), *one.named_buffers()]) for one in (*averages, models[0])
    )
    assert ours.keys() == theirs.keys()
    places = [name for name in ours if ".arena." in name and not name.endswith(".storage")]
    assert len(places) == 4 * 4 * (len(sizes) > 1)
    for name in ours:
        expected = source[name.removeprefix("module.")] if name in places else theirs[name]
        assert torch.equal(ours[name], expected), name


def test_update_bn():
    model = Model()
    average = AveragedModel(model, **KINDS["ema"])
    fit(model, average)
    loader = [IDS[:20], IDS[20:40], IDS[9:33]]
    expected = copy.deepcopy(average.module)
    expected.norm = nn.Identity()
    y = torch.stack([expected(ids).mean(0) for ids in loader]).mean(0)
    swa_utils.update_bn(loader, average)
    torch.testing.assert_close(average.module.norm.running_mean, y)
    model.grow(0)
    average.update_parameters(model)
    assert is_matched(average.module.table, model.table)


def test_a_wrapped_model_is_averaged():
    model = Model()
    average = AveragedModel(model, **KINDS["ema"])
    twin = AveragedModel(model, **KINDS["ema"])
    wrapped = nn.Sequential(model)
    for step in range(3):
        change(model, seed=step)
        model.grow(step)
        average.update_parameters(wrapped)
        twin.update_parameters(model)
    same(average.state_dict(), twin.state_dict())


# ---- loops of one's own -------------------------------------------------------------------------


def test_torchs_own_average_of_matched_rows():
    """It copies all buffers, the count of moves as well."""
    module = table()
    ours = AveragedModel(module, **KINDS["ema"])
    theirs = swa_utils.AveragedModel(module, **KINDS["ema"])
    for step in range(12):
        change(module, seed=step)
        if step % 4 < 3:
            module.promote(IDS[step::5])
        if step % 4 > 1:
            module.compact()  # the second time it counts, and moves nothing
        if step == 6:
            theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))
        ours.update_parameters(module)
        match_rows(theirs, module)
        theirs.update_parameters(module)
        assert torch.equal(theirs(IDS), ours(IDS))
    same_rows(theirs.module, ours.module)


@pytest.mark.skipif("native" not in BACKENDS, reason="free places are derived on stacks otherwise")
def test_starts_that_an_average_rounded_are_refused_when_rows_move():
    """Lightning copies the average of all buffers by way of ``.data``."""
    module = ResizableEmbedding(60, 16)
    start = module.arena.row_start
    start.data.copy_((0.9 * start + 0.1 * start).int())
    with pytest.raises(RuntimeError, match="do not fit together, .*: average by esapn_kernels"):
        module.promote(torch.arange(30))


def test_while_no_row_moves_nothing_is_compared():
    module = table()
    average = AveragedModel(module, **KINDS["ema"])
    with mock.patch("torch.equal", wraps=torch.equal) as equal:
        for _ in range(3):
            average.update_parameters(module)
            average(IDS)
        first = equal.call_count
        for _ in range(3):
            change(module)
            average.update_parameters(module)
            average(IDS)
            assert equal.call_count == first > 0
        module.reserve(100)
        average.update_parameters(module)
        module.promote(IDS[:1])
        average.update_parameters(module)
        assert equal.call_count > first
    assert is_matched(average.module, module)


def test_rows_that_a_graph_moves_are_found():
    """Its replays write without a call, and no version counts them."""
    module = table()
    module.reserve(300)
    average = AveragedModel(module)
    average.update_parameters(module)
    moved = copy.deepcopy(module)
    moved.promote(IDS[:9])
    module.arena._counted = None
    for own, new in zip(module.arena.places, moved.arena.places, strict=True):
        own.data.copy_(new)
    module.arena.storage.data.copy_(moved.arena.storage)
    average.update_parameters(module)
    assert is_matched(average.module, module)
    torch.testing.assert_close(average(IDS), moved(IDS), **CLOSE)


# ---- errors -------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second


OTHERS = {
    "fewer tables": (lambda: table(), "has 2 tables, and the model 1"),
    "sizes": (
        lambda: Two(table(), ResizableEmbedding(N, sizes=(2, 8))),
        r"second' of the average has 60 rows of the sizes \(2, 4, 8\), that of the model 60 rows",
    ),
    "rows": (lambda: Two(table(), ResizableEmbedding(N + 1, sizes=SIZES)), "that of the model 61"),
    "one size": (lambda: Two(table(), ResizableEmbedding(N, 8, sizes=(8,))), "one size"),
    "meta": (lambda: Two(table(), table(device="meta")), "on the meta device"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_tables_are_refused_and_nothing_is_changed(other):
    model = Two(table(), table())
    average = AveragedModel(model)
    before = copy.deepcopy(average.state_dict())
    build, why = OTHERS[other]
    wrong = build()
    if isinstance(wrong, Two):
        wrong.first.promote(IDS)
    for call in (lambda: average.update_parameters(wrong), lambda: match_rows(average, wrong)):
        with pytest.raises(ValueError, match=why) as caught:
            call()
        assert "\n" not in str(caught.value)
        same(average.state_dict(), before)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def pruned(model):
    with torch.no_grad():  # else torch refuses copies
        prune.l1_unstructured(model.second.arena, "storage", 0.5)


def parametrized(model):
    parametrize.register_parametrization(model.second.arena, "storage", Doubled())


IMMOVABLE = {
    "shared": (None, lambda m: m.second.share_memory(), "shared memory"),
    "pruned": (pruned, pruned, "computed"),
    "parametrized": (parametrized, parametrized, "computed"),
    "full": (None, lambda m: setattr(m.second.arena, "max_elements", 8), "max_elements=8"),
}


@pytest.mark.parametrize("kind", IMMOVABLE)
def test_rows_that_cannot_move_are_refused_and_nothing_is_changed(kind):
    of_model, of_average, why = IMMOVABLE[kind]
    model = Two(table(), table())
    average = AveragedModel(model)
    model.first.promote(IDS)
    model.second.promote(IDS)
    if of_model is not None:
        of_model(model)
    of_average(average.module)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(RuntimeError, match=why) as caught:
        average.update_parameters(model)
    assert "\n" not in str(caught.value)
    same(average.state_dict(), before)


@pytest.mark.parametrize("make", [pruned, parametrized], ids=["pruned", "parametrized"])
def test_computed_rows_that_stay_are_averaged_as_by_torch(make):
    model = Two(table(), table())
    make(model)
    averages = [cls(model, **KINDS["ema"]) for cls in (AveragedModel, swa_utils.AveragedModel)]
    for step in range(3):
        change(model, seed=step)
        for average in averages:
            average.update_parameters(model)
    same(averages[0].state_dict(), averages[1].state_dict())
    with pytest.raises(ValueError, match="computed"):
        match_rows(averages[0], Two(table(), table()))


def test_parametrized_hops_carry_grown_rows():
    module = table()
    parametrize.register_parametrization(module, "chain", Doubled())
    average = AveragedModel(module)
    change(average)
    before = average(IDS).detach()
    module.promote(IDS[:9])
    match_rows(average, module)
    torch.testing.assert_close(average(IDS), before, **CLOSE)


def test_mixed_rows_are_refused():
    module = table()
    module.reserve(200)
    theirs = swa_utils.AveragedModel(module)
    theirs.update_parameters(module)
    module.promote(IDS[:7])
    theirs.update_parameters(module)
    for call in (lambda: match_rows(theirs, module), lambda: match_rows(module, theirs)):
        with pytest.raises(RuntimeError, match="average by esapn_kernels.averaging"):
            call()


def test_on_the_meta_device():
    model = table(device="meta")
    average = AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    assert average.module.arena.storage.is_meta and average.n_averaged == 2
    with pytest.raises(ValueError, match="on the meta device"):
        average.update_parameters(table())


def test_an_arena_without_pages_matches():
    """Neither has a row at first; those that come are the other's."""
    arena, other, chain = Arena(N, SIZES, level=-1), Arena(N, SIZES, level=-1), torch.zeros(54)
    assert arena.lies_as(other)
    other.insert(LENT, 2)
    with torch.no_grad():
        other.storage.normal_()
    assert not arena.lies_as(other)
    arena.match(other, chain)
    assert arena.lies_as(other)
    assert all(torch.equal(arena.read(x), other.read(x)) for x in LENT.tolist())
    other.free(LENT)
    other.compact()
    arena.match(other, chain)
    assert arena.level().max() == -1 and arena.storage.numel() == 0
