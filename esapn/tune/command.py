"""``python -m esapn tune``: from its arguments to the settings chosen.

DIR/tune.json       what is tuned, and on which data
DIR/trials.csv      every walk, as soon as it is made
DIR/settings.json   the settings chosen, and by how much
DIR/tuning.png      quality over the settings tried
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from esapn_kernels import info

from ..cli import SHARED, check_extras, check_least, make_folder
from ..config import ConfigError
from ..data.ratings import Ratings
from ..jsonfile import load_json, write_json
from ..methods import method_settings
from ..run.loop import check_budget, device_of, stream_of
from ..run.processes import at_once, pool
from . import trials
from .choice import DEFAULT, SHARED_ROWS, choose, lines, shared_rows
from .figure import draw
from .schedule import Listed, Tuning
from .space import ranges
from .walk import Job, Part, Walked, config_of, part_of, walk

__all__ = ["DEFAULT_METHODS", "tune"]

DEFAULT_METHODS = (
    *("fixed-2", "fixed-4", "fixed-8", "fixed-16", "fixed-64", "fixed-128"),
    *("counts-6.25%", "counts-6.25%,hops=tails", "esapn", "esapn-dwell-0.5", "darts", "autoemb"),
    *("thresholds-16", "power-1"),
)


def tune(args: argparse.Namespace) -> int:
    """Make the walks that have no line yet, then choose; returns the exit status."""
    check_extras("scipy", *([] if args.check else ["optuna"]))
    check_least(1, trials=args.trials, orders=args.orders)
    check_least(0, workers=args.workers, first_order=args.first_order)
    processes = at_once(args.workers, device_of(args.device))
    part = _part(args)
    orders = list(range(args.first_order, args.first_order + args.orders))
    checked = {folder.name: _chosen(folder) for folder in args.check}
    tuned_there = next(iter(checked.values()), DEFAULT_METHODS)
    methods = list(dict.fromkeys(args.methods or tuned_there))
    first = {method: config_of(part, method, {}, orders[0]) for method in methods}
    ratings = part_of(part)
    stream = stream_of(next(iter(first.values())), ratings)
    for config in first.values():
        check_budget(config, stream)
    header = _header(args, part, ratings, orders, methods)
    lanes = -(-processes // len(methods))
    tuned: list[Listed] = []
    for method in methods:
        config = first[method]
        spans = ranges(config, method_settings(method)[1])
        if not spans:
            raise ConfigError(f"--methods: there is nothing to tune in '{method}'")
        if checked:
            default = {name: getattr(config, name) for name in spans}
            tuned.append(Listed(method, _candidates(method, default, checked), orders))
        else:
            tuned.append(
                Tuning(method, config, spans, trials=args.trials, orders=orders, at_once=lanes)
            )
    make_folder(args.out, "trials.csv")
    _keep_header(args.out / "tune.json", header)
    _walk_all(args.out / "trials.csv", tuned, part, processes)
    _finish(args.out, tuned, header, default=DEFAULT if checked else "0")
    return 0


def _part(args: argparse.Namespace) -> Part:
    names = [name for name in SHARED if name != "log_every"]
    common = {name: getattr(args, name) for name in names} | {"task": args.task}
    common["sizes"] = tuple(args.sizes)
    options = {n: getattr(args, n) for n in ("archive", "url", "cache", "malformed")}
    options = {name: value for name, value in options.items() if value is not None}
    options["five_classes"] = args.task == "multiclass"
    return Part(tuple(common.items()), tuple(options.items()))


def _header(
    args: argparse.Namespace,
    part: Part,
    ratings: Ratings,
    orders: Sequence[int],
    methods: Sequence[str],
) -> dict[str, Any]:
    common = {n: list(v) if isinstance(v, tuple) else v for n, v in part.common}
    return {
        "data": {
            "name": ratings.name,
            "sha256": ratings.checksum,
            "train_events": len(ratings.rating),
            "users": ratings.n_users,
            "items": ratings.n_items,
        },
        "common": common,
        "orders": list(orders),
        "methods": list(methods),
        "trials": args.trials,
        "check": [folder.name for folder in args.check],
        "command": shlex.join(["python", "-m", "esapn", *sys.argv[1:]]),
        "info": info.collect(),
    }


def _keep_header(path: Path, header: dict[str, Any]) -> None:
    """Write ``tune.json``, unless the folder holds trials of other data, settings or orders."""
    if path.exists():
        try:
            held = load_json(path)
            same = all(held[name] == header[name] for name in ("orders", "check"))
            same = same and held["data"]["sha256"] == header["data"]["sha256"]
            # Where the data lie may change: their checksum says what they are.
            others = {"data", "device"}
            same = same and all(
                held["common"][name] == value
                for name, value in header["common"].items()
                if name not in others
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} cannot be read: use another --out, or remove it") from None
        if not same:
            raise ConfigError(f"{path}: is of other data, settings or orders; use another --out")
    write_json(path, header)


def _chosen(folder: Path) -> dict[str, dict[str, Any]]:
    """Method to its settings of ``settings.json``."""
    path = folder / "settings.json"
    try:
        methods = load_json(path)["methods"]
        return {method: dict(about["settings"]) for method, about in methods.items()}
    except OSError as error:
        raise ConfigError(f"--check {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--check {path} holds no settings that were chosen") from None


def _candidates(
    method: str, default: Mapping[str, Any], checked: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Settings by their names: the mode's, those of every folder, and those with shared rows.

    Raises:
        ConfigError: a folder has not tuned the method, or not in the same settings.
    """
    found = {DEFAULT: dict(default)}
    for folder, chosen in checked.items():
        if set(chosen.get(method, ())) != set(default):
            raise ConfigError(f"--check {folder}: '{method}' was not tuned there, or not so")
        found[folder] = {name: chosen[method][name] for name in default}
    rows, folder = shared_rows(
        (settings, folder)
        for folder, chosen in sorted(checked.items())
        for settings in chosen.values()
    )
    if rows:
        found[SHARED_ROWS] = {**found[folder], **{n: v for n, v in rows.items() if n in default}}
    return found


def _walk_all(path: Path, tuned: Sequence[Listed], part: Part, processes: int) -> None:
    """All walks in processes of their own, under a bar; those of ``path`` are not made again."""
    from tqdm import tqdm

    of = {listed.method: listed for listed in tuned}
    for walked in trials.read(path):
        if walked.method in of and walked.order in of[walked.method].orders:
            of[walked.method].add(walked)
    layout = "{l_bar}{bar}| {n}/{total} walks [{elapsed}<{remaining}]{postfix}"
    with tqdm(bar_format=layout, initial=_made(tuned), total=_total(tuned)) as bar:

        def ended(walked: Walked) -> None:
            trials.append(path, walked)
            of[walked.method].add(walked)
            bar.total = _total(tuned)
            bar.set_postfix_str(f"{walked.method} {walked.trial}", refresh=False)
            bar.update(_made(tuned) - bar.n)

        if (first := _next(tuned)) is not None:
            _work(first, lambda: _next(tuned), ended, part, processes)


def _work(
    first: Job,
    next_job: Callable[[], Job | None],
    ended: Callable[[Walked], None],
    part: Part,
    processes: int,
) -> None:
    with pool(processes) as executor:
        running: set[Future[Walked]] = {executor.submit(walk, first, part)}
        while running:
            while len(running) < processes and (job := next_job()) is not None:
                running.add(executor.submit(walk, job, part))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                ended(future.result())
            if not running and (job := next_job()) is not None:
                running.add(executor.submit(walk, job, part))


def _next(tuned: Sequence[Listed]) -> Job | None:
    """Of the method that is furthest from its end."""
    for listed in sorted(tuned, key=lambda listed: listed.begun / max(listed.total, 1)):
        if (job := listed.next()) is not None:
            return job
    return None


def _made(tuned: Sequence[Listed]) -> int:
    return sum(len(walks) for listed in tuned for walks in listed.walks.values())


def _total(tuned: Sequence[Listed]) -> int:
    return sum(listed.total for listed in tuned)


def _finish(out: Path, tuned: Sequence[Listed], header: Mapping[str, Any], *, default: str) -> None:
    """Choose, write and say what was chosen."""
    choices = [c for listed in tuned if (c := choose(listed, default)) is not None]
    lost = [listed.method for listed in tuned if listed.method not in {c.method for c in choices}]
    names = ("data", "common", "orders", "check", "command")
    content = {name: header[name] for name in names}
    content["methods"] = {choice.method: choice.to_json() for choice in choices}
    write_json(out / "settings.json", content)
    task, data = header["common"]["task"], header["data"]["name"]
    draw(out / "tuning.png", tuned, f"{data}, {task}: validation loss over the settings tried")
    print("\n".join(lines(choices)))
    for method in lost:
        print(f"{method}: no trial ended with a finite loss")
    print(f"wrote {out / 'settings.json'}, {out / 'trials.csv'} and {out / 'tuning.png'}")
