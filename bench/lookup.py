"""Time the ragged lookup, its updates and its promotion against their alternatives.

    python bench/lookup.py                 # the GPU if there is one, else the CPU path
    python bench/lookup.py --quick --out lookup.json --plot lookup.png

Every provider runs in one process on the same ids, in alternating order, rotating among several
batches; times are medians with the 20th and 80th percentile. Before a mode is timed, what every
provider gives is compared with a float64 reference (``gate.py``), and if one is wrong nothing is
printed but that. On a GPU the region is bracketed by CUDA events and the L2 cache is overwritten
before each; on a CPU it is a wall clock (``timing.py``). What is compared: ``providers.py``
(lookups), ``updates.py`` (training steps), ``promotions.py``, ``graphs.py``; against which roof:
``model.py``; against which goals: ``goals.py``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from harness import goals
from harness.gate import TOLERANCE, GateError, check, check_forward, equal_runs, make_reference
from harness.graphs import GRAPH_IDS, measure_forward_graphs, measure_step_graph
from harness.promotions import measure_promotion
from harness.providers import (
    TRAFFIC,
    Case,
    Compiled,
    Deterministic,
    Eager,
    Fixed,
    Forward,
    Ours,
    Provider,
    make_case,
    make_forwards,
    make_table,
)
from harness.roof import DIM, PAPER_ROWS, dense_backward_bytes, forward_bytes
from harness.table import Row, conditions, relate, report
from harness.timing import CPU_REPEATS, Clock, Entry
from harness.updates import RULES, measure_cold_backward, measure_steps
from plot import plot
from torch import Tensor

from esapn_kernels import optim
from esapn_kernels.info import collect
from esapn_kernels.ops.backend import INTERPRETED

BATCHES = (500, 65_536, 1_048_576)
MODES = ("forward", "backward", "both")
EXACT_RUNS = 20
_LARGE = 1 << 20  # ids from which a cold table is left out on a CPU
_QUICK_REPEATS = 7
_GPU_REPEATS = 60


def measure(
    case: Case, providers: Sequence[Provider], clock: Clock, repeats: int | None
) -> list[Row]:
    """Check every provider on the case, then time forward, backward and both in turns.

    Raises:
        GateError: a provider is wrong; nothing has been timed.
    """
    ids = case.batches[0]
    reference = make_reference(next(p for p in providers if isinstance(p, Ours)), ids)
    rows, entries = [], []
    for provider in providers:
        wanted = make_reference(provider, ids) if isinstance(provider, Fixed) else reference
        note, error, memory = "", None, provider.table_bytes
        try:
            with provider.around():
                error = check(provider, ids, wanted)
                memory += _peak_bytes(provider, ids, case.grad, clock)
        except GateError:
            raise
        except Exception as failure:  # torch.compile fails in as many ways as it has parts
            if not isinstance(provider, Compiled):
                raise
            note = "not compiled: " + _first_line(failure)
        for entry in _entries(case, provider, memory):
            entry.row.note, entry.row.gate_error = note, error
            rows.append(entry.row)
            if not note:
                entries.append(entry)
    clock.measure(entries, repeats)
    rows.sort(key=lambda row: MODES.index(row.mode))
    return rows


def _entries(case: Case, provider: Provider, memory: int) -> list[Entry]:
    looked = case.looked(ragged=provider.ragged)
    dense = partial(dense_backward_bytes, grad_elements=provider.grad_elements)

    def row(mode: str, model: Any) -> Row:
        return case.row(mode, provider.name, looked, model, memory)

    def forward(turn: int, _: Any = None) -> Tensor:
        return provider(case.batch(turn))

    def backward(_: int, out: Tensor) -> Any:
        return provider.backward(out, case.grad)

    def both(turn: int, _: Any) -> Any:
        return backward(turn, forward(turn))

    found = [
        Entry(row("forward", forward_bytes), forward, around=provider.around),
        Entry(row("backward", dense), backward, forward, provider.around),
        Entry(
            row("both", lambda looked: forward_bytes(looked) + dense(looked)),
            both,
            around=provider.around,
        ),
    ]
    # The deterministic mode of torch concerns backward alone.
    return found[1:2] if isinstance(provider, Deterministic) else found


def measure_forwards(
    case: Case, ours: Ours, fixed: Fixed, clock: Clock, repeats: int | None
) -> list[Row]:
    """Check and time the forwards without gradient: of other dtypes, and into given memory."""
    entries = []
    for forward in make_forwards(case.table, ours, fixed):

        def region(turn: int, _: Any, forward: Forward = forward) -> Tensor:
            return forward.call(case.batch(turn))

        entries.append(
            Entry(
                case.row(
                    forward.mode,
                    forward.name,
                    case.looked(ragged=forward.source.ragged),
                    partial(
                        forward_bytes,
                        itemsize=forward.itemsize,
                        out_itemsize=forward.out_itemsize,
                    ),
                    forward.source.table_bytes,
                    gate_error=check_forward(forward, case.batches[0]),
                ),
                region,
                around=torch.no_grad,
            )
        )
    return clock.measure(entries, repeats)


def compare_runs(case: Case, ours: Ours, fixed: Fixed, runs: int = EXACT_RUNS) -> dict[str, Any]:
    """How many of ``runs`` equal runs give equal bits: ours in everything, torch's gradients."""
    ids = case.batches[0]

    def gradients(provider: Provider) -> list[Tensor]:
        with provider.around():
            out = provider(ids)
            return [out.detach(), *provider.backward(out, case.grad)]

    def step() -> list[Tensor]:
        module = copy.deepcopy(ours.module)
        optimizer = optim.Adam(module)
        module(ids).backward(case.grad)
        state = optimizer.state[module.arena.storage]
        assert module.chain.grad is not None
        kept = [state[name] for name in ("exp_avg", "exp_avg_sq", "last_step")]
        return [module.arena.storage.detach(), module.chain.grad, *kept]

    torch_modes = (fixed, Deterministic(fixed))
    return {
        "table": case.table.name,
        "traffic": case.traffic,
        "ids": case.count,
        "runs": runs,
        "ours": {
            "outputs and gradients": equal_runs(lambda: gradients(ours), runs),
            "rows, state and hop gradients of a fused Adam step": equal_runs(step, runs),
        },
        "torch": {p.name: equal_runs(partial(gradients, p), runs) for p in torch_modes},
    }


def _peak_bytes(provider: Provider, ids: Tensor, grad: Tensor, clock: Clock) -> int:
    """On a GPU what one forward and backward adds to the tables at its peak, else 0."""
    if not clock.cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.backward(provider(ids), grad)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{Path(sys.argv[0]).name}: error: {message}\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; a mistake ends the process with one line."""
    parser = _Parser(description="Time the ragged lookup against its alternatives.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="under a minute on two CPU cores")
    parser.add_argument(
        "--ids", type=int, nargs="+", metavar="N", help=f"batch sizes (default: {BATCHES})"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw shares of the roof")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"per row (default: {_GPU_REPEATS} on a GPU; 3 to {CPU_REPEATS}, as time allows, "
        f"on a CPU; {_QUICK_REPEATS} with --quick)",
    )
    args = parser.parse_args(argv)
    if args.ids is not None and min(args.ids) < 1:
        parser.error(f"argument --ids: must be at least 1, got {min(args.ids)}")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"argument --repeats: must be at least 1, got {args.repeats}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: must be in [0, 2**63), got {args.seed}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda asked for, but torch finds no CUDA device")
    if INTERPRETED and args.device != "cpu" and torch.cuda.is_available():
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not timed")
    if args.plot is not None and find_spec("matplotlib") is None:
        how = "pip install 'esapn-kernels[bench]'"
        parser.error(f"argument --plot: needs matplotlib; to install: {how}")
    for name in ("out", "plot"):
        path = getattr(args, name)
        try:
            if path is not None:
                _try_to_write(path)
        except OSError as error:
            parser.error(f"argument --{name}: cannot write {path}: {error.strerror}")
    return args


def _try_to_write(path: Path) -> None:
    existed = path.exists()
    with path.open("a"):
        pass
    if not existed:
        path.unlink()


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _step_rules(traffic: str, scale: int, count: int, quick: bool) -> Sequence[str]:
    """All on uniform ids; the two ends of the range on Zipf; few where time is short."""
    if scale > 1 or (quick and (traffic != "uniform" or count < GRAPH_IDS)):
        return ()
    return RULES if traffic == "uniform" and not quick else ("sgd", "adam")


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that the report prints, as values that JSON can hold."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    notes: list[str] = []
    if device.type == "cpu":
        notes.append(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs at the start")
        notes.append("CUDA graphs and the launches of a promotion: only on a GPU")
    scales = choose_scales(device, args.quick, notes)
    repeats = args.repeats
    if repeats is None and (args.quick or device.type == "cuda"):
        repeats = _QUICK_REPEATS if args.quick else _GPU_REPEATS
    clock = Clock(device)
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for scale in scales:
        name = "ml-20m" if scale == 1 else f"ml-20m x{scale}"
        table = make_table(name, {d: scale * n for d, n in PAPER_ROWS.items()}, generator)
        ours, fixed = Ours(table, device), Fixed(table, device)
        eager = Eager(ours)
        providers: list[Provider] = [ours, fixed, Deterministic(fixed), eager]
        if not args.quick:
            providers.append(Compiled(eager))
        counts = args.ids or (BATCHES[:2] if args.quick else BATCHES)
        for count in counts:
            if device.type == "cpu" and scale > 1 and count >= _LARGE:
                notes.append(f"{name}, {count:,} ids: left out on the CPU, it takes too long")
                continue
            for traffic in TRAFFIC:
                print(f"{name}, {traffic}, {count:,} ids ...", file=sys.stderr, flush=True)
                case = make_case(table, traffic, count, device, generator)
                found = measure(case, providers, clock, repeats)
                found += measure_forwards(case, ours, fixed, clock, repeats)
                if clock.cuda and count == GRAPH_IDS:
                    running = [p for p in providers if not isinstance(p, Deterministic)]
                    found += measure_forward_graphs(case, running, clock, repeats)
                    if scale == 1:
                        found += measure_step_graph(case, clock, repeats or _GPU_REPEATS)
                found += measure_steps(
                    case, _step_rules(traffic, scale, count, args.quick), clock, repeats
                )
                if scale > 1:
                    found += measure_cold_backward(case, clock, repeats)
                if scale == 1 and traffic == "zipf" and count == min(max(counts), GRAPH_IDS):
                    facts["exact"] = compare_runs(case, ours, fixed)
                relate(found)
                rows += found
        if scale == 1:
            print(f"{name}, promotion ...", file=sys.stderr, flush=True)
            found, facts["promotion"] = measure_promotion(table, ours, clock, repeats, generator)
            relate(found)
            rows += found
        del providers, ours, fixed, eager
    info = collect()
    return {
        "benchmark": "lookup",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "seed": args.seed,
        "gate": {"passed": True, "tolerance": TOLERANCE},
        "conditions": conditions(info, device, args.seed, clock.flush_bytes, TOLERANCE),
        "notes": notes,
        "provenance": info,
        "facts": facts,
        "goals": goals.judge(rows, facts, device.type),
        "rows": [asdict(row) for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    found = torch.cuda.is_available()
    device = torch.device(
        "cuda" if args.device == "cuda" or (args.device == "auto" and found) else "cpu"
    )
    if args.device == "auto" and not found:
        print("no GPU found: measuring the CPU path", flush=True)
    try:
        result = run(args, device)
    except GateError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    print(report([Row(**row) for row in result["rows"]]))
    print()
    print("\n".join(result["conditions"] + result["notes"]))
    print()
    print("\n".join(goals.lines(result["goals"])))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
