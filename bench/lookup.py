"""Time the ragged lookup against a fixed table and against the loop over sizes.

    python bench/lookup.py                 # the GPU if there is one, else the CPU path
    python bench/lookup.py --quick --out lookup.json

Every provider runs in one process on the same ids, in alternating order, rotating among several
batches; times are medians with the 20th and 80th percentile. Before a case is timed, outputs and
gradients of every provider are compared with a float64 reference, and if one is wrong nothing is
printed but that. On a GPU the region is bracketed by CUDA events and the L2 cache is overwritten
before each; on a CPU it is a wall clock. ``bench/providers.py`` says what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from providers import (
    DIM,
    PAPER_ROWS,
    TOLERANCE,
    TRAFFIC,
    Compiled,
    Eager,
    Fixed,
    GateError,
    Ours,
    Provider,
    Table,
    backward_bytes,
    check,
    forward_bytes,
    make_ids,
    make_reference,
    make_table,
)
from report import Row, conditions, fill, relate, report
from torch import Tensor

from esapn_kernels.backend import INTERPRETED
from esapn_kernels.info import collect

BATCHES = (500, 65_536, 1_048_576)
MODES = ("forward", "backward", "both")
GRAPH_IDS = 65_536
_LARGE = 1 << 20  # ids from which a cold table is left out on a CPU
_CPU_SECONDS = 15.0  # of timing per case on a CPU, where the repeats are not given
_QUICK_REPEATS = 7
_GPU_REPEATS = 60
_CPU_REPEATS = 50


class Clock:
    """Times regions on one device, each from cold caches where the device allows it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.flush_bytes = 0
        numel = 1 << 28 if self.cuda else 1 << 26
        self._source = torch.arange(numel, dtype=torch.float32, device=device)
        self._target = self._source.clone()
        if self.cuda:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush_bytes = max(2 * l2, 1 << 28)
            self._flush = torch.empty(self.flush_bytes // 4, device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, region: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds that ``region`` takes, and its result."""
        if not self.cuda:
            begin = time.perf_counter()
            result = region()
            return 1e3 * (time.perf_counter() - begin), result
        self._flush.fill_(1.0)
        start, end = self._events
        start.record()
        result = region()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result

    def sample(self, provider: Provider, ids: Tensor, grad: Tensor) -> dict[str, float]:
        """Forward with a graph for backward, backward alone on that graph, and the two in one."""

        def backward(out: Tensor) -> Any:
            return torch.autograd.grad(out, provider.parameters, grad)

        times = {}
        times["forward"], out = self.time(lambda: provider(ids))
        times["backward"], _ = self.time(partial(backward, out))
        if self.cuda:
            del out
            times["both"], _ = self.time(lambda: backward(provider(ids)))
        else:
            # Nothing is flushed in between, so both is the two regions just timed.
            times["both"] = times["forward"] + times["backward"]
        return times

    def copy_rates(self) -> list[float]:
        """GB/s of some copies larger than the caches, bytes read plus bytes written."""
        times = [self.time(lambda: self._target.copy_(self._source))[0] for _ in range(8)]
        return [2 * self._source.nbytes / ms / 1e6 for ms in times]


@dataclass
class Case:
    """One table, traffic and batch size: several batches of ids, and what they hold."""

    table: Table
    traffic: str
    count: int
    batches: list[Tensor]
    grad: Tensor
    distinct: Tensor  # distinct ids of the first batch

    def new_row(self, mode: str, provider: Provider, **more: Any) -> Row:
        dims = self.table.sizes[self.distinct]
        if not provider.ragged:
            dims = torch.full_like(dims, DIM)
        forward = forward_bytes(self.count, dims, ragged=provider.ragged)
        backward = backward_bytes(self.count, dims, provider.grad_elements, ragged=provider.ragged)
        moved = {"forward": forward, "backward": backward, "both": forward + backward}
        return Row(
            self.table.name,
            len(self.table),
            self.traffic,
            self.count,
            len(self.distinct),
            mode,
            provider.name,
            provider.table_bytes,
            bytes=moved[mode.split()[0]],
            **more,
        )


def make_case(
    table: Table, traffic: str, count: int, device: torch.device, generator: torch.Generator
) -> Case:
    """Draws the batches of one case and a gradient to send back."""
    number = 4 if count >= _LARGE else 8
    batches = [make_ids(table, traffic, count, generator) for _ in range(number)]
    grad = torch.randn(count, DIM, generator=generator).to(device)
    distinct = batches[0].unique()
    return Case(table, traffic, count, [b.to(device) for b in batches], grad, distinct)


def measure(
    case: Case, providers: Sequence[Provider], clock: Clock, repeats: int | None
) -> list[Row]:
    """Check every provider on the case, then time them in turns.

    Raises:
        GateError: a provider is wrong; nothing has been timed.
    """
    notes, errors, memory = {}, {}, {}
    ids = case.batches[0]
    reference = make_reference(next(p for p in providers if isinstance(p, Ours)), ids)
    for provider in providers:
        if isinstance(provider, Fixed):
            wanted = make_reference(provider, ids)
            errors[provider.name] = check(provider, ids, wanted)
        elif isinstance(provider, Compiled):
            try:
                errors[provider.name] = check(provider, ids, reference)
            except GateError:
                raise
            except Exception as error:  # torch.compile fails in as many ways as it has parts
                notes[provider.name] = "not compiled: " + _first_line(error)
        else:
            errors[provider.name] = check(provider, ids, reference)
    del reference
    running = [p for p in providers if p.name not in notes]
    for provider in running:
        memory[provider.name] = _peak_bytes(provider, ids, case.grad, clock)
    begin = time.perf_counter()
    for provider in running:
        clock.sample(provider, case.batches[-1], case.grad)
    if repeats is None:
        fitting = int(_CPU_SECONDS / (time.perf_counter() - begin))
        repeats = min(max(fitting, 3), _CPU_REPEATS)
    copies = clock.copy_rates()
    samples: dict[str, dict[str, list[float]]] = {
        p.name: {mode: [] for mode in MODES} for p in running
    }
    for turn in range(repeats):
        ids = case.batches[turn % len(case.batches)]
        for provider in running if turn % 2 else reversed(running):
            for mode, ms in clock.sample(provider, ids, case.grad).items():
                samples[provider.name][mode].append(ms)
    copy = statistics.median(copies + clock.copy_rates())
    rows = []
    for mode in MODES:
        for provider in providers:
            row = case.new_row(mode, provider, note=notes.get(provider.name, ""))
            if provider in running:
                row.memory_bytes = memory[provider.name]
                row.gate_error = errors[provider.name]
                fill(row, samples[provider.name][mode], copy)
            rows.append(row)
    if clock.cuda and case.count == GRAPH_IDS:
        rows += measure_graphs(case, running, clock, repeats, copy)
    relate(rows)
    return rows


def measure_graphs(
    case: Case, providers: Sequence[Provider], clock: Clock, repeats: int, copy: float
) -> list[Row]:
    """Forward without gradient as the replay of a CUDA graph: no launch from the host."""
    rows, replays = [], []
    static_ids = case.batches[0].clone()
    for provider in providers:
        row = case.new_row("forward graph", provider)
        rows.append(row)
        if isinstance(provider, Eager):
            row.note = "not capturable: boolean masks synchronise with the host"
            continue
        try:
            replays.append((row, *_capture(provider, static_ids)))
        except RuntimeError as error:
            row.note = "not captured: " + _first_line(error)
            continue
        static_ids.copy_(case.batches[1])
        replays[-1][1].replay()
        with torch.no_grad():
            if not torch.equal(replays[-1][2], provider(static_ids)):
                raise GateError(f"{provider.name}: the replayed graph gives other outputs")
    samples: dict[str, list[float]] = {row.provider: [] for row, _, _ in replays}
    for turn in range(repeats):
        static_ids.copy_(case.batches[turn % len(case.batches)])
        for row, graph, _ in replays if turn % 2 else reversed(replays):
            samples[row.provider].append(clock.time(graph.replay)[0])
    for row, _, _ in replays:
        fill(row, samples[row.provider], copy)
    return rows


@torch.no_grad()
def _capture(provider: Provider, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            provider(ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = provider(ids)
    return graph, out


def _peak_bytes(provider: Provider, ids: Tensor, grad: Tensor, clock: Clock) -> int:
    """The provider's tables, on a GPU with what one forward and backward adds at its peak."""
    if not clock.cuda:
        return provider.table_bytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(provider(ids), provider.parameters, grad)
    torch.cuda.synchronize()
    return provider.table_bytes + torch.cuda.max_memory_allocated() - before


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"per row (default: {_GPU_REPEATS} on a GPU; 3 to {_CPU_REPEATS}, as time allows, "
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
    if args.out is not None:
        existed = args.out.exists()
        try:
            with args.out.open("a"):
                pass
            if not existed:
                args.out.unlink()
        except OSError as error:
            parser.error(f"argument --out: cannot write {args.out}: {error.strerror}")
    return args


def choose_scales(device: torch.device, quick: bool, notes: list[str]) -> list[int]:
    """1, and the largest of 100 and 10 times the rows for which there is memory."""
    if quick:
        notes.append("--quick: the paper's table only; torch.compile is left out")
        return [1]
    payload = sum(4 * size * rows for size, rows in PAPER_ROWS.items())
    fixed = 4 * DIM * sum(PAPER_ROWS.values())
    # Rows twice (ours, eager's tables), the fixed table, its gradient and that being replaced.
    need = 2 * payload + 3 * fixed
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


def run(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that the report prints, as values that JSON can hold."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    notes: list[str] = []
    if device.type == "cpu":
        notes.append(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs at the start")
    scales = choose_scales(device, args.quick, notes)
    repeats = args.repeats
    if repeats is None and (args.quick or device.type == "cuda"):
        repeats = _QUICK_REPEATS if args.quick else _GPU_REPEATS
    clock = Clock(device)
    rows: list[Row] = []
    for scale in scales:
        name = "ml-20m" if scale == 1 else f"ml-20m x{scale}"
        table = make_table(name, {d: scale * n for d, n in PAPER_ROWS.items()}, generator)
        ours = Ours(table, device)
        eager = Eager(ours)
        providers: list[Provider] = [ours, Fixed(table, device), eager]
        if not args.quick:
            providers.append(Compiled(eager))
        for count in args.ids or (BATCHES[:2] if args.quick else BATCHES):
            if device.type == "cpu" and scale > 1 and count >= _LARGE:
                notes.append(f"{name}, {count:,} ids: left out on the CPU, it takes too long")
                continue
            for traffic in TRAFFIC:
                print(f"{name}, {traffic}, {count:,} ids ...", file=sys.stderr, flush=True)
                case = make_case(table, traffic, count, device, generator)
                rows += measure(case, providers, clock, repeats)
        del providers, ours, eager
    info = collect()
    return {
        "benchmark": "lookup",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "seed": args.seed,
        "gate": {"passed": True, "tolerance": TOLERANCE},
        "conditions": conditions(info, device, args.seed, clock.flush_bytes),
        "notes": notes,
        "provenance": info,
        "rows": [asdict(row) for row in rows],
        "report": report(rows),
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
    print(result.pop("report"))
    print()
    print("\n".join(result["conditions"] + result["notes"]))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
