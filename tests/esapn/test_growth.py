"""Rows that grow with their Adagrad sums, and the zero-padding hops that make it exact."""

from __future__ import annotations

import math

import pytest
import torch

from esapn.growth import promote_keeping, promote_keeping_all
from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.reference import split_chain

SIZES = (2, 4, 5)
LR = 0.1


def taught(rows: int = 12, seed: int = 0, steps: int = 4, sizes=SIZES):
    """A padded table with rows of all sizes and sums of several steps; its optimizer."""
    torch.manual_seed(seed)
    table = ResizableEmbedding(rows, sizes=sizes, init="padded")
    table.chain.requires_grad_(False)
    optimizer = optim.Adagrad(table, lr=LR)
    table.promote(torch.arange(4, rows))
    table.promote(torch.arange(9, rows))
    for _ in range(steps):
        ids = torch.randint(rows, (8,))
        (table(ids) * torch.randn(8, sizes[-1])).sum().backward()
        optimizer.step()
    return table, optimizer


def sums_of(table, optimizer, index: int) -> torch.Tensor:
    start, size = int(table.arena.row_start[index]), int(table.sizes_of(torch.tensor([index])))
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


@pytest.mark.parametrize("ids", [[1], [1, 6, 3], [0, 11, 7, 2], list(range(12))])
def test_sums_are_carried_exactly(ids):
    table, optimizer = taught()
    before = {i: sums_of(table, optimizer, i) for i in range(12)}
    everyone = torch.arange(12)
    outputs = table(everyone).detach()
    moved = promote_keeping(table, torch.tensor(ids), torch.ones(len(ids)).bool(), "sum")
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
    optimizer = optim.Adagrad(table, lr=LR, initial_accumulator_value=0.5)
    table(torch.tensor([1])).sum().backward()
    old = sums_of(table, optimizer, 1)
    assert old.gt(0.5).all()
    promote_keeping(table, torch.tensor([1]), torch.tensor([True]), "sum")
    expected = torch.cat([old / 2, torch.full((2,), 0.5)])
    torch.testing.assert_close(sums_of(table, optimizer, 1), expected)


@pytest.mark.parametrize("seed", range(4))
def test_mask_and_chosen_rows_agree(seed):
    """``promote_keeping`` looks on a CPU; the form for a GPU takes all rows and the mask."""
    generator = torch.Generator().manual_seed(seed)
    one, two = taught(seed=seed), taught(seed=seed)
    for _ in range(3):
        ids = torch.randperm(12, generator=generator)[:8]
        mask = torch.rand(8, generator=generator) < 0.5
        first = promote_keeping(one[0], ids, mask, "sum")
        second = promote_keeping_all(two[0], ids, mask, "sum")
        assert torch.equal(first, second) and not first[~mask].any()
        for a, b in zip(everything(*one), everything(*two), strict=True):
            assert torch.equal(a, b)


def test_nobody_moves():
    table, optimizer = taught()
    before = everything(table, optimizer)
    ids = torch.tensor([3, 5])
    assert not promote_keeping(table, ids, torch.zeros(2).bool(), "sum").any()
    assert promote_keeping(table, ids[:0], torch.zeros(0).bool(), "sum").shape == (0,)
    for a, b in zip(everything(table, optimizer), before, strict=True):
        assert torch.equal(a, b)


def test_neighbours_of_moved_rows_keep_their_sums():
    """Windows of d_n numbers from a row's start reach into other rows, and beyond the end."""
    table, optimizer = taught(rows=40, sizes=(1, 2, 7))
    before = [sums_of(table, optimizer, i) for i in range(40)]
    ids = torch.arange(0, 40, 3)
    promote_keeping_all(table, ids, torch.ones(len(ids)).bool(), "sum")
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
    assert promote_keeping(table, ids, torch.tensor([True]), "sum").all()
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
    promote_keeping(table, ids, torch.tensor([True]), "sum")
    fresh.promote(ids)
    steps = []
    for module, rows in ((table, optimizer), (fresh, other)):
        before = module.arena.read(1).clone()
        (module(ids) * 0.1).sum().backward()
        rows.step()
        steps.append((module.arena.read(1) - before)[:2].abs())
    torch.testing.assert_close(steps[1], torch.full((2,), LR))
    assert steps[0].max() < 0.3 * LR


def test_a_fused_optimizer_is_needed():
    table = ResizableEmbedding(4, sizes=SIZES, init="padded")
    with pytest.raises(ValueError, match="needs a fused optimizer"):
        promote_keeping(table, torch.tensor([1]), torch.tensor([True]), "sum")
