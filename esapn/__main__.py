"""Command line: ``python -m esapn search | compare | report``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .cli import (
    SHARED,
    check_extras,
    check_least,
    load,
    make_folder,
    parse,
    program,
    say_counts,
)
from .config import ConfigError, SearchConfig
from .errors import UserError
from .jsonfile import write_json

# What torch says on a GPU and on a CPU.
OUT_OF_MEMORY = "out of memory|allocate memory"
GOES_ON = {"search": "; --resume goes on", "compare": "; the same command goes on"}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line and status 2."""
    args = parse(argv)
    try:
        return _run(args)
    except UserError as error:
        return _refuse(args.command, str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        less = "; --workers 1 needs least" if args.command == "compare" else ""
        return _refuse(args.command, f"out of memory{less}")
    except KeyboardInterrupt:
        print(f"interrupted{GOES_ON.get(args.command, '')}", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename} " if error.filename else ""
        return _refuse(args.command, f"{where}{error.strerror or error}")


def _run(args: argparse.Namespace) -> int:
    # Imported for the command alone: that of a comparison needs scipy and jinja2.
    if args.command == "search":
        from .run.command import search

        return search(args)
    return _compare(args) if args.command == "compare" else _report(args)


def _refuse(command: str, message: str) -> int:
    print(f"{program()} {command}: error: {message}", file=sys.stderr)
    return 2


def _compare(args: argparse.Namespace) -> int:
    check_extras("scipy", "jinja2")

    from tqdm import tqdm

    from .compare.jobs import compare, is_finished, plan
    from .run.loop import device_of

    device = device_of(args.device)
    check_least(1, seeds=args.seeds)
    check_least(0, workers=args.workers, checkpoint_seconds=args.checkpoint_seconds)
    common = {name: getattr(args, name) for name in SHARED}
    common["sizes"] = tuple(args.sizes)
    SearchConfig(**common)
    ratings = load(args)
    header, jobs = plan(
        ratings,
        common=common,
        tasks=args.tasks,
        modes=args.modes,
        methods=args.methods,
        seeds=range(args.seeds),
        folder=args.out,
    )
    unfinished = [job for job in jobs if not is_finished(job)]
    make_folder(args.out / "runs", "probe")
    _keep_header(args.out / "compare.json", header)
    say_counts(ratings)
    # One GPU is no faster for being shared.
    workers = args.workers or (1 if device == "cuda" else _cores())
    names = ("archive", "url", "cache", "malformed")
    options = tuple((n, getattr(args, n)) for n in names if getattr(args, n) is not None)
    print(f"{len(jobs)} runs, {workers} at once, into {args.out}")
    with tqdm(total=len(jobs), unit="run", bar_format="{l_bar}{bar}| {n}/{total} {postfix}") as bar:

        def progress(done: int, total: int, label: str, left: float | None) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"{label} " + ("" if left is None else _left(left)))

        compare(
            unfinished,
            options,
            done=len(jobs) - len(unfinished),
            workers=workers,
            seconds=args.checkpoint_seconds,
            progress=progress,
        )
    _write_page(args.out)
    return 0


def _write_page(folder: Path) -> None:
    from .compare import page
    from .compare.contrasts import ReportError
    from .run.result import write_csv

    try:
        print(f"wrote {page.write(folder)} and {write_csv(folder)}")
    except ReportError as error:
        raise ConfigError(str(error)) from error


def _keep_header(path: Path, header: dict[str, Any]) -> None:
    """``compare.json``, unless the folder holds a comparison on other data."""
    if path.exists():
        try:
            held = json.loads(path.read_text())
            same = held["data"]["sha256"] == header["data"]["sha256"]
            same = same and held["order"] == header["order"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} cannot be read: use another --out, or remove it") from None
        if not same:
            raise ConfigError(f"{path}: is of other data or another order; use another --out")
        header["started"] = held.get("started", header["started"])
    write_json(path, header)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _left(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return "under a minute left"
    return f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"


def _report(args: argparse.Namespace) -> int:
    check_extras("scipy", "jinja2")

    _write_page(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
