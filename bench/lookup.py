"""Time the ragged lookup, its updates and its promotion against their alternatives.

    python bench/lookup.py                 # the GPU if there is one, else the CPU path
    python bench/lookup.py --quick --out lookup.json --plot lookup.png

Every provider runs in one process on the same ids, in alternating order, rotating among several
batches; times are medians with the 20th and 80th percentile. Before a mode is timed, the results of
every provider are compared with a float64 reference; a wrong one ends the benchmark, and nothing
else is printed. ``--out`` is written anew after every workload; ``complete`` in it says whether
all of them are there. On a GPU the region is bracketed by CUDA events and the L2 cache is
overwritten before each; on a CPU it is a wall clock.

In harness/: providers.py and, by what is timed, lookups.py, updates.py (training steps),
promotions.py and graphs.py; gate.py, timing.py, roof.py (fewest bytes), goals.py, table.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from harness import goals, table
from harness.command import Parser, at_least, output, picture, record, seed, write_result
from harness.gate import TOLERANCE, GateError
from harness.graphs import GRAPH_IDS, measure_forward_graphs, measure_step_graph
from harness.lookups import compare_runs, measure_forwards, measure_lookups
from harness.promotions import measure_promotion
from harness.providers import (
    TRAFFIC,
    Compiled,
    Deterministic,
    Eager,
    Fixed,
    Ours,
    Provider,
    Workload,
    interpreted,
    make_table_spec,
    make_workload,
)
from harness.roof import DIM, PAPER_ROWS
from harness.table import Row
from harness.timing import CPU_REPEATS, Timer
from harness.updates import RULES, measure_cold_backward, measure_steps
from plot import plot

from esapn_kernels.info import collect

BATCHES = (500, 65_536, 1_048_576)
_LARGE = 1 << 20  # ids from which a cold table is left out on a CPU
_QUICK_REPEATS = 7
_GPU_REPEATS = 60


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; a mistake ends the process with one line."""
    parser = Parser("bench/lookup.py", __doc__)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
    add("--quick", action="store_true", help="under a minute on two CPU cores")
    sizes = " ".join(map(str, BATCHES))
    many = f"batch sizes (default: {sizes}; with --quick the first two)"
    add("--ids", type=at_least(1), nargs="+", metavar="N", help=many)
    often = (
        f"per row (default: {_GPU_REPEATS} on a GPU; 3 to {CPU_REPEATS}, as time allows, on a CPU; "
        f"{_QUICK_REPEATS} with --quick)"
    )
    add("--repeats", type=at_least(1), metavar="N", help=often)
    add("--seed", type=seed, default=0, metavar="S", help="of tables, rows and ids")
    add("--out", type=output, metavar="FILE.json", help="write the result as JSON")
    add("--plot", type=picture, metavar="FILE.png", help="draw the shares of the roof")
    args = parser.parse_args(argv)
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        parser.error("argument --device: torch finds no CUDA device")
    if args.device != "cpu" and found and interpreted(torch.device("cuda")):
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not timed")
    return args


def choose_scales(device: torch.device, quick: bool, notes: list[str]) -> list[int]:
    """1, and the largest of 100 and 10 times the rows for which there is memory."""
    if quick:
        notes.append("--quick: the paper's table only; torch.compile is left out")
        return [1]
    payload = sum(4 * size * rows for size, rows in PAPER_ROWS.items())
    fixed = 4 * DIM * sum(PAPER_ROWS.values())
    # Rows thrice (ours, eager's tables, ours with SGD), the fixed table, its gradient and that
    # being replaced; then rows and fixed table once more in 16 bits.
    need = 3.5 * payload + 3.5 * fixed
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    for scale in (100, 10):
        if scale * need < 0.9 * free:
            if scale != 100:
                notes.append(
                    f"cold table: x{scale} rows, x100 needs {100 * need / 2**30:.0f} GiB "
                    f"and {free / 2**30:.0f} GiB are free"
                )
            return [1, scale]
    notes.append(f"no cold table: x10 rows need {10 * need / 2**30:.0f} GiB")
    return [1]


def _free_memory() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass
class Benchmark:
    """What is timed and how often, and what was measured so far.

    Attributes:
        quick: few rules of steps, no ``torch.compile``.
        repeats: of every row; ``None``: as time allows.
        counts: ids of a batch, one workload each.
        generator: of tables, ids and gradients.
        facts: ``exact`` and ``promotion``, as the goals read them.
        save: called after every workload.
    """

    quick: bool
    repeats: int | None
    counts: Sequence[int]
    timer: Timer
    generator: torch.Generator
    notes: list[str]
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None

    def measure_table(self, scale: int) -> None:
        """All workloads on the paper's table, or on one of ``scale`` times its rows."""
        device = self.timer.device
        name = "ml-20m" if scale == 1 else f"ml-20m x{scale}"
        spec = make_table_spec(name, {d: scale * n for d, n in PAPER_ROWS.items()}, self.generator)
        ours, fixed = Ours(spec, device), Fixed(spec, device)
        eager = Eager(ours)
        providers: list[Provider] = [ours, fixed, Deterministic(fixed), eager]
        if not self.quick:
            providers.append(Compiled(eager))
        for count in self.counts:
            if device.type == "cpu" and scale > 1 and count >= _LARGE:
                self.notes.append(f"{name}, {count:,} ids: left out on the CPU, it takes too long")
                continue
            for traffic in TRAFFIC:
                _say(f"{name}, {traffic}, {count:,} ids ...")
                workload = make_workload(spec, traffic, count, device, self.generator)
                found = measure_lookups(workload, providers, self.timer, self.repeats)
                found += measure_forwards(workload, ours, fixed, self.timer, self.repeats)
                found += self._graphs(workload, providers, scale)
                found += self._steps(workload, scale)
                self._add(found)
                if scale == 1 and traffic == "zipf" and count == min(max(self.counts), GRAPH_IDS):
                    self.facts["exact"] = compare_runs(workload, ours, fixed)
        if scale == 1:
            _say(f"{name}, promotion ...")
            found, self.facts["promotion"] = measure_promotion(
                spec, ours, self.timer, self.repeats, self.generator
            )
            self._add(found)

    def _graphs(self, workload: Workload, providers: Sequence[Provider], scale: int) -> list[Row]:
        if not self.timer.cuda or workload.count != GRAPH_IDS:
            return []
        running = [p for p in providers if not isinstance(p, Deterministic)]
        rows = measure_forward_graphs(workload, running, self.timer, self.repeats)
        if scale == 1:
            rows += measure_step_graph(workload, self.timer, self.repeats or _GPU_REPEATS)
        return rows

    def _steps(self, workload: Workload, scale: int) -> list[Row]:
        """All rules on uniform ids, the two ends of the range on Zipf; few where time is short."""
        if scale > 1:
            return measure_cold_backward(workload, self.timer, self.repeats)
        uniform = workload.traffic == "uniform"
        if self.quick and not uniform:
            return []
        rules = RULES if uniform and not self.quick else ("sgd", "adam")
        return measure_steps(workload, rules, self.timer, self.repeats)

    def _add(self, rows: list[Row]) -> None:
        table.relate(rows)
        self.rows += rows
        self.save()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that is printed, as values that JSON can hold; ``args.out`` has it meanwhile.

    Raises:
        GateError: a provider is wrong; the file says so.
    """
    torch.manual_seed(args.seed)
    notes: list[str] = []
    if device.type == "cpu":
        notes.append(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs at the start")
        notes.append("CUDA graphs and the launches of a promotion: only on a GPU")
    scales = choose_scales(device, args.quick, notes)
    repeats = args.repeats
    if repeats is None and (args.quick or device.type == "cuda"):
        repeats = _QUICK_REPEATS if args.quick else _GPU_REPEATS
    counts = args.ids or (BATCHES[:2] if args.quick else BATCHES)
    generator = torch.Generator().manual_seed(args.seed)
    info = collect()
    done = Benchmark(args.quick, repeats, counts, Timer(device), generator, notes)

    def result(complete: bool, passed: bool = True) -> dict[str, Any]:
        made = record(
            "lookup",
            complete=complete,
            device=device.type,
            seed=args.seed,
            gate={"passed": passed, "tolerance": TOLERANCE},
            conditions=table.conditions(info, device, args.seed, done.timer.flush_bytes, TOLERANCE),
            notes=notes,
            provenance=info,
            facts=done.facts,
            goals=goals.judge(done.rows, done.facts, device.type),
            rows=[asdict(row) for row in done.rows],
        )
        if args.out is not None:
            write_result(args.out, made)
        return made

    def save() -> None:
        result(complete=False)

    done.save = save
    save()
    try:
        for scale in scales:
            done.measure_table(scale)
    except GateError as error:
        notes.append(f"ended before the next workload: {error}")
        result(complete=False, passed=False)
        raise
    return result(complete=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    found = torch.cuda.is_available()
    if args.device == "auto" and not found:
        print("no GPU found: measuring the CPU path", flush=True)
    try:
        result = run(args, torch.device("cuda" if found and args.device != "cpu" else "cpu"))
    except GateError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    print("\n".join(table.lines([Row(**row) for row in result["rows"]])))
    print()
    print("\n".join(result["conditions"] + result["notes"]))
    print()
    print("\n".join(goals.lines(result["goals"])))
    if args.plot is not None:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
