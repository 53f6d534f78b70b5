"""Command line: ``python -m esapn search | compare | report``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from .config import CHOICES, MODES, ConfigError, SearchConfig
from .data.load import DataError, Ratings, Stream, load_ratings
from .data.movielens import MOVIELENS
from .extras import needs
from .run.checkpoint import CheckpointError
from .run.loop import device_of, stream_of
from .run.result import write_json

CHECKPOINT_SECONDS = 60.0
# Settings that all runs of a comparison have in common, and its command line sets.
SHARED = (
    *("data", "order", "order_seed", "device", "events"),
    *("train_fraction", "batch_size", "sizes", "log_every"),
)
# What torch says on a GPU and on a CPU.
OUT_OF_MEMORY = "out of memory|allocate memory"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_setting(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    options: dict[str, Any] = {"default": default, "help": text}
    if name in CHOICES:
        options["choices"] = CHOICES[name]
    if isinstance(default, tuple):
        options |= {"type": int, "nargs": "+", "metavar": "D"}
    else:
        options["type"] = type(default)
        if name not in CHOICES:
            options["metavar"] = "X"
    parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _add_settings(parser: argparse.ArgumentParser, only: tuple[str, ...] = ()) -> None:
    """A flag per field of ``SearchConfig``: its name, type, default and help are the field's."""
    defaults = SearchConfig()
    for setting in fields(SearchConfig):
        if not only or setting.name in only:
            text = setting.metadata["help"]
            _add_setting(parser, setting.name, getattr(defaults, setting.name), text)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archive", metavar="FILE", help="a MovieLens zip instead of a download")
    parser.add_argument("--url", help="where to download the named set from")
    parser.add_argument("--cache", metavar="DIR", help="of downloads and parsed columns")
    parser.add_argument(
        "--malformed",
        choices=("refuse", "skip"),
        default="refuse",
        help="rows that cannot be read: stop at the first, or leave them out and count them",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=CHECKPOINT_SECONDS,
        metavar="X",
        help="between two checkpoints of a run",
    )


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole command line, and its ``search``."""
    names = ", ".join(MOVIELENS)
    parser = _Parser(
        prog="python -m esapn",
        description="Embedding sizes searched on a stream.",
        epilog=f"--data takes synthetic, a MovieLens name ({names}), a file or a folder.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    search = commands.add_parser(
        "search",
        help="walk a stream once, searching sizes (or with a baseline)",
        formatter_class=_Formatter,
    )
    _add_settings(search)
    _add_data_options(search)
    search.add_argument("--out", type=Path, required=True, help="folder for result.json, run.png")
    search.add_argument(
        "--threads", type=int, default=1, help="CPU threads; 500 events gain little from more"
    )
    search.add_argument(
        "--resume", action="store_true", help="go on from the newest good checkpoint in --out"
    )
    search.add_argument(
        "--keep-best", action="store_true", help="keep the model of the best window in OUT/best"
    )
    search.add_argument(
        "--tensorboard", action="store_true", help="write the log for TensorBoard to OUT as well"
    )

    compare = commands.add_parser(
        "compare",
        help="many methods and seeds on one stream; the same command resumes",
        formatter_class=_Formatter,
    )
    _add_settings(compare, SHARED)
    _add_data_options(compare)
    tasks = CHOICES["task"]
    compare.add_argument(
        "--tasks", nargs="+", choices=tasks, default=list(tasks), help="what is predicted"
    )
    compare.add_argument(
        "--modes", nargs="+", choices=tuple(MODES), default=["paper"], help="defaults of the runs"
    )
    compare.add_argument(
        "--methods", nargs="+", metavar="M", help="presets, such as esapn fixed-16 thresholds-8"
    )
    compare.add_argument("--seeds", type=int, default=5, help="runs of every method")
    compare.add_argument(
        "--workers", type=int, default=0, help="processes at once; 0: one a core, or one a GPU"
    )
    compare.add_argument("--out", type=Path, required=True, help="folder for runs and report")

    report = commands.add_parser("report", help="write report.html and figures of a comparison")
    report.add_argument("folder", type=Path, metavar="DIR", help="--out of a comparison")
    return parser, search


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments; the mode's defaults stand where nothing is said."""
    parser, search = _parsers()
    args = parser.parse_args(argv)
    if args.command == "search":
        search.set_defaults(**MODES[args.mode])
        args = parser.parse_args(argv)
    return args


def _load(args: argparse.Namespace, data: str, events: int, seed: int) -> Ratings:
    return load_ratings(
        data,
        events=events,
        seed=seed,
        archive=args.archive,
        url=args.url,
        cache=args.cache,
        malformed=args.malformed,
    )


def _prepare(args: argparse.Namespace) -> tuple[SearchConfig, Ratings, Stream]:
    """Whatever can be wrong with the user's input is found here, before anything is learnt."""
    values = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    values["sizes"] = tuple(values["sizes"])
    config = SearchConfig(**values)
    device_of(config.device)
    _check_least(1, threads=args.threads)
    _check_least(0, checkpoint_seconds=args.checkpoint_seconds)
    ratings = _load(args, config.data, config.events, config.order_seed)
    stream = stream_of(config, ratings)
    # Last: a run that is refused leaves no folder.
    _make_folder(args.out, "result.json")
    return config, ratings, stream


def _check_least(least: int, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least {least}, got {value}")


def _make_folder(out: Path, name: str) -> None:
    """``out``, if a file ``name`` can be written in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / name
        existed = probe.exists()
        probe.open("a").close()
        if not existed:
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error


def _check_extras(*more: str) -> None:
    """What the end of a run needs must not be found missing there."""
    needed = ("tqdm", "torchmetrics", "matplotlib", *more)
    missing = [n for n in needed if find_spec(n) is None]
    if missing:
        raise ConfigError(needs("this", missing))


def _say_counts(ratings: Ratings) -> None:
    counts = {k: n for k, n in ratings.counts.items() if n and k != "rows"}
    if counts:
        print("rows: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))


def _search(args: argparse.Namespace) -> int:
    _check_extras(*(["tensorboard"] if args.tensorboard else []))
    config, ratings, stream = _prepare(args)
    torch.set_num_threads(args.threads)

    from tqdm import tqdm

    from .run import checkpoint
    from .run import result as report
    from .run.loop import Run
    from .run.resume import Saver, resume_or_start

    run = Run(config, stream)
    folder = args.out / "checkpoints"
    if args.resume:
        for line in resume_or_start(run, folder, ratings.checksum):
            print(line)
    elif any(folder.glob("step-*.pt")):
        raise ConfigError(
            f"{folder} holds an unfinished run: --resume goes on with it, "
            "another --out or removing the folder starts afresh"
        )
    print(
        f"{ratings.name}: {len(ratings.rating):,} events, {ratings.n_users:,} users, "
        f"{ratings.n_items:,} items; test part from event {stream.n_train:,} on; "
        f"{stream.user.device}"
    )
    _say_counts(ratings)
    saver = Saver(folder, ratings.checksum, args.checkpoint_seconds)
    writer: Any = None
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(args.out / "tensorboard"))
    with tqdm(total=len(stream.bounds), initial=run.index, unit="batch", mininterval=0.5) as bar:

        def progress(done: int, line: dict[str, Any]) -> None:
            bar.set_postfix_str(
                f"loss {line['loss']:.4f} acc {line['accuracy']:.4f} mean size "
                f"{line['mean_user_size']:.1f} / {line['mean_item_size']:.1f}",
                refresh=False,
            )
            bar.update(done - bar.n)
            if writer is not None:
                for name, value in line.items():
                    if not isinstance(value, list) and name != "events":
                        writer.add_scalar(name, value, line["events"])

        def pause(run: Run) -> None:
            if args.keep_best and run.best["line"] == len(run.log) - 1:
                best = checkpoint.save(args.out / "best", run.index, run.state_dict(), keep=1)
                # Of an earlier run: a later step would be taken for the better one.
                for stale in set(best.parent.glob("step-*.pt")) - {best}:
                    stale.unlink()
            saver(run)

        result = run.walk(progress, pause)
    if writer is not None:
        writer.close()
    print(report.result_lines(config, result))
    print()
    print(report.memory_table(result.memory))
    report.save(args.out, config, ratings, stream, result)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"\nwrote {args.out / 'result.json'} and {args.out / 'run.png'}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    _check_extras("scipy", "jinja2")

    from tqdm import tqdm

    from .compare.jobs import is_finished, plan
    from .compare.workers import run_jobs as compare

    device = device_of(args.device)
    _check_least(1, seeds=args.seeds)
    _check_least(0, workers=args.workers, checkpoint_seconds=args.checkpoint_seconds)
    common = {name: getattr(args, name) for name in SHARED}
    common["sizes"] = tuple(args.sizes)
    SearchConfig(**common)
    ratings = _load(args, args.data, args.events, args.order_seed)
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
    _make_folder(args.out / "runs", "probe")
    _keep_header(args.out / "compare.json", header)
    _say_counts(ratings)
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
    from .compare.records import ReportError
    from .compare.tables import write_csv

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
    _check_extras("scipy", "jinja2")

    _write_page(args.folder)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line and status 2."""
    args = _parse(argv)
    commands = {"search": _search, "compare": _compare, "report": _report}
    try:
        return commands[args.command](args)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"python -m esapn {args.command}: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        less = "; --workers 1 needs least" if args.command == "compare" else ""
        print(f"python -m esapn {args.command}: error: out of memory{less}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = {"search": "; --resume goes on", "compare": "; the same command goes on"}
        print(f"interrupted{goes_on.get(args.command, '')}", file=sys.stderr)
        return 130
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(
            f"python -m esapn {args.command}: error:{where} {error.strerror or error}",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
