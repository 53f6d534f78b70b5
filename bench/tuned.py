"""The mode ``tuned`` out of checked settings: one set for all methods, others where it fails one.

    python bench/tuned.py --binary FILE ... --multiclass FILE ... [--out esapn/tuned.json]

Each task has settings of its own: its loss sets how large gradients are. A FILE is the
``trials.csv`` of a ``python -m esapn tune --check DIR ...``: every method on orders that nobody
chose on, with the mode's settings (``default``), with those that every DIR chose for it, and with
rows' settings that are the same for all methods (``shared``). For every file and method

    regret of settings = their mean loss / the least mean loss of the method's settings - 1

A method has the shared settings if its mean regret over all files is at most --tolerance with them,
else those of the DIR with the least one. Methods that were not tuned have the shared rows.

Given as 16:FILE, a check is of tables whose largest size is 16. What is chosen there stands beside
what is chosen for all sizes, as ``counts,to=16``; no tolerance is given, for the rows' settings
shared by the few methods of such a check are not those of all methods.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from harness.command import Parser, output

from esapn.config import CHOICES, ConfigError, tuned_name
from esapn.errors import UserError
from esapn.methods import method_settings
from esapn.tune.choice import DEFAULT, SHARED_ROWS
from esapn.tune.space import ROWS
from esapn.tune.trials import read
from esapn.tune.walk import Walked

Regrets = dict[str, dict[str, dict[str, float]]]  # file, method, settings
Settings = dict[tuple[str, str], dict[str, Any]]  # method, settings


class TunedError(UserError):
    """Files that hold no check, or not the same one; one line."""


def regrets(walks: Sequence[Walked]) -> dict[str, dict[str, float]]:
    """Method to the regret of each of its settings, by the names of these.

    Example:
        >>> walks = [
        ...     Walked("fixed-2", label, 3, {"row_lr": 0.1}, (1.0, 1.0, 1.0, loss), 0.5, 8, 1.0)
        ...     for label, loss in [("default", 0.3), ("shared", 0.2), ("here", 0.25)]
        ... ]
        >>> {k: round(v, 3) for k, v in regrets(walks)["fixed-2"].items()}
        {'default': 0.5, 'shared': 0.0, 'here': 0.25}
    """
    losses: dict[str, dict[str, list[float]]] = {}
    for walk in walks:
        losses.setdefault(walk.method, {}).setdefault(walk.trial, []).append(walk.loss)
    found = {}
    for method, by in losses.items():
        means = {name: statistics.mean(values) for name, values in by.items()}
        least = min(means.values())
        found[method] = {name: mean / least - 1 for name, mean in means.items()}
    return found


def over_files(found: Regrets, method: str, name: str) -> float:
    """The mean regret of a method's settings over all files."""
    return statistics.mean(by[method][name] for by in found.values())


def choose(found: Regrets, tolerance: float) -> dict[str, str]:
    """Method to the name of the settings that it has."""
    chosen = {}
    for method, by in next(iter(found.values())).items():
        names = [name for name in by if name not in (DEFAULT, SHARED_ROWS)]
        best = min(names, key=lambda name: over_files(found, method, name))
        shared = over_files(found, method, SHARED_ROWS)
        chosen[method] = SHARED_ROWS if shared <= tolerance else best
    return chosen


def content(chosen: Mapping[str, str], settings: Settings, suffix: str = "") -> dict[str, Any]:
    """What ``esapn/tuned.json`` holds: rows' settings for all, and of every method all of its own.

    A method is there by what it is, without the bytes that its name gives it: ``counts``, and the
    ``suffix`` behind it.
    """
    whole = [m for m in chosen if set(ROWS) <= set(settings[m, SHARED_ROWS])]
    if not whole:
        raise TunedError("no method has all settings of its rows tuned")
    rows = {name: settings[whole[0], SHARED_ROWS][name] for name in ROWS}
    methods: dict[str, Any] = {}
    for method, name in chosen.items():
        _, given = method_settings(method)
        key = tuned_name(given) + suffix
        if key in methods:
            raise TunedError(f"'{method}' and another method have one name in the mode: '{key}'")
        methods[key] = settings[method, name]
    return {"rows": rows, "methods": methods}


def show(found: Regrets, chosen: Mapping[str, str]) -> None:
    """Print the regrets, in thousandths of the least loss, and their means over all files."""
    means = {m: {n: over_files(found, m, n) for n in by} for m, by in _first(found).items()}
    for file, of_methods in {**found, "mean": means}.items():
        names = list(next(iter(of_methods.values())))
        print(f"{file}: regret in thousandths of the method's least loss")
        print(f"  {'method':<26}" + "".join(f"{name:>10}" for name in names))
        for method, by in of_methods.items():
            print(f"  {method:<26}" + "".join(f"{1000 * by[name]:>10.2f}" for name in names))
    for method, name in chosen.items():
        print(f"{method}: {name}")


def _first(found: Regrets) -> dict[str, dict[str, float]]:
    return next(iter(found.values()))


def load(paths: Sequence[Path]) -> tuple[Regrets, Settings]:
    """The regrets of every file, and the settings by method and name.

    Raises:
        TunedError: a file that holds no check, or another one than the first.
    """
    found: Regrets = {}
    settings: Settings = {}
    for path in paths:
        walks = read(path)
        names = {walk.trial for walk in walks}
        if not {DEFAULT, SHARED_ROWS} < names:
            raise TunedError(f"{path}: holds no settings that were checked")
        for walk in walks:
            key, mine = (walk.method, walk.trial), dict(walk.settings)
            if walk.trial != DEFAULT and settings.setdefault(key, mine) != mine:
                raise TunedError(f"{path}: '{walk.trial}' has other settings than in a file before")
        walked = Counter((walk.method, walk.trial, walk.order) for walk in walks)
        every = product({w.method for w in walks}, names, {w.order for w in walks})
        if walked != Counter(every) or not all(0 < walk.loss < math.inf for walk in walks):
            raise TunedError(f"{path}: some method lacks some settings on some order")
        file = str(path)
        found[file] = regrets(walks)
        if _names(found[file]) != _names(_first(found)):
            raise TunedError(f"{path}: has other methods or settings than {paths[0]}")
    return found, settings


def checks(paths: Sequence[str]) -> dict[str, list[Path]]:
    """The files of all sizes, under no suffix, and those of a largest size under its own.

    Example:
        >>> checks(["a.csv", "16:b.csv"])
        {'': [PosixPath('a.csv')], ',to=16': [PosixPath('b.csv')]}
    """
    found: dict[str, list[Path]] = {"": []}
    for text in paths:
        width, colon, path = text.partition(":")
        narrow = bool(colon) and width.isdigit()
        suffix = f",to={int(width)}" if narrow else ""
        found.setdefault(suffix, []).append(Path(path if narrow else text))
    if not found[""]:
        raise TunedError("no check is of all sizes")
    return found


def _names(found: Mapping[str, Mapping[str, float]]) -> dict[str, set[str]]:
    return {method: set(by) for method, by in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the regrets, writes the mode's settings and returns the exit status."""
    parser = Parser("bench/tuned.py", __doc__)
    for task in CHOICES["task"]:
        text = "checks of this task"
        parser.add_argument(f"--{task}", nargs="+", required=True, metavar="FILE", help=text)
    text = "mean regret up to which a method takes the settings of all"
    parser.add_argument("--tolerance", type=float, default=0.001, metavar="SHARE", help=text)
    parser.add_argument("--out", type=output, metavar="FILE.json", help="the mode's settings")
    args = parser.parse_args(argv)
    command = ["python", "bench/tuned.py", *(sys.argv[1:] if argv is None else argv)]
    written: dict[str, Any] = {"made_by": shlex.join(command)}
    try:
        for task in CHOICES["task"]:
            for suffix, paths in checks(getattr(args, task)).items():
                found, settings = load(paths)
                chosen = choose(found, 0.0 if suffix else args.tolerance)
                made = content(chosen, settings, suffix)
                if suffix:
                    written[task]["methods"] |= made["methods"]
                else:
                    written[task] = made
                print(f"{task}{suffix}")
                show(found, chosen)
    except (ConfigError, TunedError) as error:
        parser.error(str(error))
    if args.out:
        args.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
