"""The first ten minutes on a GPU: what only a GPU shows of the kernels, the likeliest faults first.

    python bench/gpu.py [--out FOLDER]     # one GPU; under nine minutes, whatever happens
    python bench/gpu.py --rehearse         # the same way on a CPU, tiny: it measures nothing

The stages are in LIMITS, each a process of its own that is ended when its time is over. A stage
that fails or is ended keeps what it has found, and the others run. In FOLDER:

    summary.md, summary.json    what passed, failed and was not reached
    tests.jsonl                 every test's result (harness/gpu_tests.py)
    kernels.json                microseconds of every kernel (bench/kernels.py)
    log.txt                     everything that the stages print

The status is 0 if all is well, 1 if something failed or was not reached, 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from harness.command import Parser, record, write_result

ROOT = Path(__file__).resolve().parents[1]

LIMITS = {
    "race": 55,
    "tests": 240,
    "native": 55,
    "kernels": 80,
    "memcheck": 45,
    "initcheck": 35,
}
"""Seconds of every stage on a GPU, in order; what one leaves is the next one's too."""

NATIVE = "tests/kernels/test_native.py"
RACES = (
    f"{NATIVE}::test_no_moment_of_adam_is_stale",
    f"{NATIVE}::test_rowwise_adagrad_steps_alike_every_time",
    f"{NATIVE}::test_rowwise_adam_steps_alike_every_time",
)

# Files whose tests launch kernels. Those that train and compile little, then gradients, promotions
# and forwards in all types, then what rests on these.
TESTED = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "optim",
        "nonfinite",
        "segments",
        "followers",
        "carried_sums",
        "lookup_bwd",
        "resize",
        "lookup",
        "compose",
        "group",
        "arena",
        "module",
        "weight",
        "one_size",
    )
]
REHEARSED = ["tests/kernels/test_segments.py::test_hot_stretches"]

NEEDED = {
    "torch": "torch>=2.11",
    "triton": "triton>=3.6",
    "numpy": "numpy",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
}
"""Modules, and what brings them."""

FILES = ("summary.md", "summary.json", "tests.jsonl", "kernels.json", "log.txt")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        seconds: before it is ended.
        tests: whether it is pytest with ``harness.gpu_tests``.
        missing: why it cannot run here; empty where it can.
    """

    name: str
    what: str
    seconds: float
    command: Sequence[str]
    tests: bool = False
    missing: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


def find_sanitizer() -> str | None:
    """NVIDIA's compute-sanitizer, on PATH or where CUDA is installed."""
    found = shutil.which("compute-sanitizer")
    return found or max(glob("/usr/local/cuda*/bin/compute-sanitizer"), default=None)


def make_stages(out: Path, rehearse: bool) -> list[Stage]:
    """All of them, in their order."""
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    timing = [sys.executable, "bench/kernels.py"]
    # Interpreted kernels are slow, and how slow says nothing.
    limits = {name: seconds * (10 if rehearse else 1) for name, seconds in LIMITS.items()}

    def tests(name: str, what: str, number: int, targets: Sequence[str]) -> Stage:
        command = [sys.executable, "-m", "pytest", "--device", "cpu" if rehearse else "cuda"]
        command += ["-p", "harness.gpu_tests", "--record", str(out / "tests.jsonl")]
        # One worker at least: where CUDA is beyond repair, a new process goes on. Small chunks keep
        # the order. torch's own warnings are no failures here.
        command += ["-n", str(number), "--maxschedchunk", "2", "-W", "ignore", "-v", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-m", "not large", *targets]
        return Stage(name, what, limits[name], command, tests=True)

    def sanitizer(tool: str) -> Stage:
        found = find_sanitizer()
        missing = "compute-sanitizer is not installed" if found is None else ""
        command = [found or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += ["--target-processes", "application-only", *timing]
        command += ["--once", "--ids", "500", "--scale", "1"]
        if rehearse:
            missing = "it needs a GPU"
        # Every tensor an allocation of its own: a place outside of it is seen.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        what = f"compute-sanitizer {tool}, two steps and a promotion of 500 ids"
        return Stage(tool, what, limits[tool], command, missing=missing, env=env)

    timing_stage = [*timing, "--out", str(out / "kernels.json")]
    timing_stage += ["--rehearse", "--ids", "6"] if rehearse else []
    return [
        tests("race", "races of the state of Adam and of row-wise rules", 1, RACES),
        tests("tests", "the kernels' tests", workers, REHEARSED if rehearse else TESTED),
        tests("native", "what only a GPU shows", 1, [NATIVE]),
        Stage(
            "kernels",
            "microseconds of every kernel",
            limits["kernels"],
            timing_stage,
            env=interpreted,
        ),
        sanitizer("memcheck"),
        sanitizer("initcheck"),
    ]


def run_process(stage: Stage, seconds: float, log: TextIO) -> dict[str, Any]:
    """Runs a stage's process; gives its status, and the lines that tell what went wrong."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "bench"), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **stage.env}
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    printed: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line.rstrip())
            for file in (log, sys.stdout):
                print(printed[-1], file=file, flush=True)

    # A thread: a process that the driver holds may keep its output open.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status = "timed out"
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = "passed" if process.wait(seconds) == 0 else "failed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        reader.join(5)
        if process.stdout is not None and not reader.is_alive():
            process.stdout.close()
    found: dict[str, Any] = {"status": status, "returncode": process.poll()}
    if status != "passed":
        # compute-sanitizer's own lines from the first, then the end, where an exception is named.
        marked = [line for line in printed if line.startswith("=========")]
        found["text"] = marked[:12] + [line for line in printed if line not in marked][-8:]
    return found


def read_tests(lines: Sequence[str]) -> dict[str, Any]:
    """What :mod:`harness.gpu_tests` wrote in one stage: counts, failures, and what was not run."""
    collected: list[str] = []
    started: dict[str, None] = {}
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    for line in map(json.loads, lines):
        if "collected" in line:
            collected = line["collected"]
        elif "started" in line:
            started[line["started"]] = None
        elif "test" in line:
            if line["outcome"] == "failed":
                failures.setdefault(line["test"], line["text"])
            if outcomes.get(line["test"]) != "failed":
                outcomes[line["test"]] = line["outcome"]
    return {
        "counts": dict(Counter(outcomes.values())),
        "failures": [{"test": test, "text": first_lines(text)} for test, text in failures.items()],
        "running": [test for test in started if test not in outcomes],
        "not_reached": [test for test in collected if test not in {*started, *outcomes}],
    }


def first_lines(text: str, number: int = 5) -> list[str]:
    """The first lines of a failure: of the error where pytest marks it."""
    # pytest-xdist names its worker above.
    every = [line for line in text.splitlines() if line and not line.startswith("[gw")]
    marked = [line[1:].strip() for line in every if line.startswith("E  ")]
    return (marked or every)[:number]


def run(stages: Sequence[Stage], out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the stages and writes the summary before, between and after them.

    Args:
        out: the folder, which is made; the files that it has of another run go.
        facts: for the summary.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    entries: list[dict[str, Any]] = [
        {"stage": s.name, "what": s.what, "status": "not reached", "limit_s": s.seconds}
        for s in stages
    ]
    begin = time.monotonic()

    def save(complete: bool) -> dict[str, Any]:
        seconds = round(time.monotonic() - begin, 1)
        result = record("gpu", complete=complete, seconds=seconds, **facts, stages=entries)
        write_result(out / "summary.json", result)
        (out / "summary.md").write_text(summary(result, out) + "\n", encoding="utf-8")
        return result

    spare = 0.0
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for stage, entry in zip(stages, entries, strict=True):
            heading = f"== {stage.name}: {stage.what}"
            for file in (log, sys.stdout):
                print(heading, file=file, flush=True)
            if stage.missing:
                entry |= {"status": "not available", "text": [stage.missing]}
                spare += stage.seconds
                continue
            entry |= {"status": "interrupted", "command": shlex.join(stage.command)}
            save(complete=False)
            records = out / "tests.jsonl"
            if stage.tests:
                with records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"stage": stage.name}) + "\n")
            place = records.stat().st_size if stage.tests else 0
            started = time.monotonic()
            try:
                entry |= run_process(stage, stage.seconds + spare, log)
            finally:
                seconds = time.monotonic() - started
                entry["seconds"] = round(seconds, 1)
                spare = max(0.0, spare + stage.seconds - seconds)
                if stage.tests:
                    whole = records.read_bytes()[place:].decode()
                    entry |= read_tests(whole.splitlines())
                    if entry["counts"]:  # they say what went wrong
                        entry.pop("text", None)
                save(complete=False)
    return save(complete=True)


def summary(result: Mapping[str, Any], out: Path) -> str:
    """The result in Markdown: short, everything else is in the files."""
    info = result["provenance"]
    devices = ", ".join(device["name"] for device in info["devices"]) or "no GPU"
    text = ["# The kernels on a GPU", ""]
    if result["rehearsal"]:
        text = ["# Rehearsal on a CPU: kernels interpreted, nothing is measured", ""]
    commit = f"{(info['commit'] or 'none')[:12]}{' (modified)' if info['dirty'] else ''}"
    text += [
        f"{devices}; torch {info['torch']}, triton {info['triton']}, commit {commit}, "
        f"{result['time']}, {result['seconds']:.0f} s"
        + ("" if result["complete"] else "; **not complete**"),
        "",
        "| stage | result | s | limit | tests |",
        "|---|---|---|---|---|",
    ]
    for entry in result["stages"]:
        counts = [f"{n} {outcome}" for outcome, n in sorted(entry.get("counts", {}).items())]
        if entry.get("not_reached"):
            counts.append(f"{len(entry['not_reached'])} not reached")
        text.append(
            f"| {entry['stage']}: {entry['what']} | {entry['status']} | {entry.get('seconds', '')} "
            f"| {entry['limit_s']:g} | {', '.join(counts)} |"
        )
    for entry in result["stages"]:
        text += _details(entry)
    return "\n".join(text + _times(out / "kernels.json"))


def _details(entry: Mapping[str, Any], most: int = 15) -> list[str]:
    """What failed in a stage and what it did not reach."""
    text: list[str] = []
    failures = entry.get("failures", [])
    for failure in failures[:most]:
        text.append(f"- `{failure['test']}`")
        text += [f"      {line[:150]}" for line in failure["text"][:2]]
    if len(failures) > most:
        text.append(f"- and {len(failures) - most} more, in summary.json")
    for title, key in (("running at the end", "running"), ("not reached", "not_reached")):
        files = Counter(test.partition("::")[0] for test in entry.get(key, []))
        some = files if key == "not_reached" else dict.fromkeys(entry.get(key, []), 1)
        if some:
            text.append(f"- {title}: " + ", ".join(f"{n} x {name}" for name, n in some.items()))
    text += [f"      {line[:150]}" for line in entry.get("text", [])]
    return ["", f"## {entry['stage']}: {entry['status']}", "", *text] if text else []


def _times(path: Path) -> list[str]:
    """The cases of kernels.json, without their kernels."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    text = ["", "## microseconds a call", ""]
    if found["rehearsal"]:
        text += ["Of a rehearsal: they say nothing.", ""]
    text += ["| case | ids | kernels | host | both | of a copy |", "|---|---|---|---|---|---|"]
    for case in found["cases"]:
        share = case["share_of_copy"]
        text.append(
            f"| {case['case']} | {case['ids']:,} | {case['kernels_us']:,.1f} "
            f"| {case['host_us']:,.1f} | {case['host_and_gpu_us']:,.1f} "
            f"| {'' if share is None else f'{share:.1%}'} |"
        )
    return text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line and looks for what a run needs; a mistake is one line."""
    parser = Parser("bench/gpu.py", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="for the files")
    add("--rehearse", action="store_true", help="on the CPU, tiny; it measures nothing")
    args = parser.parse_args(argv)
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        parser.error(f"it needs {names}; to install: {shlex.join(['pip', 'install', *missing])}")
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --rehearse shows the way on a CPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make {args.out}: {error.strerror}")
    args.out = args.out.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything and returns the exit status."""
    args = parse(argv)
    sys.path.insert(0, str(ROOT))
    from esapn_kernels.info import collect

    facts = {"rehearsal": args.rehearse, "provenance": collect()}
    result = run(make_stages(args.out, args.rehearse), args.out, facts)
    print("\n" + summary(result, args.out))
    well = {"passed", "not available"}
    return int(any(entry["status"] not in well for entry in result["stages"]))


if __name__ == "__main__":
    # Whoever ends this process ends the stage with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
