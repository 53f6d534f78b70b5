"""What the compiler's output says of a kernel's speed; nothing here is timed.

Resources. A block of ``w`` warps with ``r`` registers a thread and ``s`` bytes of shared memory:

    warps by registers   4 floor(16,384 / up(32 r, 256))       a quarter of the warps each
    blocks               min(floor(that / w), floor(64 / w), floor(S / up(s + 1,024, 128)), 32)

with ``up(x, n)`` the multiple of n above x and S the shared memory of a multiprocessor.

A pass. The SASS of one iteration of a loop, or of a kernel whose programs do one tile each, is
walked in order. A load (LDG, or LDGSTS, the copy to shared memory) takes one latency, everything
else takes no time. An instruction waits where the compiler put a wait: for the scoreboards in its
control bits until all their loads are there, at ``DEPBAR.LE SB0, N`` until N groups of copies
(closed by LDGDEPBAR) are left. What the iterations take once they repeat are the *round trips* of a
pass, below 1 where copies of several iterations overlap; the *loads in flight* are the most that a
thread has on the way at once. A loop inside the pass is walked once, a branch as if it were taken.

Little's law. With b blocks a multiprocessor, or fewer where the grid is smaller:

    bytes in flight   b x threads x bytes of a pass / round trips
    bytes needed      bandwidth x latency / multiprocessors
    share             bytes in flight / bytes needed, at most 1

Bytes of a pass are those of its loads and stores of 128 bits and of its copies; of all where it has
none of these. Narrower ones are locations and numbers that many threads read alike: they take time
and carry little. Hops and small tables count no bytes: all tiles read the same, from the L2 cache.
Two loads of which a mask leaves one count as two. Which is which is told by the line of the source
that the compiler names; loads without a name count, and are counted in the record.

The share is a PREDICTION, given for two latencies: of an idle device, and of a busy one, whose
memory needs more requests than the idle latency says. It knows neither caches (a wait for the L1
is a full round trip here) nor the time of products.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TOOLS = ("ptxas", "cuobjdump", "nvdisasm")

# The kernels' pointers to hops, what they are composed to and the gradients of both, and to tables
# of a few numbers.
SMALL = {"a", "below", "bias", "chain", "composed", "grad", "hop", "map"}
SMALL |= {"clock", "counts", "free_base", "free_count", "level_begin", "numbers", "plan"}


def label(kernel: str, part: str, n_ids: int) -> str:
    """The name of a kernel's line: with the rule of a step, with the batch of a small one.

    >>> label("_rows_kernel", "adam", 500), label("_lookup_fwd_kernel", "to", 500)
    ('rows, adam', 'lookup_fwd, 500 ids')
    """
    name = kernel.strip("_").removesuffix("_kernel")
    if name in ("sums", "rows"):
        return f"{name}, {part}"
    small = name in ("lookup_fwd", "few_runs") or (name == "chain" and n_ids == 500)
    return f"{name}, {n_ids:,} ids" if small else name


@dataclass(frozen=True)
class Target:
    """An architecture, and the device that its predictions are for.

    Attributes:
        device: the device.
        multiprocessors: of the device.
        bandwidth: of its memory in GB/s, from the data sheet.
        latency_cycles: of a load from memory on an idle device,
            github.com/markdewing/AI_kernels, latency/README.md (A100, H100, B200 SXM).
        clock: GHz, the boost clock of the data sheet; that of the measurement was not fixed.
        busy_bytes: bytes in flight a multiprocessor with which NVIDIA's own ``transform`` runs at
            the memory's speed: ``arch_to_min_bytes_in_flight`` in github.com/NVIDIA/cccl,
            cub/cub/device/dispatch/tuning/tuning_transform.cuh.
        shared: shared memory of a multiprocessor in bytes.

    The limits of a multiprocessor are those of the CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability"; units of allocation those of NVIDIA's occupancy
    calculator.
    """

    device: str
    multiprocessors: int
    bandwidth: int
    latency_cycles: int
    clock: float
    busy_bytes: int
    shared: int

    @property
    def idle_bytes(self) -> float:
        """Bytes needed in flight a multiprocessor at the latency of an idle device."""
        return self.bandwidth * self.latency_cycles / self.clock / self.multiprocessors


TARGETS = {
    80: Target("A100 SXM 80GB", 108, 2039, 550, 1.41, 16 << 10, 164 << 10),
    90: Target("H100 SXM", 132, 3350, 700, 1.98, 32 << 10, 228 << 10),
    100: Target("B200", 148, 8000, 860, 1.965, 64 << 10, 228 << 10),
}

# The same for all of them.
WARPS, BLOCKS, REGISTERS = 64, 32, 65_536
REGISTER_UNIT, SHARED_UNIT, SHARED_OF_SYSTEM, QUARTERS = 256, 128, 1024, 4


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def blocks_per_multiprocessor(target: Target, registers: int, shared: int, threads: int) -> int:
    """Blocks that fit on a multiprocessor at once; see the file's docstring."""
    warps = -(-threads // 32)
    by_registers = QUARTERS * (REGISTERS // QUARTERS // _up(32 * registers, REGISTER_UNIT))
    by_shared = target.shared // _up(shared + SHARED_OF_SYSTEM, SHARED_UNIT)
    return min(by_registers // warps, WARPS // warps, by_shared, BLOCKS)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS.

    Attributes:
        name: with its modifiers, ``LDG.E.128``.
        predicated: whether it runs, or branches, under a condition.
        operands: as printed.
        control: stall, scoreboards and waits: bits 105 to 125 of the encoding (Jia et al.,
            arXiv:1804.06826, section 2.1).
        target: of a branch, the index of the instruction that it goes to.
        pointer: of a load or store, the pointer in its line of the source, without ``_ptr``; of
            others, that of what they work on or none.
    """

    name: str
    predicated: bool = False
    operands: str = ""
    control: int = 0
    target: int | None = None
    pointer: str = ""

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def ends(self) -> bool:
        """Whether what stands behind it does not follow."""
        return self.kind in ("BRA", "EXIT", "RET", "BRX", "JMP") and not self.predicated

    @property
    def bits(self) -> int:
        """Width of a load or store for one thread."""
        found = re.search(r"\.[US]?(8|16|64|128|256)\b", self.name)
        return int(found[1]) if found else 32

    @property
    def sets(self) -> int | None:
        """The scoreboard that says that its result is there."""
        board = self.control >> 5 & 7
        return board if board < 6 else None

    @property
    def waits(self) -> list[int]:
        """The scoreboards that it waits for."""
        return [board for board in range(6) if self.control >> 11 >> board & 1]


LOADS = ("LDG", "LD", "ATOMG", "ATOM")
COPY = "LDGSTS"
STORES = ("STG", "ST", "REDG", "RED")

_LINE = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
)
_SECOND = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"(\.L_\w+):")
_SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')


def parse_sass(text: str, sources: Path) -> list[Instruction]:
    """The instructions that ``nvdisasm -c -g -hex`` prints.

    The kernels' sources are looked for by name in the folder ``sources``: what Triton has compiled
    before may name another copy of them.
    """
    rows: list[tuple[str, bool, str, str]] = []
    controls: list[int] = []
    labels: dict[str, int] = {}
    source = (".", 0)
    for line in text.splitlines():
        if found := _SOURCE.match(line):
            source = (Path(found[1]).name, int(found[2]))
        elif found := _LABEL.match(line):
            labels[found[1]] = len(rows)
        elif found := _LINE.match(line):
            stores = found[2].partition(".")[0] in STORES
            pointer = _pointers(sources / source[0]).get((source[1], stores), "")
            # A branch may have its condition among the operands: BRA.U !UP0, `(.L_x_1).
            bare = found[3].startswith("`") or not found[2].startswith("BRA")
            predicated = found[1] is not None or not bare
            rows.append((found[2], predicated, found[3], pointer))
        elif (found := _SECOND.match(line)) and len(controls) < len(rows):
            controls.append(int(found[1], 16) >> 41 & 0x1FFFFF)
    made = []
    for (name, predicated, operands, pointer), control in zip(rows, controls, strict=True):
        label = re.search(r"`\((\.L_\w+)\)", operands)
        target = labels.get(label[1]) if label and name.startswith("BRA") else None
        made.append(Instruction(name, predicated, operands, control, target, pointer))
    return made


@lru_cache
def _pointers(path: Path) -> dict[tuple[int, bool], str]:
    """For every line of a ``tl.load`` (False) or ``tl.store`` (True), the first pointer in it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    found: dict[tuple[int, bool], str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args or node.end_lineno is None:
            continue
        called = ast.unparse(node.func)
        if called in ("tl.load", "tl.store") or called.startswith("tl.atomic_"):
            names = [n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)]
            names = [name.removesuffix("_ptr") for name in names if name.endswith("_ptr")]
            for line in range(node.lineno, node.end_lineno + 1) if names else ():
                found[line, called == "tl.store"] = names[0]
    return found


def disassemble(cubin: bytes, nvdisasm: Path) -> str:
    """SASS with encodings and lines of the source."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "-c", "-g", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def widths(instructions: Sequence[Instruction], kinds: Sequence[str]) -> dict[int, int]:
    """How many of ``kinds`` there are of every width in bits, the widest first."""
    found = Counter(each.bits for each in instructions if each.kind in kinds)
    return dict(sorted(found.items(), reverse=True))


@dataclass(frozen=True)
class Pass:
    """One pass through a loop or a program; counts and bytes of one thread.

    Attributes:
        instructions: their number.
        round_trips: latencies that follow one another.
        in_flight: the most loads on the way at once.
        groups_left: the most groups of copies that a wait leaves on their way; None without copies.
        loaded, stored: bytes.
        waits: what arrives during every wait of the last pass, by the pointers of the loads.
    """

    instructions: int
    round_trips: float
    in_flight: int
    groups_left: int | None
    loaded: int
    stored: int
    waits: list[str]


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, ...]]:
    """The instructions of every natural loop, in the order of addresses.

    A branch back closes a loop where it cannot be reached but through its target; others return
    from blocks that the compiler moved behind the code.
    """
    branches = {i: each.target for i, each in enumerate(instructions) if each.target is not None}
    starts = {0, *branches.values()}
    starts |= {i + 1 for i, each in enumerate(instructions) if i in branches or each.ends}
    ordered = sorted(start for start in starts if start < len(instructions))
    block = {start: n for n, start in enumerate(ordered)}
    stops = [*ordered[1:], len(instructions)]
    after: list[list[int]] = []
    before: list[set[int]] = [set() for _ in ordered]
    for n, stop in enumerate(stops):
        last = instructions[stop - 1]
        following = [] if last.ends or n + 1 == len(stops) else [n + 1]
        if stop - 1 in branches:
            following.append(block[branches[stop - 1]])
        after.append(following)
    reached, todo = {0}, [0]
    while todo:
        n = todo.pop()
        for to in after[n]:
            before[to].add(n)
            if to not in reached:
                reached.add(to)
                todo.append(to)
    # Which blocks every way from the beginning passes, until nothing changes.
    passed = {n: {0} if n == 0 else set(reached) for n in sorted(reached)}
    changed = True
    while changed:
        changed = False
        for n in passed:
            ways = [passed[b] for b in before[n]]
            new = {n} | (set.intersection(*ways) if ways and n else set())
            changed |= new != passed[n]
            passed[n] = new
    bodies: dict[int, set[int]] = {}
    for n in reached:
        for head in set(after[n]) & passed[n]:
            body = bodies.setdefault(head, {head})
            todo = [n]
            while todo:
                of = todo.pop()
                if of not in body:
                    body.add(of)
                    todo += before[of]
    return sorted(
        tuple(i for n in sorted(body) for i in range(ordered[n], stops[n]))
        for body in bodies.values()
    )


def _carried(body: Sequence[Instruction]) -> tuple[int, int]:
    """Bytes of a pass that count, loaded and stored; see the file's docstring."""
    kinds = (*LOADS, COPY, *STORES)
    known = [each for each in body if each.kind in kinds and each.pointer not in SMALL]
    wide = [each for each in known if each.bits >= 128 or each.kind == COPY]
    stored = sum(each.bits for each in wide or known if each.kind in STORES) // 8
    return sum(each.bits for each in wide or known) // 8 - stored, stored


def walk(body: Sequence[Instruction], *, repeats: bool) -> Pass:
    """A pass through ``body``, one of many where it ``repeats``."""
    warm, counted = (8, 8) if repeats else (0, 1)
    now = 0
    boards = [0] * 6
    groups: list[int] = []
    open_group = 0
    flying: list[tuple[int, str]] = []
    most = 0
    left: int | None = None
    times: list[int] = []
    waits: list[str] = []
    for _ in range(warm + counted):
        times.append(now)
        waits = []
        for each in body:
            until = max([now, *(boards[board] for board in each.waits)])
            found = re.match(r"SB0, 0x([0-9a-f]+)", each.operands)
            if found and each.kind == "DEPBAR" and groups:
                keep = int(found[1], 16)
                left = max(left or 0, keep)
                until = max([until, *groups[: max(len(groups) - keep, 0)]])
            if until > now:
                there = {pointer for done, pointer in flying if now < done <= until}
                waits.append("+".join(sorted(there)))
                now = until
                flying = [(done, pointer) for done, pointer in flying if done > now]
            if each.kind == "LDGDEPBAR":
                groups.append(open_group)
                open_group = 0
            elif each.kind in (*LOADS, COPY):
                flying.append((now + 1, each.pointer))
                most = max(most, len(flying))
                if each.kind == COPY:
                    open_group = now + 1
                elif each.sets is not None:
                    boards[each.sets] = max(boards[each.sets], now + 1)
    trips = (now - times[warm]) / counted
    return Pass(len(body), trips, most, left, *_carried(body), waits)


def passes(instructions: Sequence[Instruction]) -> list[Pass]:
    """The kernel's passes, the one that moves most bytes first.

    These are the outermost loops with at most one loop inside, or the kernel itself if it has no
    more than that: what is outside them runs once, or where a run of equal rows is long. Loops
    without loads and stores are none: a failed assertion ends in one.
    """
    kinds = {*LOADS, COPY, *STORES}
    found = [s for s in loops(instructions) if any(instructions[i].kind in kinds for i in s)]
    whole = tuple(range(len(instructions)))
    sets = {span: set(span) for span in [whole, *found]}
    small = [span for span in sets if sum(sets[other] < sets[span] for other in found) <= 1]
    outer = [span for span in small if not any(sets[span] < sets[other] for other in small)]
    walked = [walk([instructions[i] for i in s], repeats=s != whole) for s in outer]
    return sorted(walked, key=lambda each: each.loaded + each.stored, reverse=True)


def in_flight_bytes(each: Pass, threads: int, blocks: float) -> float | None:
    """Bytes in flight a multiprocessor; None where a pass waits for nothing or moves nothing."""
    moved = each.loaded + each.stored
    if not each.round_trips or not moved:
        return None
    return blocks * threads * moved / each.round_trips
