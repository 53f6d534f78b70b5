"""Accesses of interpreted kernels: out of bounds, unordered, or with a result that order decides.

Every load, store and atomic of every program of a launch is held against those before it at the
same place (a place is an element of a storage, whichever argument it is reached by):

* outside: a place that lies outside of the argument whose pointer led there. Each argument has
  2^40 addresses of its own while a launch runs, so its neighbours in memory, other parts of one
  storage included, are outside of it. Such an access is not made;
* two programs, or two lanes of one program without a barrier between, write one place with
  different values;
* one program reads and another writes a place, or one of them by an atomic and the other not;
* one program writes a place after it read it, or reads it after it wrote it, without a barrier
  between. Warps run in any order between barriers, and a number may be read by several.

The launch is run on copies of its arguments with the programs in the given, the reversed and a
random order. The bits of all arguments must agree at the end; those of the given order remain.
Launches on storages above 256 MiB run in place, in the given order alone.

Exempt is a write after a read where one thread does both: the step of a row on itself. It holds
that (1) the value written is computed from the value read, lane by lane: a load marks its result,
elementwise operations hand marks on to results of the same shape, anything else (sums, products,
broadcasts, reshapes) drops them; (2) both are at the same lane of the block, and no other load nor
lane has read the place since the barrier; (3) the block has a lane for every thread, so that none
is read by several; (4) the store stands in a function of ``EXEMPT``: for these
``test_sanitizer.py`` compiles the kernels and holds that each place is loaded once, by one thread,
and that the value stored is computed from it. The layouts of load and store need not agree: a value
that goes to another warp goes through shared memory, with a barrier, before it is stored.

triton-viz 3.0 checks bounds alone, compute-sanitizer's racecheck shared memory alone, on a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

EXEMPT = frozenset({"finish_rows"})
"""Functions whose loads and stores in compiled code are tested."""

SPACE = 40
"""Bits of an argument's own addresses; it begins in their middle."""

LARGE = 1 << 28
"""Bytes of a storage of which no copies are made."""

AGAINST = {
    "reads": ("wrote", "updated atomically"),
    "writes": ("read", "wrote", "updated atomically"),
    "updates atomically": ("read", "wrote"),
}
"""What an access must be ordered against, and how it is remembered itself (the same position)."""
REMEMBERED = {"reads": "read", "writes": "wrote", "updates atomically": "updated atomically"}

ELEMENTWISE = ("unary_op", "binary_op", "ternary_op", "cast_impl", "create_fp_to_fp")
ELEMENTWISE += ("create_bitcast", "create_idiv", "create_fma", "create_fabs")

NOT_KERNELS = (str(Path(triton.__file__).parent), str(Path(__file__).parents[1] / "interpreter.py"))


class Memory:
    """A storage: a copy of its bytes, and of every place the last access of either kind.

    Accesses are numbered from 1; the number is negative where several programs made one.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.given = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.bytes, self.itemsize = self.given, tensor.itemsize
        n_places = storage.nbytes() // self.itemsize
        self.last = {kind: np.zeros(n_places, np.int32) for kind in REMEMBERED.values()}
        self.lane = np.zeros(n_places, np.int32)  # that read it since the barrier; -1: several


class Argument:
    """A tensor that a kernel was given: its name, and the part of a storage that it spans."""

    def __init__(self, name: str, tensor: torch.Tensor, memory: Memory) -> None:
        assert tensor.itemsize == memory.itemsize, f"{name}: a storage with elements of two sizes"
        self.name, self.memory = name, memory
        self.first = tensor.storage_offset()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        self.n_places = last + 1 if tensor.numel() else 0


class Sanitizer:
    """Faults of launches, each once, with the first place and program where it was found."""

    def __init__(self, exempt: frozenset[str] = EXEMPT) -> None:
        self.faults: dict[str, str] = {}
        self.launches: Counter[str] = Counter()
        self.seconds = 0.0
        self.exempt, self.exempted = exempt, set[tuple[str, str]]()

    def messages(self) -> list[str]:
        """A line for every fault."""
        return [f"{fault}, first {where}" for fault, where in self.faults.items()]

    def launch(self, executor: Any, *args: Any, **known: Any) -> None:
        """In place of ``GridExecutor.__call__``."""
        began = time.perf_counter()
        self.kernel, self.threads = executor.fn.__name__, 32 * known.get("num_warps", 4)
        self.launches[self.kernel] += 1
        parameters = inspect.signature(executor.fn).parameters
        known = {name: value for name, value in known.items() if name in parameters}
        given = inspect.getcallargs(executor.fn, *args, **known)
        self.arguments: list[Argument] = []
        memories: dict[int, Memory] = {}

        def convert(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                parts = [convert(f"{name}[{i}]", part) for i, part in enumerate(value)]
                return interpreter._tuple_create(value, parts)
            made = interpreter._implicit_cvt(value)
            if isinstance(value, torch.Tensor):
                # Storages without bytes all begin at 0.
                address = value.untyped_storage().data_ptr() or -len(self.arguments)
                if address not in memories:
                    memories[address] = Memory(value)
                self.arguments.append(Argument(name, value, memories[address]))
                start = (2 * len(self.arguments) - 1) << (SPACE - 1)
                made.handle.data = np.array([start], dtype=np.uint64)
            return made

        patched = interpreter._patch_lang(executor.fn)
        try:
            values = {
                name: value if name in executor.constexprs else convert(name, value)
                for name, value in given.items()
            }
            grid = executor.grid(values) if callable(executor.grid) else executor.grid
            grid = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            self._run(lambda: executor.fn(**values), grid, list(memories.values()))
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error
        finally:
            patched.restore()
            self.seconds += time.perf_counter() - began

    def _run(self, call: Any, grid: tuple[int, ...], memories: list[Memory]) -> None:
        programs = list(itertools.product(*map(range, grid)))
        mixed = random.Random(0).sample(programs, len(programs))
        orders = {"the given": programs, "the reversed": programs[::-1], "a random": mixed}
        large = any(memory.given.nbytes > LARGE for memory in memories)
        if large or len(programs) == 1:
            orders = {"the given": programs}
        self.number, self.lines = 0, [""]
        results: list[list[np.ndarray]] = []
        for name, order in orders.items():
            self.noting = not results
            for memory in memories:
                memory.bytes = memory.given if large else memory.given.copy()
            for self.program in order:
                interpreter.interpreter_builder.set_grid_idx(*self.program)
                self.since_begin = self.since_barrier = self.number + 1
                call()
            results.append([memory.bytes for memory in memories])
            for memory, first in zip(memories, results[0], strict=True):
                differ = np.nonzero(memory.bytes != first)[0]
                if len(differ):
                    where = self._named(memory, differ[0] // memory.itemsize)
                    self.faults.setdefault(
                        f"{self.kernel}: {name} order of programs changes bits", where
                    )
        for memory, first in zip(memories, results[0], strict=True):
            if not large and not np.array_equal(memory.given, first):
                memory.given[:] = first

    def barrier(self) -> None:
        self.since_barrier = self.number + 1

    def access(
        self, kind: str, pointers: Any, mask: Any, value: Any = None
    ) -> tuple[Any, np.ndarray]:
        """Note an access; returns pointers into the copies and the lanes that may be used."""
        places = pointers.data.astype(np.int64).reshape(-1)
        chosen = np.asarray(mask.data)
        function, line = _line()
        self.number += 1
        self.lines.append(line)
        if chosen.dtype != np.bool_:
            self._fault(line, f"has a mask of {chosen.dtype}", "")
        chosen = np.broadcast_to(chosen, pointers.data.shape).reshape(-1).astype(bool)
        inside, real = np.zeros_like(chosen), np.zeros_like(places)
        for space in np.unique(places[chosen] >> SPACE).tolist():
            lanes = np.nonzero(chosen & (places >> SPACE == space))[0]
            if not 0 <= space < len(self.arguments):
                self._fault(line, f"{kind} outside of every argument", "")
                continue
            argument = self.arguments[space]
            memory, itemsize = argument.memory, argument.memory.itemsize
            index = places[lanes] - ((2 * space + 1) << (SPACE - 1))
            within = (index >= 0) & (index < argument.n_places * itemsize)
            if not within.all():
                first = index[~within][0] // itemsize
                self._fault(line, f"{kind} outside of its argument", f"{argument.name}[{first}]")
                lanes, index = lanes[within], index[within]
            inside[lanes] = True
            index += argument.first * itemsize
            real[lanes] = index + memory.bytes.ctypes.data
            if self.noting:
                index //= itemsize
                where = (function, line)
                self._note(kind, where, memory, index, lanes, real[lanes], value)
        shape = pointers.data.shape
        pointers = interpreter.TensorHandle(real.reshape(shape).astype(np.uint64), pointers.dtype)
        return pointers, inside.reshape(shape)

    def _note(
        self,
        kind: str,
        where: tuple[str, str],
        memory: Memory,
        places: np.ndarray,
        lanes: np.ndarray,
        real: np.ndarray,
        value: Any,
    ) -> None:
        function, line = where
        changes = None
        if kind == "writes":
            wanted = np.broadcast_to(value.data, value.data.shape).reshape(-1)[lanes]
            changes = _bits(_read(real, wanted.dtype)) != _bits(wanted)
        for did in AGAINST[kind]:
            last = memory.last[did][places]
            number = np.abs(last)
            other = (last < 0) | ((number > 0) & (number < self.since_begin))
            own = number >= self.since_barrier
            if did == "wrote" and changes is not None:
                other, own = other & changes, own & changes
            if did == "read" and kind == "writes" and own.any() and function in self.exempt:
                marks = np.array(sorted(getattr(value, "marks", ())), dtype=number.dtype)
                same = own & (memory.lane[places] == lanes) & np.isin(number, marks)
                own &= ~same
                self.exempted |= {(self.lines[n], line) for n in np.unique(number[same])}
            for bad, how in ((other, "in another program"), (own, "without a barrier between")):
                if bad.any():
                    at = np.nonzero(bad)[0][0]
                    what = f"{kind} what {self.lines[number[at]]} {did} {how}"
                    self._fault(line, what, self._named(memory, places[at]))
        remembered = memory.last[REMEMBERED[kind]]
        last = remembered[places]
        several = (last < 0) | ((last > 0) & (last < self.since_begin))
        remembered[places] = np.where(several, -self.number, self.number)
        if kind == "reads":
            memory.lane[places] = lanes
            unclear = (memory.lane[places] != lanes) | (np.abs(last) >= self.since_barrier)
            memory.lane[places[unclear]] = -1
        if changes is not None:
            order = np.argsort(places, kind="stable")
            bits, sorted_places = _bits(wanted)[order], places[order]
            twice = (sorted_places[1:] == sorted_places[:-1]) & (bits[1:] != bits[:-1])
            if twice.any():
                at = sorted_places[1:][twice][0]
                self._fault(line, "writes two values to one place", self._named(memory, at))

    def _named(self, memory: Memory, place: int) -> str:
        for argument in self.arguments:
            at = int(place) - argument.first
            if argument.memory is memory and 0 <= at < argument.n_places:
                return f"{argument.name}[{at}]"
        return f"place {place} of {memory.itemsize} bytes"

    def _fault(self, line: str, what: str, place: str) -> None:
        where = f"{place} in program {self.program}".strip()
        self.faults.setdefault(f"{self.kernel}, {line} {what}", where)


def _line() -> tuple[str, str]:
    """Function and line of a kernel that runs."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(NOT_KERNELS):
        frame = frame.f_back
    return frame.f_code.co_name, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _read(real: np.ndarray, dtype: Any) -> np.ndarray:
    every = np.ones(real.shape, dtype=bool)
    return interpreter._interpreter.load(
        real.astype(np.uint64), every, np.zeros(real.shape, dtype=dtype), dtype
    )


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


@contextlib.contextmanager
def sanitized(exempt: frozenset[str] = EXEMPT) -> Iterator[Sanitizer]:
    """Launches of interpreted kernels run under the sanitizer that is given."""
    found = Sanitizer(exempt)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    update, swap = builder.create_atomic_rmw, builder.create_atomic_cas
    handle, bit = interpreter.TensorHandle, triton.language.int1

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        real, inside = found.access("reads", pointers, mask)
        result = load(self, real, handle(inside, bit), *rest)
        if inside.size >= found.threads:
            result.marks = frozenset({found.number})
        return result

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real, inside = found.access("writes", pointers, mask, value)
        return store(self, real, value, handle(inside, bit), *rest)

    def atomic_rmw(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real, inside = found.access("updates atomically", pointers, mask)
        return update(self, how, real, value, handle(inside, bit), *rest)

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        every = handle(np.ones(pointers.data.shape, dtype=bool), bit)
        real, inside = found.access("updates atomically", pointers, every)
        assert inside.all(), found.messages()
        return swap(self, real, *rest)

    def marking(operation: Any) -> Any:
        def run(self: Any, *operands: Any) -> Any:
            result = operation(self, *operands)
            marks = [
                operand.marks
                for operand in operands
                if hasattr(operand, "marks") and operand.data.shape == result.data.shape
            ]
            if marks:
                result.marks = frozenset().union(*marks)
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        patch.setattr(builder, "create_atomic_rmw", atomic_rmw)
        patch.setattr(builder, "create_atomic_cas", atomic_cas)
        patch.setattr(builder, "create_barrier", lambda self: found.barrier())
        for name in ELEMENTWISE:
            patch.setattr(builder, name, marking(getattr(builder, name)))

        def launch(executor: Any, *args: Any, **known: Any) -> None:
            found.launch(executor, *args, **known)

        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield found


class Plugin:
    """``--sanitize[=fraction]``: tests run under the sanitizer and fail with its messages.

    Of all tests the ones are taken whose name's hash lies in the fraction.
    """

    def __init__(self, fraction: float) -> None:
        self.below = fraction * 2**32
        self.found: Sanitizer | None = None
        self.total: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        # The sanitizer's own tests are under it already.
        own = "test_sanitizer.py" in item.nodeid
        if own or zlib.crc32(item.nodeid.encode()) >= self.below:
            return (yield)
        with sanitized() as self.found:
            result = yield
        self.total += self.found.launches
        self.total["tests"] += bool(self.found.launches)
        self.total["milliseconds"] += round(1000 * self.found.seconds)
        self.found = None
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[Any]:
        result = yield
        self._judge()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Iterator[Any]:
        result = yield
        self._judge()
        return result

    def _judge(self) -> None:
        if self.found is not None and self.found.faults:
            messages = self.found.messages()
            self.found.faults.clear()
            pytest.fail("\n".join(messages), pytrace=False)

    # With pytest-xdist: what a worker counted goes to the process that reports.
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["sanitized"] = dict(self.total)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.total.update(getattr(node, "workeroutput", {}).get("sanitized", {}))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        tests, milliseconds = self.total.pop("tests", 0), self.total.pop("milliseconds", 0)
        terminalreporter.write_line(
            f"sanitizer: {self.total.total()} launches of {len(self.total)} kernels in {tests} "
            f"tests, {milliseconds / 1000:.0f} s"
        )
