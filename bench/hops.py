"""Learnt tails beside padded hops, and demotion beside promotion.

    python bench/hops.py [--ids 500 65536] [--turns 40] [--dtype float32] [--out FILE.json]

Pairs of calls in one process, in turns of alternating order: medians, and the ratio of the two
times turn by turn with its quartiles. The paper's mix of sizes; rows, hops and gradients are
random. Both kinds of hops carry the same rows alike: padded ones are the whole of what tails stand for.

    forward              without gradient; hops unchanged
    step                 forward, backward with SGD fused into it, torch's fused SGD on the hops
    hops changed         forwards of 64 ids, each after a write to the hops, which counts
    compose, reverse     the operators alone: from hops to a map of every size, and their gradient
    demotion             10,240 rows one size down, Adam's moments with them, on a fresh copy every
                         time, over the promotion that had brought them up
    solve                the maps down from all sizes, over that demotion

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
    def of(cls, over: Row, under: Row, aim: float | None = None) -> Line:
        """Of two rows timed in the same turns."""
        ratios = [a / b for a, b in zip(over.samples_ms, under.samples_ms, strict=True)]
        q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        names = over.mode, over.ids, over.traffic, over.provider, under.provider, len(ratios)
        times = [1e3 * statistics.median(row.samples_ms) for row in (over, under)]
        error = max(row.gate_error or 0.0 for row in (over, under))
        return cls(*names, *times, ratio, q1, q3, aim, error)

    @property
    def status(self) -> str:
        """``met | missed``, or nothing where there is no aim."""
        return "" if self.aim is None else "met" if self.ratio <= self.aim else "missed"


class Tables:
    """Two tables that hold equal rows and equal hops, as ``tails`` and as ``padded``."""

    def __init__(self, spec: TableSpec, device: torch.device, dtype: torch.dtype, seed: int):
        self.spec, self.device, self.dtype, self.seed = spec, device, dtype, seed
        self.limit = TOLERANCE if dtype.itemsize > 2 else BF16_TOLERANCE
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

    def entry(
        self,
        what: str,
        kind: str,
        ids: int,
        region: Callable[[int, Any], Any],
        error: float,
        traffic: str = "",
        **more: Any,
    ) -> Entry:
        """What is timed, and the row for it."""
        rows = len(self.spec)
        row = Row(self.spec.name, rows, traffic, ids, ids, what, kind, 0, gate_error=error)
        return Entry(row, region, **more)


def measure_lookups(
    tables: Tables, ids: int, traffic: str, timer: Timer, turns: int
) -> Iterator[Line]:
    """Forwards and steps of so many ids, tails over padded."""
    generator = torch.Generator().manual_seed(tables.seed)
    number = _BATCHES if ids < _FEWER else None
    work = make_workload(tables.spec, traffic, ids, tables.device, generator, number)
    grad, errors = work.grad.to(tables.dtype), tables.check(work.batches[0])
    more: dict[str, Any] = {"traffic": traffic, "calls": max(1, _IDS_A_TURN // ids)}

    def forward(kind: str) -> Entry:
        ours = tables.of[kind]

        def region(call: int, _: Any) -> Tensor:
            return ours(work.batch(call))

        options = {"around": torch.no_grad, **more}
        return tables.entry("forward", kind, ids, region, errors[kind], **options)

    def step(kind: str) -> Entry:
        step = fused_step(copy.deepcopy(tables.of[kind]), "sgd")
        step.settle()

        def region(call: int, _: Any) -> Tensor:
            return step(work.batch(call), grad)

        return tables.entry("step", kind, ids, region, errors[kind], **more)

    for make in (forward, step):
        yield Line.of(*timer.measure([make(kind) for kind in KINDS], turns), AIM)


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

        more = {"traffic": "uniform", "calls": _IDS_A_TURN // FEW}
        return tables.entry("hops changed", kind, FEW, region, errors[kind], **more)

    def operator(kind: str) -> Entry:
        chain = tables.of[kind].module.chain.detach()

        def region(call: int, _: Any) -> Tensor:
            return compose(chain, SIZES, backend=backend)

        return tables.entry("compose", kind, 0, region, errors[kind], calls=_CALLS)

    def reverse(kind: str) -> Entry:
        chain = tables.of[kind].module.chain.detach()
        composed = compose(chain, SIZES, backend=backend)
        generator.manual_seed(tables.seed)
        gradient = torch.randn(composed.shape, generator=generator).to(composed)

        def region(call: int, _: Any) -> Tensor:
            return compose_bwd(gradient, chain, composed, SIZES, backend=backend)

        return tables.entry("reverse", kind, 0, region, errors[kind], calls=_CALLS)

    for make in (changed, operator, reverse):
        yield Line.of(*timer.measure([make(kind) for kind in KINDS], turns), AIM)


def measure_demotion(tables: Tables, kind: str, timer: Timer, turns: int) -> Iterator[Line]:
    """A demotion over the promotion before it, and the share of its solve.

    Raises:
        GateError: rows that went up and down have other outputs than before.
    """
    generator = torch.Generator().manual_seed(tables.seed)
    ids, *_ = draw_batches(tables.spec, tables.device, generator)
    below = tables.of[kind]
    above = Ready.copy_of(below, len(ids)).ours
    with torch.no_grad():
        wanted = below(ids).double()
        moved = above.module.promote(ids).all() and above.module.demote(ids).all()
        errors = {"rows that went up and down": relative_error(above(ids), wanted)}
        if not moved:
            raise GateError(f"{kind}: rows were left where they are")
    error = largest_error(kind, errors, tables.limit)
    above.module.promote(ids)
    chain = below.module.chain.detach()

    def fresh(of: Ours) -> Callable[[int], Ready]:
        return lambda turn: Ready.copy_of(of, len(ids))

    promotion = tables.entry(
        f"{kind} hops",
        "promotion",
        len(ids),
        lambda turn, ready: ready.ours.module.promote(ids),
        error,
        prepare=fresh(below),
    )
    demotion = tables.entry(
        f"{kind} hops",
        "demotion",
        len(ids),
        lambda turn, ready: ready.ours.module.demote(ids),
        error,
        prepare=fresh(above),
    )
    solve = tables.entry(
        f"{kind} hops", "solve", len(ids), lambda turn, _: down_hops(chain, SIZES), error
    )
    up, down, solved = timer.measure([promotion, demotion, solve], turns)
    yield Line.of(down, up)
    yield Line.of(solved, down)


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
        for kind in KINDS:
            yield from measure_demotion(tables, kind, timer, turns)


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
