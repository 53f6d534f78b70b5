"""The command line: its parsers, and the checks that its commands share.

Nothing here imports torch: a page of help and a mistyped flag are answered at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from . import errors
from .config import BY_METHOD, CHOICES, GROUPS, MODES, ConfigError, SearchConfig, mode_defaults
from .data.files import MALFORMED
from .data.load import load_ratings
from .data.movielens import MOVIELENS
from .data.ratings import Ratings
from .errors import did_you_mean
from .extras import needs

__all__ = [
    "SHARED",
    "check_extras",
    "check_least",
    "load",
    "make_folder",
    "parse",
    "program",
    "say_counts",
]

# Settings that all runs of a comparison have in common, and its command line sets.
SHARED = (
    *("data", "positive_above", "order", "order_seed", "events", "train_fraction"),
    *("batch_size", "sizes", "device", "log_every"),
)
CHECKPOINT_SECONDS = 60.0
_EPILOG = f"""\
Defaults are in brackets. MovieLens names of --data:
  {", ".join(MOVIELENS)}"""


def program() -> str:
    """How the command line was called: by its console script, or as a module."""
    return "esapn" if Path(sys.argv[0]).stem == "esapn" else "python -m esapn"


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage, and names the word that was probably meant.

    Flags are not abbreviated: one that is added later could take the abbreviation's meaning.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown flags first: argparse would rather miss a required one."""
        for word in sys.argv[1:] if args is None else args:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            flag = word.partition("=")[0]
            if re.match(r"--?[^\W\d]", flag) and flag not in self._option_string_actions:
                known = did_you_mean(flag, self._option_string_actions)
                self.error(f"unknown option {flag}{known}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"invalid choice: {value!r} (choose from {', '.join(known)})"
                f"{did_you_mean(str(value), known)}",
            )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Flags in a column that is wide enough for most of them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)


def _groups(parser: argparse.ArgumentParser, names: Sequence[str]) -> dict[str, Any]:
    return {name: parser.add_argument_group(name) for name in names}


def _add_settings(groups: dict[str, Any], names: Sequence[str] = ()) -> None:
    """A flag per field of ``SearchConfig``: all that it needs is in the field."""
    for setting in fields(SearchConfig):
        if names and setting.name not in names:
            continue
        default, about = getattr(SearchConfig(), setting.name), setting.metadata
        options: dict[str, Any] = {"type": type(default)}
        if isinstance(default, tuple):
            options = {"type": int, "nargs": "+"}
        _add(
            groups[about["group"]],
            f"--{setting.name.replace('_', '-')}",
            text=about["help"],
            default=default,
            others=_of_modes(setting.name),
            choices=CHOICES.get(setting.name),
            metavar=about["metavar"],
            **options,
        )


def _of_modes(name: str) -> dict[str, Any]:
    """What modes change a setting to, or by what."""
    found = {mode: values[name] for mode, values in MODES.items() if name in values}
    return found | {mode: "by method" for mode, names in BY_METHOD.items() if name in names}


def _add(group: Any, flag: str, *, text: str, default: Any, **options: Any) -> None:
    """A flag with a default, which its help names; ``others`` are those of other modes."""
    others = "".join(f"; {m}: {_shown(v)}" for m, v in options.pop("others", {}).items())
    text = f"{text} [{_shown(default)}{others}]".replace("%", "%%")
    group.add_argument(flag, default=default, help=text, **options)


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _add_data_options(group: Any) -> None:
    group.add_argument("--archive", metavar="FILE", help="a MovieLens zip instead of a download")
    group.add_argument("--url", help="another address of the named set's zip")
    group.add_argument("--cache", metavar="DIR", help="folder for downloads and parsed columns")
    text = "rows that cannot be read: stop, or leave them out and count"
    _add(group, "--malformed", text=text, default="refuse", choices=MALFORMED)


def _add_checkpoint_seconds(group: Any) -> None:
    _add(
        group,
        "--checkpoint-seconds",
        text="between two checkpoints of a run",
        default=CHECKPOINT_SECONDS,
        type=float,
        metavar="SECONDS",
    )


def _add_out(group: Any, text: str) -> None:
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)


def _add_search(parser: argparse.ArgumentParser) -> None:
    groups = _groups(parser, GROUPS)
    run = groups["run"]
    _add_out(run, "folder for result.json and run.png")
    _add_settings(groups)
    _add_data_options(groups["data"])
    text = "CPU threads; batches of 500 events gain little from more"
    _add(run, "--threads", text=text, default=1, type=int, metavar="N")
    _add_checkpoint_seconds(run)
    text = "go on from the newest good checkpoint in --out"
    run.add_argument("--resume", action="store_true", help=text)
    text = "keep the model of the best window in OUT/best"
    run.add_argument("--keep-best", action="store_true", help=text)
    text = "write the log for TensorBoard to --out as well"
    run.add_argument("--tensorboard", action="store_true", help=text)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    groups = _groups(parser, ("comparison", "data", "sizes", "run"))
    comparison, run = groups["comparison"], groups["run"]
    _add_out(comparison, "folder for runs and report")
    text = "presets, such as esapn fixed-16 thresholds-8"
    comparison.add_argument("--methods", nargs="+", metavar="M", help=text)
    tasks, modes = CHOICES["task"], CHOICES["mode"]
    many: dict[str, Any] = {"default": tasks, "choices": tasks, "metavar": "TASK", "nargs": "+"}
    _add(comparison, "--tasks", text=f"{' or '.join(tasks)}, or both", **many)
    many |= {"default": modes[:1], "choices": modes, "metavar": "MODE"}
    _add(comparison, "--modes", text=f"sets of defaults: {', '.join(modes)}", **many)
    text = "runs of every method, with seeds 0, 1, ..."
    _add(comparison, "--seeds", text=text, default=5, type=int, metavar="N")
    _add_settings(groups, SHARED)
    _add_data_options(groups["data"])
    text = "processes at once; 0: one per core, or one in all on a GPU"
    _add(run, "--workers", text=text, default=0, type=int, metavar="N")
    _add_checkpoint_seconds(run)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    groups = _groups(parser, ("tuning", "data", "sizes", "run"))
    tuning, run = groups["tuning"], groups["run"]
    _add_out(tuning, "folder for trials and the settings chosen")
    text = "as in compare: fixed-16, or counts-25%%,hops=tails; what a name gives is not tuned"
    tuning.add_argument("--methods", nargs="+", metavar="M", help=text)
    text = "settings tried of every method; the first are the mode's own"
    _add(tuning, "--trials", text=text, default=24, type=int, metavar="N")
    text = "shuffles of the part to train on, which the best trials walk"
    _add(tuning, "--orders", text=text, default=3, type=int, metavar="N")
    text = "seed of the first one [0; of a check: after those chosen on]"
    tuning.add_argument("--first-order", type=int, metavar="SEED", help=text)
    text = "no trials: walk with the settings chosen in these folders, on other orders"
    tuning.add_argument("--check", nargs="+", type=Path, default=[], metavar="DIR", help=text)
    names = [name for name in SHARED if name != "log_every"]
    _add_settings(groups, [*names, "task"])
    _add_data_options(groups["data"])
    text = "processes at once; 0: one per core, or one in all on a GPU"
    _add(run, "--workers", text=text, default=0, type=int, metavar="N")


def _parsers() -> tuple[Parser, Parser]:
    """The whole command line, and its ``search``."""
    parser = Parser(prog=program(), description="Embedding sizes searched on a stream.")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )

    def command(name: str, text: str, usage: str, epilog: str = _EPILOG) -> Any:
        return commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=f"{program()} {name} {usage}",
            epilog=epilog,
        )

    search = command(
        "search",
        "walk a stream once, searching sizes (or with a baseline)",
        "--out DIR [--data DATA] [--method METHOD] [--mode MODE] [options]",
    )
    _add_search(search)
    compare = command(
        "compare",
        "many methods and seeds on one stream; the same command resumes",
        "--out DIR [--data DATA] [--methods M ...] [--seeds N] [options]",
    )
    _add_compare(compare)
    tune = command(
        "tune",
        "settings of every method, on the part to train on alone; the same command resumes",
        "--out DIR [--data DATA] [--methods M ...] [--trials N] [options]",
    )
    _add_tune(tune)
    report = command("report", "write report.html and figures of a comparison", "DIR", epilog="")
    report.add_argument("folder", type=Path, metavar="DIR", help="--out of a comparison")
    return parser, search


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments; a mode's defaults stand where its settings are not given."""
    parser, search = _parsers()
    args = parser.parse_args(argv)
    if args.command == "search":
        search.set_defaults(**mode_defaults(args.mode, vars(args)))
        args = parser.parse_args(argv)
    return args


def load(args: argparse.Namespace, tasks: Sequence[str]) -> Ratings:
    """The ratings of ``--data`` for ``tasks``; see :func:`esapn.data.load.load_ratings`."""
    return load_ratings(
        args.data,
        events=args.events,
        seed=args.order_seed,
        archive=args.archive,
        url=args.url,
        cache=args.cache,
        malformed=args.malformed,
        five_classes="multiclass" in tasks,
    )


def check_least(least: float, **values: float) -> None:
    """Raise ``ConfigError``, which names the flag, for a value below ``least``, or NaN."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    errors.check_least(ConfigError, least, **flags)


def make_folder(out: Path, name: str) -> None:
    """Make ``out``; raise ``ConfigError`` unless a file ``name`` can be written in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / name
        existed = probe.exists()
        probe.open("a").close()
        if not existed:
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}") from error


def check_extras(*more: str) -> None:
    """Raise ``ConfigError`` now for a package that only the end of a run needs."""
    needed = ("tqdm", "torchmetrics", "matplotlib", *more)
    missing = [n for n in needed if find_spec(n) is None]
    if missing:
        raise ConfigError(needs("this", missing))


def say_counts(ratings: Ratings) -> None:
    """Print what is odd about the rows, if anything is."""
    counts = {k: n for k, n in ratings.counts.items() if n and k != "rows"}
    if counts:
        print("rows: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
