"""Command line: ``python -m esapn search --data NAME|PATH --out DIR``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from .config import CHOICES, ConfigError, SearchConfig
from .data import DataError, Ratings, Stream, build_stream, load_ratings


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ``SearchConfig``: its name, type, default and help are the field's."""
    defaults = SearchConfig()
    for setting in fields(SearchConfig):
        default: Any = getattr(defaults, setting.name)
        options: dict[str, Any] = {"default": default, "help": setting.metadata["help"]}
        if setting.name in CHOICES:
            options["choices"] = CHOICES[setting.name]
        if isinstance(default, tuple):
            options |= {"type": int, "nargs": "+", "metavar": "D"}
        else:
            options["type"] = type(default)
            if setting.name not in CHOICES:
                options["metavar"] = "X"
        parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m esapn", description="Embedding sizes searched on a stream.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    search = commands.add_parser(
        "search",
        help="walk a stream once, searching sizes (or at one fixed size)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_settings(search)
    search.add_argument("--out", type=Path, required=True, help="folder for result.json, run.png")
    search.add_argument(
        "--threads", type=int, default=1, help="CPU threads; 500 events gain little from more"
    )
    return parser.parse_args(argv)


def _prepare(args: argparse.Namespace) -> tuple[SearchConfig, Ratings, Stream]:
    """Whatever can be wrong with the user's input is found here, before anything is learnt."""
    values = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    values["sizes"] = tuple(values["sizes"])
    config = SearchConfig(**values)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device was found")
    if args.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {args.threads}")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    ratings = load_ratings(config.data, events=config.events, seed=config.seed)
    stream = build_stream(
        ratings,
        task=config.task,
        order=config.order,
        seed=config.seed,
        batch_size=config.batch_size,
        train_fraction=config.train_fraction,
        history=config.history,
        device=device,
    )
    # Last: a run that is refused leaves no folder.
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / "result.json"
        existed = probe.exists()
        probe.open("a").close()
        if not existed:
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {args.out}: {error.strerror}") from error
    return config, ratings, stream


def _check_extras() -> None:
    """What the end of a run needs must not be found missing there."""
    missing = [n for n in ("tqdm", "torchmetrics", "matplotlib") if find_spec(n) is None]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(f"the search needs {names}: pip install 'esapn-kernels[train]'")


def _search(args: argparse.Namespace) -> int:
    _check_extras()
    config, ratings, stream = _prepare(args)
    torch.set_num_threads(args.threads)

    from tqdm import tqdm

    from . import report
    from .search import run_search

    print(
        f"{ratings.name}: {len(ratings.rating):,} events, {ratings.n_users:,} users, "
        f"{ratings.n_items:,} items; test part from event {stream.n_train:,} on; "
        f"{stream.user.device}"
    )
    with tqdm(total=len(stream.bounds), unit="batch", mininterval=0.5) as bar:

        def progress(done: int, line: dict[str, float]) -> None:
            bar.set_postfix_str(
                f"loss {line['loss']:.4f} acc {line['accuracy']:.4f} mean size "
                f"{line['mean_user_size']:.1f} / {line['mean_item_size']:.1f}",
                refresh=False,
            )
            bar.update(done - bar.n)

        result = run_search(config, stream, progress)
    print(report.result_lines(config, result))
    print()
    print(report.memory_table(result.memory))
    report.save(args.out, config, ratings, stream, result)
    print(f"\nwrote {args.out / 'result.json'} and {args.out / 'run.png'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line and status 2."""
    args = _parse(argv)
    try:
        return _search(args)
    except (ConfigError, DataError) as error:
        print(f"python -m esapn {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
