"""The lookup's kernels for CPUs against nn.Embedding, an earlier commit and fbgemm.

    python bench/cpu.py --out cpu.json
    python bench/cpu.py --before ../before --peers --out cpu.json

Every row sets a time of ours against another's, in one process and in turns of alternating order,
rotating among several batches of ids: medians, and the ratio turn by turn. One thread is timed by
the process's CPU time on one core, two by a wall clock on two. Before anything is timed, the
results of both are compared with a float64 reference; a wrong one ends the benchmark. --out is
written anew after every row; "complete" in it says whether all of them are there.

glibc's allocator is told to keep freed memory ("warm"), for which the command runs itself anew.
Forwards and steps of 65,536 ids are measured in a process with its defaults as well ("default").

--rows takes names or patterns ('step-*'):
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import allocator, before, peers, ratios
from harness.command import Parser, at_least, output, record, seed, write_result
from harness.cpu import CASES, CPU, Bench, Case, cores
from harness.gate import TOLERANCE, GateError
from harness.providers import make_table_spec
from harness.ratios import Line
from harness.roof import PAPER_ROWS

from esapn_kernels.info import collect
from esapn_kernels.ops.backend import resolve_backend

_TURNS, _QUICK_TURNS = 40, 3
_PRODUCT, _QUICK_PRODUCT = 2048, 256
# More than a step's tensors together.
_WARM_BYTES, _QUICK_WARM_BYTES = 1 << 30, 1 << 27


def _pattern(text: str) -> str:
    """The ``type`` of ``--rows``."""
    if not any(fnmatch(case.name, text) for case in CASES):
        raise argparse.ArgumentTypeError(f"no row is called {text}: --help lists them")
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; a mistake ends the process with one line."""
    names = "".join(f"\n    {case.name}" for case in CASES)
    parser = Parser("bench/cpu.py", f"{(__doc__ or '').rstrip()}{names}")
    add = parser.add_argument
    backends = ("auto", "native", "torch")
    add("--backend", choices=backends, default="auto", help="backend= of ours")
    add(
        "--before",
        type=before.checkout,
        metavar="PATH",
        help="a checkout of an earlier commit, for the rows against it",
    )
    add("--peers", action="store_true", help="the rows against fbgemm_gpu, installed already")
    add("--rows", type=_pattern, nargs="+", metavar="NAME", help="these only (default: all)")
    often = f"turns of every row (default: {_TURNS}; {_QUICK_TURNS} with --quick)"
    add("--turns", type=at_least(2), metavar="N", help=often)
    add("--quick", action="store_true", help="few turns on a hundredth of the rows: a rehearsal")
    kinds = "memory to measure with; default: the rows that are measured so, and no others"
    add("--allocator", choices=allocator.KINDS, default="warm", help=kinds)
    add("--seed", type=seed, default=0, metavar="S", help="of tables, rows and ids")
    add("--out", type=output, metavar="FILE.json", help="write the result as JSON")
    args = parser.parse_args(argv)
    args.turns = args.turns or (_QUICK_TURNS if args.quick else _TURNS)
    try:
        resolve_backend(args.backend, CPU)
    except (ValueError, RuntimeError) as error:
        parser.error(f"argument --backend: {error}")
    if args.peers and (why := peers.fbgemm_error()) is not None:
        parser.error(f"argument --peers: fbgemm_gpu cannot be imported ({why})")
    args.cases, args.notes = choose(args)
    if not args.cases:
        why_none = "; ".join(args.notes) or "no such row is measured with this allocator"
        parser.error(f"nothing to measure: {why_none}")
    args.package = None
    if args.before is not None:
        try:
            args.package = before.load(args.before)
        except ImportError as error:
            parser.error(f"argument --before: its package cannot be imported ({error})")
    return args


def choose(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """The cases to measure, and a note for every kind of them that is left out."""
    chosen = [c for c in CASES if any(fnmatch(c.name, p) for p in args.rows or ["*"])]
    if args.allocator == "default":
        return [case for case in chosen if case.has_default], []
    timed_by_two = {case.name for case in chosen if case.threads > 1 and case.what != "bits"}
    reasons = {
        "--before PATH": {case.name for case in chosen if case.against == "before"}
        if args.before is None
        else set(),
        "--peers": {case.name for case in chosen if case.against == "fbgemm"}
        if not args.peers
        else set(),
        "two cores": timed_by_two if cores() < 2 else set(),
    }
    notes = [
        f"left out, for it needs {need}: {', '.join(sorted(names))}"
        for need, names in reasons.items()
        if names
    ]
    left_out = set().union(*reasons.values())
    return [case for case in chosen if case.name not in left_out], notes


class DefaultProcessError(Exception):
    """The process with the default allocator ended without its rows."""


def measure_default(args: argparse.Namespace) -> dict[str, Any]:
    """The result of a process of its own with the default allocator.

    Raises:
        DefaultProcessError: it failed, and has said why.
    """
    names = [case.name for case in args.cases if case.has_default]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "default.json"
        command = [sys.executable, os.path.abspath(__file__), "--allocator", "default"]
        command += ["--backend", args.backend, "--turns", str(args.turns)]
        command += ["--seed", str(args.seed), *(["--quick"] if args.quick else [])]
        command += ["--out", str(out), "--rows", *names]
        environment = allocator.environment("default")
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise DefaultProcessError(
                f"the process with the default allocator ended with status {done.returncode}"
            )
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def conditions(args: argparse.Namespace, info: dict[str, Any], bench: Bench) -> list[str]:
    """What the numbers hold for, as lines of text."""
    mode = resolve_backend(args.backend, CPU)
    rows = len(bench.spec)
    text = [
        f"{info['cpu'] or 'CPU'}; ours: backend {mode}; float32, {rows:,} rows of the ml-20m mix",
        f"torch {info['torch']}, python {info['python']}, commit {(info['commit'] or 'none')[:12]}"
        f"{' (modified)' if info['dirty'] else ''}, seed {args.seed}, {args.turns} turns",
        f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs at the start",
        f"gate: passed, largest relative error <= {TOLERANCE:.0e} against float64",
        "ratio: time of nn.Embedding, or of what ends the row's name, over ours, turn by turn; "
        "above 1 ours is faster",
        "one thread by its CPU time, two by a wall clock",
    ]
    if args.package is not None:
        text.append(f"before: commit {_commit_of(args.package) or 'unknown'}")
    if args.peers:
        text.append(f"fbgemm_gpu {import_module('fbgemm_gpu').__version__}")
    return text


def _commit_of(package: ModuleType) -> str | None:
    try:
        commit: str | None = import_module(f"{package.__name__}.info").collect()["commit"]
    except (ImportError, AttributeError, KeyError):
        return None
    return commit


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as values that JSON can hold; ``args.out`` has it meanwhile.

    Raises:
        GateError: ours or another is wrong; the file says so.
        DefaultProcessError: as of :func:`measure_default`.
    """
    # One thread from the beginning: later cases say where they need more.
    torch.set_num_threads(1)
    share = 100 if args.quick else 1
    numbers = {size: rows // share for size, rows in PAPER_ROWS.items()}
    spec = make_table_spec("ml-20m", numbers, torch.Generator().manual_seed(args.seed))
    product = _QUICK_PRODUCT if args.quick else _PRODUCT
    bench = Bench(spec, args.backend, args.allocator, args.turns, args.seed, args.package, product)
    info = collect()
    said = conditions(args, info, bench)
    if args.allocator == "warm":
        allocator.touch(_QUICK_WARM_BYTES if args.quick else _WARM_BYTES)
    allocators = [allocator.describe(args.allocator)]
    notes = list(args.notes)
    if args.quick:
        notes.append("--quick: a rehearsal on a small table; its times say nothing")
    rows: list[dict[str, Any]] = []

    def result(complete: bool, passed: bool = True) -> dict[str, Any]:
        made = record(
            "cpu",
            complete=complete,
            quick=args.quick,
            backend=resolve_backend(args.backend, CPU),
            turns=args.turns,
            seed=args.seed,
            gate={"passed": passed, "tolerance": TOLERANCE},
            product_gflops=bench.gflops,
            allocators=allocators,
            conditions=said,
            notes=notes,
            provenance=info,
            rows=rows,
        )
        if args.out is not None:
            write_result(args.out, made)
        return made

    result(complete=False)
    for case in args.cases:
        print(f"{case.name}, {args.allocator} ...", file=sys.stderr, flush=True)
        try:
            rows.append(asdict(bench.measure(case)))
        except GateError as error:
            notes.append(f"ended before {case.name}: {error}")
            result(complete=False, passed=False)
            raise
        result(complete=False)
    if args.allocator == "warm" and any(case.has_default for case in args.cases):
        if allocator.has_glibc():
            other = measure_default(args)
            rows += other["rows"]
            allocators += other["allocators"]
        else:
            notes.append("not glibc: its allocator is taken as it is, and measured once")
    return result(complete=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    args = parse(argv)
    try:
        result = run(args)
    except (GateError, DefaultProcessError) as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    print("\n".join(ratios.lines([Line(**row) for row in result["rows"]])))
    print()
    rates = [
        f"products: {rate:.0f} GFLOP/s, threads: {threads}"
        for threads, rate in result["product_gflops"].items()
    ]
    print("\n".join(result["conditions"] + result["allocators"] + rates + result["notes"]))
    return 0


if __name__ == "__main__":
    allocator.enter(parse().allocator)
    sys.exit(main())
