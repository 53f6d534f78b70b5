"""The mode ``tuned`` out of checked settings: one set for all methods, others where it fails one.

    python bench/tuned.py bench/results/tune-check-*.csv [--out esapn/tuned.json]

A FILE is the ``trials.csv`` of a ``python -m esapn tune --check DIR ...``: every method on orders
that nobody chose on, with the mode's settings (``default``), with those chosen for it on the same
data (``own``) and with the rows' settings of every DIR, each beside what that DIR chose for the
method itself. For every file and method

    regret of settings = their mean loss / the least mean loss of the method's settings - 1

1. The mode has the rows' settings of the DIR with the least regret, in the mean over all files and
   methods.
2. A method whose mean regret over all files is above --tolerance with these has those of the DIR
   that serves it best, if they cut it by half.
3. A method's own settings are those of the DIR that it has its rows' settings from.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.command import Parser, output

from esapn.config import ConfigError
from esapn.errors import UserError
from esapn.methods import method_settings
from esapn.tune.space import ROWS
from esapn.tune.trials import read
from esapn.tune.walk import Walked

# Not settings that were shared: they are no candidates.
OWN, DEFAULT = "own", "default"
Regrets = dict[str, dict[str, dict[str, float]]]  # file, method, settings


class TunedError(UserError):
    """Files that hold no check, or not the same one; one line."""


def regrets(walks: Sequence[Walked]) -> dict[str, dict[str, float]]:
    """Method to the regret of each of its settings, by the names of these.

    Example:
        >>> walks = [
        ...     Walked("fixed-2", label, 3, {"row_lr": 0.1}, (1.0, 1.0, 1.0, loss), 0.5, 8, 1.0)
        ...     for label, loss in [("default", 0.3), ("own", 0.2), ("here", 0.25)]
        ... ]
        >>> {k: round(v, 3) for k, v in regrets(walks)["fixed-2"].items()}
        {'default': 0.5, 'own': 0.0, 'here': 0.25}
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


def choose(
    found: Regrets, settings: Mapping[tuple[str, str], Mapping[str, Any]], tolerance: float
) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The DIR that serves all, those of methods that it does not serve, and the mode's settings."""
    methods = list(next(iter(found.values())))
    names = [n for n in next(iter(found.values()))[methods[0]] if n not in (OWN, DEFAULT)]

    def total(name: str) -> float:
        return statistics.mean(over_files(found, method, name) for method in methods)

    shared = min(names, key=total)
    # A mode has settings for a method, whatever its size or its hops.
    families: dict[str, list[str]] = {}
    for method in methods:
        families.setdefault(method_settings(method)[0], []).append(method)
    apart: dict[str, str] = {}
    content: dict[str, Any] = {"settings": {}, "methods": {}}
    content["settings"] |= {name: settings[methods[0], shared][name] for name in ROWS}
    used = [name for method in methods for name in {*settings[method, shared]} - {*ROWS}]
    for family, members in families.items():

        def regret(name: str, members: Sequence[str] = members) -> float:
            return statistics.mean(over_files(found, method, name) for method in members)

        best = min(names, key=regret)
        if regret(shared) > tolerance and regret(best) < regret(shared) / 2:
            apart[family] = best
        taken = apart.get(family, shared)
        own: dict[str, Any] = {}
        for method in members:
            # Those without more settings by name come first: they stand for the family.
            for name, value in settings[method, taken].items():
                own.setdefault(name, value)
        for name, value in own.items():
            only = sum(n == name for n in used) <= len(members) and name not in ROWS
            if only and any(name in settings[m, shared] for m in members):
                content["settings"][name] = value
            elif name not in ROWS or family in apart:
                content["methods"].setdefault(family, {})[name] = value
    return shared, apart, content


def show(found: Regrets, shared: str) -> None:
    """Print the regrets, in thousandths of the least loss."""
    for file, by in found.items():
        names = list(next(iter(by.values())))
        print(f"{file}: regret in thousandths of the method's least loss")
        print(f"  {'method':<26}" + "".join(f"{name:>12}" for name in names))
        for method, each in by.items():
            print(f"  {method:<26}" + "".join(f"{1000 * each[name]:>12.2f}" for name in names))
    print(f"shared by all methods: those of {shared}")


def load(paths: Sequence[Path]) -> tuple[Regrets, dict[tuple[str, str], dict[str, Any]]]:
    """The regrets of every file, and the settings by method and name.

    Raises:
        TunedError: a file that holds no check, or another one than the first.
    """
    found: Regrets = {}
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        walks = read(path)
        names = {walk.trial for walk in walks}
        if not {OWN, DEFAULT} <= names or len(names) < 3:
            raise TunedError(f"{path}: holds no settings that were checked")
        of_methods = {walk.method: set[str]() for walk in walks}
        for walk in walks:
            of_methods[walk.method].add(walk.trial)
            key = walk.method, walk.trial
            if (
                walk.trial not in (OWN, DEFAULT)
                and settings.setdefault(key, dict(walk.settings)) != walk.settings
            ):
                raise TunedError(f"{path}: '{walk.trial}' has other settings than in a file before")
        if any(of != names for of in of_methods.values()):
            raise TunedError(f"{path}: lacks some settings of some methods")
        found[path.stem] = regrets(walks)
        first = next(iter(found.values()))
        if {m: set(by) for m, by in found[path.stem].items()} != {
            m: set(by) for m, by in first.items()
        }:
            raise TunedError(f"{path}: has other methods or settings than {paths[0]}")
    return found, settings


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the regrets, writes the mode's settings and returns the exit status."""
    parser = Parser("bench/tuned.py", __doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE")
    text = "mean regret up to which a method takes the settings of all"
    parser.add_argument("--tolerance", type=float, default=0.001, metavar="SHARE", help=text)
    parser.add_argument("--out", type=output, metavar="FILE.json", help="the mode's settings")
    args = parser.parse_args(argv)
    try:
        found, settings = load(args.paths)
    except (ConfigError, TunedError) as error:
        parser.error(str(error))
    shared, apart, content = choose(found, settings, args.tolerance)
    show(found, shared)
    for family, name in apart.items():
        print(f"{family} alone: those of {name}")
    command = ["python", "bench/tuned.py", *map(str, args.paths)]
    content = {"made_by": " ".join([*command, "--out", "esapn/tuned.json"]), **content}
    print(json.dumps(content, indent=2))
    if args.out:
        args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
