"""``python -m esapn compare`` and ``report``, from their arguments to the page.

Nothing is imported here that needs scipy or jinja2 before ``check_extras`` has found both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli import SHARED, check_extras, check_least, load, make_folder, say_counts
from ..config import ConfigError, SearchConfig
from ..jsonfile import load_json, write_json
from ..run.loop import device_of
from ..run.processes import at_once
from . import workers
from .jobs import Job, is_finished, plan

__all__ = ["compare", "report"]


def compare(args: argparse.Namespace) -> int:
    """Make the runs that have no record yet, then the page; returns the exit status."""
    check_extras("scipy", "jinja2")
    device = device_of(args.device)
    check_least(1, seeds=args.seeds)
    check_least(0, workers=args.workers, checkpoint_seconds=args.checkpoint_seconds)
    common = {name: getattr(args, name) for name in SHARED}
    common["sizes"] = tuple(args.sizes)
    # Before the data are read: a setting out of range is found at once.
    SearchConfig(**common)
    ratings = load(args, args.tasks)
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
    processes = at_once(args.workers, device)
    print(f"{len(jobs)} runs, {processes} at once, into {args.out}")
    _run(args, unfinished, done=len(jobs) - len(unfinished), processes=processes)
    _write_page(args.out)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the page of a comparison from its records; returns the exit status."""
    check_extras("scipy", "jinja2")
    _write_page(args.folder)
    return 0


def _run(args: argparse.Namespace, jobs: Sequence[Job], *, done: int, processes: int) -> None:
    """The jobs in processes of their own, under a bar."""
    from tqdm import tqdm

    names = ("archive", "url", "cache", "malformed")
    options = tuple((n, getattr(args, n)) for n in names if getattr(args, n) is not None)
    options += (("five_classes", "multiclass" in args.tasks),)
    layout = "{l_bar}{bar}| {n}/{total} {postfix}"
    with tqdm(total=done + len(jobs), unit="run", bar_format=layout) as bar:

        def progress(done: int, total: int, label: str, left: float | None) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"{label} " + ("" if left is None else _left(left)))

        workers.run_jobs(
            jobs,
            options,
            done=done,
            workers=processes,
            seconds=args.checkpoint_seconds,
            progress=progress,
        )


def _write_page(folder: Path) -> None:
    from . import page
    from .tables import write_csv

    print(f"wrote {page.write(folder)} and {write_csv(folder)}")


def _keep_header(path: Path, header: dict[str, Any]) -> None:
    """Write ``compare.json``, unless the folder holds a comparison on other data."""
    if path.exists():
        try:
            held = load_json(path)
            same = held["data"]["sha256"] == header["data"]["sha256"]
            same = same and held["order"] == header["order"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} cannot be read: use another --out, or remove it") from None
        if not same:
            raise ConfigError(f"{path}: is of other data or another order; use another --out")
        header["started"] = held.get("started", header["started"])
    write_json(path, header)


def _left(seconds: float) -> str:
    """Remaining time in words."""
    minutes = seconds / 60
    if minutes < 1:
        return "under a minute left"
    return f"about {minutes:.0f} min left" if minutes < 90 else f"about {minutes / 60:.1f} h left"
