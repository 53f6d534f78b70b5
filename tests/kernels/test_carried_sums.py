"""Rows that grow with their Adagrad sums, and the zero-padding hops that make it exact."""

from __future__ import annotations

import math

import pytest
import torch

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.reference import split_chain
from esapn_kernels.storage import followers as followers_file
from tests.kernels.layouts import HOSTS
from tests.kernels.layouts import SMALL as SIZES

LR = 0.1


def taught(rows: int = 12, seed: int = 0, steps: int = 4, sizes=SIZES, device="cpu"):
    """A padded table with rows of all sizes and sums of several steps; its optimizer."""
    torch.manual_seed(seed)
    table = ResizableEmbedding(rows, sizes=sizes, init="padded").to(device)
    table.chain.requires_grad_(False)
    optimizer = optim.Adagrad(table, lr=LR)
    table.promote(torch.arange(4, rows, device=device))
    table.promote(torch.arange(9, rows, device=device))
    for _ in range(steps):
        ids = torch.randint(rows, (8,)).to(device)
        (table(ids) * torch.randn(8, sizes[-1]).to(device)).sum().backward()
        optimizer.step()
    return table, optimizer


def sums_of(table, optimizer, index: int) -> torch.Tensor:
    start, size = int(table.arena.row_start[index]), int(table.sizes_of()[index])
    return optimizer.state[table.arena.storage]["sum"][start : start + size].clone()


def everything(table, optimizer) -> list[torch.Tensor]:
    n = range(table.num_embeddings)
    return [f(i) for i in n for f in (table.arena.read, lambda i: sums_of(table, optimizer, i))]


# Zero-padding hops


@pytest.mark.parametrize("sizes", [(2, 4, 5), (1, 3), (2, 4, 8, 16)])
def test_padded_hops_append_zeros(sizes):
    table = ResizableEmbedding(20, sizes=sizes, init="padded")
    everyone = torch.arange(20)
    for small, large in zip(sizes, sizes[1:], strict=False):
        rows, before = [table.arena.read(i) for i in range(20)], table(everyone).detach()
        assert table.promote(everyone).all()
        gain = math.sqrt(large / small)
        for i, row in enumerate(rows):
            expected = torch.cat([gain * row, torch.zeros(large - small)])
            torch.testing.assert_close(table.arena.read(i), expected)
        torch.testing.assert_close(table(everyone).detach(), before)


def test_padded_hops_are_isometric_up_to_their_gain():
    for weight, bias in split_chain(ResizableEmbedding(3, sizes=SIZES, init="padded").chain, SIZES):
        d_out, d_in = weight.shape
        torch.testing.assert_close(weight.T @ weight, d_out / d_in * torch.eye(d_in))
        assert torch.count_nonzero(weight) == d_in and weight.diagonal().gt(0).all()
        assert bias.eq(0).all()


def test_padded_outputs_have_one_variance_at_every_size():
    level = torch.tensor(SIZES).repeat_interleave(4000)
    table = ResizableEmbedding(12_000, sizes=SIZES, init="padded", initial_size=level, init_std=0.3)
    for rows in table(torch.arange(12_000)).detach().split(4000):
        assert rows.square().mean().sqrt().item() == pytest.approx(0.3, rel=0.04)


# Sums that go along


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("ids", [[1], [1, 6, 3], [0, 11, 7, 2], list(range(12))])
def test_sums_are_carried_exactly(ids, host):
    table, optimizer = taught()
    table.backend = host
    before = {i: sums_of(table, optimizer, i) for i in range(12)}
    everyone = torch.arange(12)
    outputs = table(everyone).detach()
    moved = table.promote(torch.tensor(ids), torch.ones(len(ids)).bool())
    assert moved.tolist() == [len(before[i]) < SIZES[-1] for i in ids]
    for i, old in before.items():
        new = sums_of(table, optimizer, i)
        if i not in ids or len(old) == SIZES[-1]:
            assert torch.equal(new, old)
            continue
        expected = torch.zeros(SIZES[SIZES.index(len(old)) + 1])
        expected[: len(old)] = old * (len(old) / len(expected))
        torch.testing.assert_close(new, expected, rtol=1e-6, atol=0)
        assert old.gt(0).any()
    torch.testing.assert_close(table(everyone).detach(), outputs)


def test_sums_that_do_not_start_at_zero():
    table = ResizableEmbedding(3, sizes=(2, 4), init="padded")
    table.chain.requires_grad_(False)
    optimizer = optim.Adagrad(table, lr=LR, initial_accumulator_value=0.5)
    table(torch.tensor([1])).sum().backward()
    old = sums_of(table, optimizer, 1)
    assert old.gt(0.5).all()
    table.promote(torch.tensor([1]), torch.tensor([True]))
    expected = torch.cat([old / 2, torch.full((2,), 0.5)])
    torch.testing.assert_close(sums_of(table, optimizer, 1), expected)


@pytest.fixture(params=[True, False], ids=["a-cpu", "a-gpu"])
def as_on(request, monkeypatch):
    """Where the host reads no tensor, all rows go through the same calls, masked."""
    monkeypatch.setattr(followers_file, "host_reads", lambda tensor: request.param)


@pytest.mark.parametrize("seed", range(4))
def test_mask_and_chosen_rows_agree(seed, as_on):
    generator = torch.Generator().manual_seed(seed)
    one, two = taught(seed=seed), taught(seed=seed)
    for _ in range(3):
        ids = torch.randperm(12, generator=generator)[:8]
        mask = torch.rand(8, generator=generator) < 0.5
        first = one[0].promote(ids, mask)
        second = two[0].promote(ids[mask])
        assert torch.equal(first[mask], second) and not first[~mask].any()
        for a, b in zip(everything(*one), everything(*two), strict=True):
            assert torch.equal(a, b)


def test_an_id_given_twice_is_carried_once(as_on, backend, device):
    one, two = taught(device=device), taught(device=device)
    one[0].backend = two[0].backend = backend
    ids = torch.tensor([6, 1, 6, 3, 1, 6], device=device)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], device=device).bool()
    assert torch.equal(one[0].promote(ids, mask), mask)
    assert two[0].promote(torch.tensor([6, 1, 3], device=device)).all()
    for a, b in zip(everything(*one), everything(*two), strict=True):
        assert torch.equal(a, b)


def test_ids_out_of_range_are_passed_over(as_on, device):
    (table, optimizer), two = taught(device=device), taught(device=device)
    ids = torch.tensor([6, -1, 12, 1, 99, -7], device=device)
    moved = table.arena.promote(ids, table.chain, carries=True, backend="triton")
    assert moved.tolist() == [True, False, False, True, False, False]
    assert two[0].promote(ids[[0, 3]]).all()
    for a, b in zip(everything(table, optimizer), everything(*two), strict=True):
        assert torch.equal(a, b)


def test_an_arena_without_rows(as_on, backend, device):
    table, optimizer = taught(device=device)
    ids = torch.arange(12, device=device)
    table.arena.free(ids, backend=backend)
    table.compact()
    assert not table.arena.promote(ids, table.chain, carries=True, backend=backend).any()
    assert optimizer.state[table.arena.storage]["sum"].shape == table.arena.storage.shape


def test_sums_of_torchs_adagrad_are_carried_too():
    table = ResizableEmbedding(3, sizes=(2, 4), init="padded")
    table.chain.requires_grad_(False)
    optimizer = torch.optim.Adagrad([table.arena.storage], lr=LR, initial_accumulator_value=0.25)
    table(torch.tensor([1])).sum().backward()
    optimizer.step()
    old = sums_of(table, optimizer, 1)
    table.promote(torch.tensor([1]))
    expected = torch.cat([old / 2, torch.full((2,), 0.25)])
    torch.testing.assert_close(sums_of(table, optimizer, 1), expected)


def test_fp64_sums_are_carried_in_fp64():
    table = ResizableEmbedding(3, sizes=(4, 5), init="padded", dtype=torch.float64)
    table.chain.requires_grad_(False)
    optimizer = optim.Adagrad(table, lr=LR)
    table(torch.tensor([1])).sum().backward()
    old = sums_of(table, optimizer, 1)
    table.promote(torch.tensor([1]))
    assert torch.equal(sums_of(table, optimizer, 1)[:4], old * 0.8)


@pytest.mark.parametrize("init, trained", [("padded", True), ("isometric", False)])
def test_sums_start_afresh_under_other_hops(init, trained):
    table = ResizableEmbedding(3, sizes=(2, 4), init=init)
    table.chain.requires_grad_(trained)
    optimizer = optim.Adagrad(table, lr=LR)
    table(torch.tensor([1])).sum().backward()
    assert sums_of(table, optimizer, 1).any()
    table.promote(torch.tensor([1]))
    assert not sums_of(table, optimizer, 1).any()


def test_no_row_moves():
    table, optimizer = taught()
    before = everything(table, optimizer)
    ids = torch.tensor([3, 5])
    assert not table.promote(ids, torch.zeros(2).bool()).any()
    assert table.promote(ids[:0], torch.zeros(0).bool()).shape == (0,)
    for a, b in zip(everything(table, optimizer), before, strict=True):
        assert torch.equal(a, b)


def test_neighbours_of_moved_rows_keep_their_sums(as_on):
    """Windows of D numbers from a row's start reach into other rows, and beyond the end."""
    table, optimizer = taught(rows=40, sizes=(1, 2, 7))
    before = [sums_of(table, optimizer, i) for i in range(40)]
    ids = torch.arange(0, 40, 3)
    table.promote(ids)
    for i, old in enumerate(before):
        if i % 3:
            assert torch.equal(sums_of(table, optimizer, i), old)


@pytest.mark.parametrize("index", [1, 6])
def test_the_next_step_of_the_old_numbers_is_that_of_a_twin_that_stayed(index):
    """With new numbers of zero, y moves as it would have, in the columns that the twin has."""
    (table, optimizer), (twin, other) = taught(), taught()
    ids = torch.tensor([index])
    width = int(twin.sizes_of(ids))
    assert torch.equal(table.arena.read(index), twin.arena.read(index))
    assert table.promote(ids, torch.tensor([True])).all()
    gain = math.sqrt(int(table.sizes_of(ids)) / width)
    for _ in range(3):
        weight = torch.randn(1, SIZES[-1])
        weight[:, width:] = 0  # the new numbers stay zero
        for module, rows in ((table, optimizer), (twin, other)):
            (module(ids) * weight).sum().backward()
            rows.step()
        carried = sums_of(table, optimizer, index)
        torch.testing.assert_close(carried[:width] * gain**2, sums_of(twin, other, index))
        assert carried[width:].eq(0).all()
        now, before = table.arena.read(index), twin.arena.read(index)
        assert now[width:].eq(0).all()
    # g cancels in g' / sqrt(s'): both rows took the same steps.
    start = taught()[0].arena.read(index)
    torch.testing.assert_close(now[:width] - gain * start, before - start)


def test_without_carried_sums_the_first_step_is_the_whole_rate():
    (table, optimizer), (fresh, other) = taught(steps=30), taught(steps=30)
    ids = torch.tensor([1])
    table.promote(ids, torch.tensor([True]))
    fresh.chain.requires_grad_(True)
    fresh.promote(ids)
    fresh.chain.requires_grad_(False)
    steps = []
    for module, rows in ((table, optimizer), (fresh, other)):
        before = module.arena.read(1).clone()
        (module(ids) * 0.1).sum().backward()
        rows.step()
        steps.append((module.arena.read(1) - before)[:2].abs())
    torch.testing.assert_close(steps[1], torch.full((2,), LR))
    assert steps[0].max() < 0.3 * LR
