"""What interpreted kernels read and write in memory: nothing outside, nothing out of order.

Warps of one program run in any order between two barriers. A block of numbers per row may be read
by every warp and written by one, so a write after a read of the same place needs a barrier. A
two-dimensional block is exempt: what is written to a place there comes from what the same thread
read at that place.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.gpu import launch
from esapn_kernels.ops.backend import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs interpreted kernels")

SIZES = (2, 4, 8, 16, 64, 128)


class Accesses:
    """Places read and written since a program began, by the barrier that they follow."""

    def __init__(self) -> None:
        self.faults: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.allowed: list[tuple[int, int]] = []
        self.begin()

    def begin(self) -> None:
        self.read: list[tuple[str, np.ndarray]] = []
        self.written: list[tuple[str, np.ndarray]] = []

    def note(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        where = _line()
        self.seen[kind] += 1
        if mask.dtype != np.bool_:
            self.faults[f"{where}: a mask of {mask.dtype}"] += 1
        places = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        inside = np.zeros(places.shape, dtype=bool)
        for first, end in self.allowed:
            inside |= (places >= first) & (places + itemsize <= end)
        if not inside.all():
            self.faults[f"{where}: {kind} outside of every argument"] += 1
        for other, held in self.written if kind == "read" else self.read:
            if np.isin(places, held).any():
                did = "wrote" if kind == "read" else "read"
                self.faults[f"{where} {kind}s what {other} {did}"] += 1
        if kind == "write":
            self.written.append((where, places))
        elif sum(n > 1 for n in pointers.shape) < 2:
            self.read.append((where, places))


def _line() -> str:
    """The line of a kernel that runs."""
    frame = sys._getframe(2)
    while "esapn_kernels" not in frame.f_code.co_filename:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('esapn_kernels')[2]}:{frame.f_lineno}"


@pytest.fixture
def accesses(monkeypatch) -> Iterator[Accesses]:
    from triton.runtime import interpreter

    found = Accesses()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    set_grid_idx, call = builder.set_grid_idx, executor.__call__

    def itemsize(pointers):
        return pointers.get_element_ty().primitive_bitwidth // 8

    def load(self, pointers, mask, *rest):
        found.note("read", pointers.data, np.asarray(mask.data), itemsize(pointers))
        return masked_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        found.note("write", pointers.data, np.asarray(mask.data), itemsize(pointers))
        return masked_store(self, pointers, value, mask, *rest)

    def program(self, *index):
        found.begin()
        return set_grid_idx(self, *index)

    def barrier(self, *args):
        found.seen["barrier"] += 1
        found.begin()

    def launched(self, *args, **known):
        tensors = [a for a in (*args, *known.values()) if isinstance(a, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors]
        found.allowed = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        found.seen[self.fn.__name__] += 1
        return call(self, *args, **known)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(builder, "create_barrier", barrier)
    monkeypatch.setattr(builder, "set_grid_idx", program)
    monkeypatch.setattr(executor, "__call__", launched)
    yield found


OPTIMIZERS = {
    "adam": lambda module: optim.Adam(module, lr=0.1),
    "adagrad": lambda module: optim.Adagrad(module, lr=0.1),
    "rowwise": lambda module: optim.Adagrad(module, lr=0.1, rowwise=True),
    "sgd": lambda module: optim.SGD(module, lr=0.1),
    "gradient": lambda module: None,
}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_step(rule, accesses, monkeypatch):
    monkeypatch.setattr(launch, "groups_ids", lambda n_ids, *_: n_ids < 100)
    size = torch.tensor(SIZES)[torch.arange(60) % len(SIZES)]
    module = ResizableEmbedding(60, initial_size=size, backend="triton")
    rows = OPTIMIZERS[rule](module)
    # Every row, some twice, and the first so often that a stretch of it is summed beforehand.
    every = torch.cat([torch.arange(60), torch.arange(0, 60, 5)])
    for ids in (torch.cat([every, torch.zeros(260).long()]), every):
        module(ids).backward(torch.randn(len(ids), SIZES[-1]))
    module.promote(every[20:])
    del rows  # attached until here
    kernels = {name for name in accesses.seen if name.endswith("_kernel")}
    assert len(kernels) >= 15 and {"_sums_kernel", "_hot_kernel"} <= kernels
    assert accesses.seen["barrier"] and accesses.seen["read"] and accesses.seen["write"]
    assert accesses.faults == Counter()


def test_rows_that_come_and_go(accesses):
    arena = ResizableEmbedding(60, sizes=(2, 4, 8), backend="triton").arena
    arena.free(torch.arange(0, 40, 3), backend="triton")
    arena.insert(torch.arange(0, 30), 1, backend="triton")
    assert {"_claim_kernel", "_scan_kernel", "_move_kernel"} <= set(accesses.seen)
    assert accesses.faults == Counter()


def test_an_unfenced_write_is_found(accesses):
    accesses.allowed = [(0, 64)]
    places = np.arange(0, 32, 4, dtype=np.uint64)
    frame = "esapn_kernels/gpu/update.py"
    note = compile("note(kind, places, mask, 4)", frame, "eval")

    def at(kind, mask):
        eval(note, {"note": accesses.note, "kind": kind, "places": places, "mask": mask})

    every = np.ones(8, dtype=bool)
    at("read", every)
    accesses.begin()
    at("write", every)
    assert accesses.faults == Counter()
    accesses.begin()
    at("read", every)
    at("write", every)
    at("write", every.astype(np.int32))
    accesses.allowed = [(0, 8)]
    at("read", every)
    assert {fault.partition(" ")[2] for fault in accesses.faults} == {
        "writes what /gpu/update.py:1 read",
        "a mask of int32",
        "reads what /gpu/update.py:1 wrote",
        "read outside of every argument",
    }
