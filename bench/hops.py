"""Learnt tails beside padded hops, and demotion beside promotion.

    python bench/hops.py [--ids 500 65536] [--turns 40] [--dtype float32] [--out FILE.json]

Pairs of calls in one process, in turns of alternating order: medians, and the ratio of the two
times turn by turn with its quartiles. The paper's mix of sizes; rows, hops and gradients are
random. Both kinds of hops carry the same rows alike: padded ones are the whole of what tails are.

    forward         without gradient; hops unchanged
    step            forward, backward with SGD fused into it, torch's fused SGD on the hops
    hops changed    forwards of 64 ids, each after a write to the hops, which counts
    compose, compose_bwd    the operators alone: hops to a map of every size, and their gradient
    promotion       10,240 rows one size up, Adam's moments with them, on a fresh copy every time
    demotion        the same rows down again, the first demotion on these hops
    another         the same after a demotion of other rows: on a CPU their maps are known by then
    solve           for the maps from all sizes, which is a part of the first demotion

Before anything is timed, outputs and gradients are compared with float64, and outputs of rows that
went up and down with what they were. On a CPU one thread is timed by its CPU time, with glibc's
allocator told to keep freed memory, for which the command runs itself anew.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from harness import allocator
from harness.command import Parser, at_least, output, record, seed, write_result
from harness.cpu import running_on
from harness.gate import (
    BF16_TOLERANCE,
    TOLERANCE,
    GateError,
    largest_error,
    make_reference,
    relative_error,
)
from harness.promotions import Ready, draw_batches
from harness.providers import TRAFFIC, Ours, TableSpec, make_table_spec, make_workload
from harness.roof import PAPER_ROWS, SIZES
from harness.table import Row
from harness.timing import Entry, Timer
from harness.updates import fused_step
from torch import Tensor

from esapn_kernels import ResizableEmbedding
from esapn_kernels.info import collect
from esapn_kernels.ops.backend import resolve_backend
from esapn_kernels.ops.chain import expand_tails, tails_numel
from esapn_kernels.ops.compose import compose, compose_bwd
from esapn_kernels.ops.fit import down_hops

ROWS = PAPER_ROWS
KINDS = ("tails", "padded")
FEW = 64  # ids, where composing is a good part of a lookup
AIM = 1.05  # tails over padded, at most
_IDS_A_TURN, _CALLS = 20_000, 200  # calls of fewer ids are repeated up to so many; all others
_FEWER, _BATCHES = 4096, 64  # so many batches of fewer ids: their rows leave the caches
WARM_BYTES = 1 << 29
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass
class Line:
    """The time of one call over that of another, in turns.

    Attributes:
        over, under: the two calls; ``ratio`` is the time of the first over that of the second.
        over_us, under_us: medians of a call, microseconds.
        ratio, q1, q3: of the ratios turn by turn the median and the quartiles.
        aim: the largest ratio aimed at; ``None``: for information.
        gate_error: largest relative error that the gate saw.
    """

    what: str
    ids: int
    traffic: str
    over: str
    under: str
    turns: int
    over_us: float
    under_us: float
    ratio: float
    q1: float
    q3: float
    aim: float | None
    gate_error: float

    @classmethod
    def of(cls, what: str, over: Row, under: Row, aim: float | None = None) -> Line:
        """Of two rows timed in the same turns."""
        ratios = [a / b for a, b in zip(over.samples_ms, under.samples_ms, strict=True)]
        q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(
            what,
            over.ids,
            over.traffic,
            over.provider,
            under.provider,
            turns=len(ratios),
            over_us=1e3 * statistics.median(over.samples_ms),
            under_us=1e3 * statistics.median(under.samples_ms),
            ratio=ratio,
            q1=q1,
            q3=q3,
            aim=aim,
            gate_error=max(row.gate_error or 0.0 for row in (over, under)),
        )

    @property
    def status(self) -> str:
        """``met | missed``, or nothing where there is no aim."""
        return "" if self.aim is None else "met" if self.ratio <= self.aim else "missed"


class Tables:
    """Two tables that hold equal rows and equal hops, as ``tails`` and as ``padded``."""

    def __init__(self, spec: TableSpec, device: torch.device, dtype: torch.dtype, seed: int):
        self.spec, self.device, self.dtype, self.seed = spec, device, dtype, seed
        # Of 16 bits, what is summed has been rounded as well.
        self.limit = TOLERANCE if dtype.itemsize > 2 else 4 * BF16_TOLERANCE
        torch.manual_seed(seed)
        self.of = {
            kind: Ours(spec, device, dtype, make=partial(ResizableEmbedding, init=kind))
            for kind in KINDS
        }
        tails, padded = self.of.values()
        tails.module.chain.data.copy_(0.1 * torch.randn(tails_numel(SIZES)))
        padded.module.chain.data.copy_(expand_tails(tails.module.chain.detach(), SIZES))
        padded.storage.data.copy_(tails.storage)

    def check(self, ids: Tensor) -> dict[str, float]:
        """Outputs, and gradients of rows and of the tails' numbers, against float64.

        Returns:
            The largest relative error of every kind of hops.

        Raises:
            GateError: one is above the limit.
        """
        found = {}
        for kind, ours in self.of.items():
            reference = make_reference(ours, ids)
            out = ours(ids)
            grads = ours.backward(out, reference.grad_out.to(out.dtype))
            errors = {"outputs": relative_error(out.detach()[reference.positions], reference.out)}
            for k, mine, wanted in reference.rows:
                error = relative_error(ours.row_grads(grads, k, mine), wanted)
                errors[f"gradients of rows of size {SIZES[k]}"] = error
            hops = zip(SIZES, ours.hop_grads(grads), reference.hops, strict=False)
            for d, (weight, bias), (wanted, wanted_bias) in hops:
                errors[f"weights above size {d}"] = relative_error(weight[d:], wanted[d:])
                errors[f"biases above size {d}"] = relative_error(bias[d:], wanted_bias[d:])
            found[kind] = largest_error(kind, errors, self.limit)
        return found

    def row(self, name: str, ids: int, traffic: str, error: float) -> Row:
        """For the times of a call."""
        rows = len(self.spec)
        return Row(self.spec.name, rows, traffic, ids, ids, "", name, 0, gate_error=error)


def measure_lookups(
    tables: Tables, ids: int, traffic: str, timer: Timer, turns: int
) -> Iterator[Line]:
    """Forwards and steps of so many ids, tails over padded."""
    generator = torch.Generator().manual_seed(tables.seed)
    number = _BATCHES if ids < _FEWER else None
    work = make_workload(tables.spec, traffic, ids, tables.device, generator, number)
    grad, errors = work.grad.to(tables.dtype), tables.check(work.batches[0])
    calls = max(1, _IDS_A_TURN // ids)

    def forward(kind: str) -> Entry:
        ours = tables.of[kind]

        def region(call: int, _: Any) -> Tensor:
            return ours(work.batch(call))

        row = tables.row(kind, ids, traffic, errors[kind])
        return Entry(row, region, around=torch.no_grad, calls=calls)

    def step(kind: str) -> Entry:
        step = fused_step(copy.deepcopy(tables.of[kind]), "sgd")
        step.settle()

        def region(call: int, _: Any) -> Tensor:
            return step(work.batch(call), grad)

        return Entry(tables.row(kind, ids, traffic, errors[kind]), region, calls=calls)

    for what, make in (("forward", forward), ("step", step)):
        tails, padded = timer.measure([make(kind) for kind in KINDS], turns)
        yield Line.of(what, tails, padded, AIM)


def measure_composition(tables: Tables, timer: Timer, turns: int) -> Iterator[Line]:
    """Forwards of few ids on changed hops, and the operators alone; tails over padded."""
    generator = torch.Generator().manual_seed(tables.seed)
    work = make_workload(tables.spec, "uniform", FEW, tables.device, generator, _BATCHES)
    backend = resolve_backend("auto", tables.device)
    errors = tables.check(work.batches[0])

    def changed(kind: str) -> Entry:
        ours = copy.deepcopy(tables.of[kind])
        chain = ours.module.chain.data
        values = chain.clone(), chain * 1.5

        def region(call: int, _: Any) -> Tensor:
            chain.copy_(values[call % 2])
            return ours(work.batch(call))

        row = tables.row(kind, FEW, "uniform", errors[kind])
        return Entry(row, region, calls=_IDS_A_TURN // FEW)

    def forth(kind: str) -> Entry:
        chain = tables.of[kind].module.chain.detach()

        def region(call: int, _: Any) -> Tensor:
            return compose(chain, SIZES, backend=backend)

        return Entry(tables.row(kind, 0, "", errors[kind]), region, calls=_CALLS)

    def back(kind: str) -> Entry:
        chain = tables.of[kind].module.chain.detach()
        composed = compose(chain, SIZES, backend=backend)
        generator.manual_seed(tables.seed)
        grad = torch.randn(composed.shape, generator=generator).to(composed)

        def region(call: int, _: Any) -> Tensor:
            return compose_bwd(grad, chain, composed, SIZES, backend=backend)

        return Entry(tables.row(kind, 0, "", errors[kind]), region, calls=_CALLS)

    for what, make in (("hops changed", changed), ("compose", forth), ("compose_bwd", back)):
        tails, padded = timer.measure([make(kind) for kind in KINDS], turns)
        yield Line.of(what, tails, padded, AIM)


class Moves:
    """One kind of hops, with rows to promote and the same rows to demote.

    Raises:
        GateError: rows that went up and down have other outputs than before.
    """

    def __init__(self, tables: Tables, kind: str) -> None:
        generator = torch.Generator().manual_seed(tables.seed)
        self.ids, *_ = draw_batches(tables.spec, tables.device, generator)
        self.tables, self.kind, self.below = tables, kind, tables.of[kind]
        rest = torch.ones(len(tables.spec), dtype=torch.bool)
        rest[self.ids.cpu()] = False
        # One row of every size that has one to spare.
        sized = [(rest & (tables.spec.sizes == d)).nonzero()[:1, 0] for d in SIZES[1:]]
        self.others = torch.cat(sized).to(tables.device)
        self.above = Ready.copy_of(self.below, 2 * len(self.ids)).ours
        module = self.above.module
        with torch.no_grad():
            wanted = self.below(self.ids).double()
            if not bool(module.promote(self.ids).all() and module.demote(self.ids).all()):
                raise GateError(f"{kind}: rows were left where they are")
            found = self.above(self.ids)
        errors = {"outputs of rows that went up and down": relative_error(found, wanted)}
        self.error = largest_error(kind, errors, tables.limit)
        module.promote(self.ids)

    def entries(self) -> list[Entry]:
        """A promotion, a demotion, one after another on the same hops, and the solve alone."""
        chain = self.below.module.chain.detach()

        def up(turn: int, ready: Ready) -> Tensor:
            return ready.promote(self.ids)

        def down(turn: int, ready: Ready) -> Tensor:
            moved: Tensor = ready.ours.module.demote(self.ids)
            return moved

        def below(turn: int) -> Ready:
            return Ready.copy_of(self.below, len(self.ids))

        def above(turn: int) -> Ready:
            return Ready.copy_of(self.above, 2 * len(self.ids))

        def later(turn: int) -> Ready:
            ready = above(turn)
            ready.ours.module.demote(self.others)
            return ready

        def solve(turn: int, _: Any) -> Tensor:
            return down_hops(chain, SIZES)

        def row(name: str) -> Row:
            return self.tables.row(name, len(self.ids), "", self.error)

        return [
            Entry(row("promotion"), up, below),
            Entry(row("demotion"), down, above),
            Entry(row("another"), down, later),
            Entry(row("solve"), solve),
        ]


def measure_moves(tables: Tables, timer: Timer, turns: int) -> Iterator[Line]:
    """Promotions, tails over padded; demotions over promotions, and the share of the solve."""
    moves = [Moves(tables, kind) for kind in KINDS]
    rows = timer.measure([entry for each in moves for entry in each.entries()], turns)
    found = dict(zip(KINDS, (rows[: len(rows) // 2], rows[len(rows) // 2 :]), strict=True))
    tails, padded = (replace(rows[0], provider=kind) for kind, rows in found.items())
    yield Line.of("promotion", tails, padded, AIM)
    for kind, (up, down, another, solve) in found.items():
        yield Line.of(f"{kind} hops", down, up)
        yield Line.of(f"{kind} hops", another, up)
        yield Line.of(f"{kind} hops", solve, down)


def measure(tables: Tables, ids: Sequence[int], turns: int) -> Iterator[Line]:
    """All lines, as they are found.

    Raises:
        GateError: a result is wrong; it has not been timed.
    """
    timer = Timer(tables.device)
    alone: Any = contextlib.nullcontext()
    if not timer.cuda:
        timer.clock, alone = time.process_time, running_on(1)
    with alone:
        for number, traffic in itertools.product(ids, TRAFFIC):
            yield from measure_lookups(tables, number, traffic, timer, turns)
        yield from measure_composition(tables, timer, turns)
        yield from measure_moves(tables, timer, turns)


HEADING = (
    f"{'':<14}{'ids':>7} {'':<9}{'time of':<10}{'us':>10}  {'over':<10}{'us':>10}{'ratio':>7}"
    "  quartiles"
)


def text_of(line: Line) -> str:
    """A line of the table that is printed."""
    aim = "" if line.aim is None else f"at most {line.aim:g}: {line.status}"
    return (
        f"{line.what:<14}{line.ids or '':>7} {line.traffic:<9}{line.over:<10}{line.over_us:>10.1f}"
        f"  {line.under:<10}{line.under_us:>10.1f}{line.ratio:>7.2f}  "
        f"{f'{line.q1:.2f} - {line.q3:.2f}':<13}{aim}"
    ).rstrip()


def _device(text: str) -> torch.device:
    """The ``type`` of ``--device``."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device")
    return torch.device(text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/hops.py", __doc__)
    add = parser.add_argument
    add("--device", type=_device, default="cpu", metavar="NAME", help="cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="of rows and hops")
    add(
        "--ids",
        type=at_least(1),
        nargs="+",
        default=[500, 1 << 16],
        metavar="N",
        help="ids in a call",
    )
    add("--turns", type=at_least(2), default=40, metavar="N", help="turns of every pair")
    add("--seed", type=seed, default=0, metavar="S", help="of tables, ids and gradients")
    add("--out", type=output, metavar="FILE.json", help="write the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    if args.device.type == "cpu":
        torch.set_num_threads(1)
        allocator.touch(WARM_BYTES)
    spec = make_table_spec("ml-20m", ROWS, torch.Generator().manual_seed(args.seed))
    tables = Tables(spec, args.device, getattr(torch, args.dtype), args.seed)
    info = collect()
    lines: list[Line] = []
    print(f"{args.dtype}, {args.device}, {len(spec):,} rows of the ml-20m mix, {args.turns} turns")
    print(HEADING)
    try:
        for line in measure(tables, args.ids, args.turns):
            lines.append(line)
            print(text_of(line), flush=True)
    except GateError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    if args.out is not None:
        result = record(
            "hops",
            device=str(args.device),
            dtype=args.dtype,
            backend=resolve_backend("auto", args.device),
            ids=args.ids,
            turns=args.turns,
            seed=args.seed,
            table_rows=len(spec),
            provenance=info,
            rows=[{**asdict(line), "status": line.status} for line in lines],
        )
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    if parse().device.type == "cpu":
        allocator.enter("warm")
    sys.exit(main())
