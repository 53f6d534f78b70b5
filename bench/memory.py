"""Peak memory of a large table beside what it holds: construction, loading, growth, compaction.

    python bench/memory.py [--rows 50000000] [--case NAME ...] [--out FILE]

Every case runs in a process of its own, on a CPU. Linux says how much of a process was resident at
most (``VmHWM`` in ``/proc/self/status``); writing 5 to ``/proc/self/clear_refs`` sets that to what
is resident now, so that the peak is of the measured calls alone. From it goes what was resident
before the table was made, with torch imported and the calls made once on a small table. What a
case is given (a state dict, a tensor of sizes) is made, and read once, before.

*held* is what the table takes after the calls: ``memory_report()``, serving and optimizer state.
The free lists, which rows that move need, are in the peak alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness.command import Parser, at_least, output, record, write_result
from torch import Tensor

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.info import collect
from esapn_kernels.storage.arena import Arena

SIZES = (2, 4, 8, 16, 64, 128)
SHARES = (90.0, 5.0, 2.5, 1.5, 0.7, 0.3)  # of mixed sizes, in percent
CALL = 10_000  # ids of a promotion
FOLLOWING = 50
GOAL = 1.5
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process that are resident, or were at most: ``VmHWM``."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) << 10


class Meter:
    """The peak of what follows, beyond what was resident at the start."""

    def __init__(self) -> None:
        gc.collect()
        # What the allocator keeps of freed memory would hide as much of the peak.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self.before = resident()
        self.restart()

    def restart(self) -> None:
        """Forget the peak of the past."""
        CLEAR.write_text("5")

    def peak(self) -> int:
        return resident("VmHWM") - self.before


Case = Callable[[int], dict[str, Any]]


def small(**options: Any) -> ResizableEmbedding:
    """A table whose rows are all of the smallest size."""
    return ResizableEmbedding(options.pop("rows"), sizes=SIZES, **options)


def ended(meter: Meter, module: ResizableEmbedding, **more: Any) -> dict[str, Any]:
    """The numbers of a case whose calls have been made."""
    peak, report = meter.peak(), module.memory_report()
    held = report.serving + report.optimizer
    return {"held": held, "peak": peak, "ratio": peak / held, **more}


def construct(rows: int) -> dict[str, Any]:
    meter = Meter()
    return ended(meter, small(rows=rows))


def construct_mixed(rows: int) -> dict[str, Any]:
    sizes = mixed_sizes(rows)
    meter = Meter()
    return ended(meter, small(rows=rows, initial_size=sizes))


def mixed_sizes(rows: int) -> Tensor:
    """Sizes of all rows, in ``SHARES``, in random order."""
    bounds = torch.tensor(SHARES).cumsum(0)[:-1]
    return torch.tensor(SIZES)[torch.bucketize(torch.rand(rows) * 100, bounds)]


def load(rows: int, mmap: bool) -> dict[str, Any]:
    """A tenth of the saved rows have grown, so that everything is of another shape."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.pt"
        source = small(rows=rows)
        source.promote(torch.arange(0, rows, 10))
        torch.save(source.state_dict(), path)
        del source
        state = torch.load(path, mmap=mmap, weights_only=True)
        for tensor in state.values():
            tensor.max()  # what is mapped becomes resident
        meter = Meter()
        module = small(rows=rows)
        meter.restart()
        module.load_state_dict(state)
        return ended(meter, module)


def load_mapped(rows: int) -> dict[str, Any]:
    return load(rows, mmap=True)


def load_held(rows: int) -> dict[str, Any]:
    return load(rows, mmap=False)


def promote_first(rows: int) -> dict[str, Any]:
    meter = Meter()
    module = small(rows=rows)
    ids = torch.randperm(rows, dtype=torch.int32)[: (FOLLOWING + 1) * CALL]
    calls = ids.long().tensor_split(FOLLOWING + 1)
    del ids
    meter.restart()
    times = []
    for call in calls:
        begin = time.perf_counter()
        module.promote(call)
        times.append(1e3 * (time.perf_counter() - begin))
    first, median = times[0], statistics.median(times[1:])
    return ended(meter, module, first_ms=first, median_ms=median)


def grow(rows: int) -> dict[str, Any]:
    """Two growths: the first promotion makes one, and the free lists."""
    meter = Meter()
    module = small(rows=rows)
    optimizer = optim.Adagrad(module)
    meter.restart()
    found, call = {module.arena.storage.numel()}, max(rows // 500, 1)
    for begin in range(0, rows, call):
        module.promote(torch.arange(begin, min(begin + call, rows)))
        found.add(module.arena.storage.numel())
        if len(found) == 3:
            break
    result = ended(meter, module, grown=len(found) - 1)
    optimizer.detach()
    return result


def compact(rows: int) -> dict[str, Any]:
    """A tenth of the rows have gone up, half of these are gone."""
    meter = Meter()
    module = small(rows=rows)
    grown = torch.arange(0, rows, 10)
    module.promote(grown)
    assert isinstance(module.arena, Arena)
    module.arena.free(grown[::2])
    del grown
    meter.restart()
    module.compact()
    return ended(meter, module)


CASES: dict[str, Case] = {
    "construct": construct,
    "construct-mixed": construct_mixed,
    "load-mapped": load_mapped,
    "load-held": load_held,
    "promote": promote_first,
    "grow": grow,
    "compact": compact,
}


def run_alone(name: str, rows: int) -> dict[str, Any]:
    """A case in this process, which has run on a small table before."""
    CASES[name](2000)
    torch.manual_seed(0)
    return CASES[name](rows)


def run(name: str, rows: int) -> dict[str, Any]:
    """A case in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--rows", str(rows), "--case", name, "--alone"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return {"case": name, **row}


def header() -> str:
    return f"{'':<18}{'held, MB':>12}{'peak, MB':>12}{'peak / held':>14}"


def line(row: dict[str, Any]) -> str:
    """One case; the goal beside it, and the times of promotions."""
    text = f"{row['case']:<18}{row['held'] / 1e6:>12,.1f}{row['peak'] / 1e6:>12,.1f}"
    text += f"{row['ratio']:>14.2f}   at most {GOAL:g}: "
    text += "met" if row["ratio"] <= GOAL else "missed"
    if "first_ms" in row:
        text += f"; the first {row['first_ms']:.1f} ms, the median {row['median_ms']:.1f} ms"
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a mistake ends the process with one line."""
    parser = Parser("bench/memory.py", __doc__)
    add = parser.add_argument
    add("--rows", type=at_least(1000), default=50_000_000, metavar="N", help="rows of the table")
    add("--case", choices=CASES, nargs="+", default=[*CASES], metavar="NAME", help=", ".join(CASES))
    add("--alone", action="store_true", help="the first case in this process; prints JSON alone")
    add("--out", type=output, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    if not os.access(CLEAR, os.W_OK):
        parser.error(f"needs Linux, whose {CLEAR} lets a peak begin anew")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    if args.alone:
        print(json.dumps(run_alone(args.case[0], args.rows)))
        return 0
    print(f"{args.rows:,} rows, fp32, CPU, sizes {SIZES}")
    print(header())
    rows = []
    for name in args.case:
        try:
            rows.append(run(name, args.rows))
        except subprocess.CalledProcessError as error:
            print(f"{name}: ended with status {error.returncode}", file=sys.stderr)
            return 1
        print(line(rows[-1]), flush=True)
    if args.out is not None:
        provenance = collect()
        result = record("memory", rows=args.rows, provenance=provenance, cases=rows)
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
