"""What a folder of trials is of, and what was chosen in others.

tune.json       the data, the settings of all walks, the orders, and the command
settings.json   the settings chosen
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..jsonfile import load_json, write_json
from .choice import DEFAULT, SHARED_ROWS, shared_rows

__all__ = ["Chosen", "candidates", "check_header", "chosen_in", "keep_header"]


@dataclass(frozen=True)
class Chosen:
    """What was chosen in a folder: settings by method, on which orders."""

    methods: Mapping[str, Mapping[str, Any]]
    orders: Sequence[int]


def chosen_in(folders: Sequence[Path]) -> dict[str, Chosen]:
    """Folder's name to what was chosen in it.

    Raises:
        ConfigError: a folder without a choice, or two of one name.
    """
    found: dict[str, Chosen] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in found or name in ("", DEFAULT, SHARED_ROWS):
            raise ConfigError(f"--check {folder}: name it otherwise; '{name}' names other settings")
        found[name] = _chosen(folder)
    return found


def _chosen(folder: Path) -> Chosen:
    path = folder / "settings.json"
    try:
        held = load_json(path)
        orders = [int(order) for order in held["orders"]]
        methods = {m: _numbers(about["settings"]) for m, about in held["methods"].items()}
    except OSError as error:
        raise ConfigError(f"--check {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--check {path} holds no settings that were chosen") from None
    if not methods:
        raise ConfigError(f"--check {path} holds no settings that were chosen")
    return Chosen(methods, orders)


def _numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    if not settings or not all(math.isfinite(value) for value in settings.values()):
        raise ValueError
    return dict(settings)


def candidates(
    method: str, default: Mapping[str, Any], checked: Mapping[str, Chosen]
) -> dict[str, dict[str, Any]]:
    """Settings of a method by their names: the mode's, those of every folder, shared rows'.

    The rows' settings that all methods share come with what their folder chose for the method.

    Raises:
        ConfigError: a folder has not tuned the method, or not in the same settings.
    """
    found = {DEFAULT: dict(default)}
    for folder, chosen in checked.items():
        if set(chosen.methods.get(method, ())) != set(default):
            raise ConfigError(f"--check {folder}: '{method}' was not tuned there, or not so")
        found[folder] = {name: chosen.methods[method][name] for name in default}
    rows, source = shared_rows(
        (settings, folder)
        for folder, chosen in sorted(checked.items())
        for settings in chosen.methods.values()
    )
    if rows:
        found[SHARED_ROWS] = {**found[source], **{n: v for n, v in rows.items() if n in default}}
    return found


def check_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Refuse a folder with trials of other data, settings or orders.

    Raises:
        ConfigError: it is one, or nothing says what its trials are of.
    """
    path = folder / "tune.json"
    if not path.exists():
        if (folder / "trials.csv").exists():
            raise ConfigError(f"{folder} has trials, but no tune.json: use another --out")
        return
    try:
        held = load_json(path)
        same = all(held[name] == header[name] for name in ("orders", "check"))
        same = same and held["data"]["sha256"] == header["data"]["sha256"]
        # Where the data lie may change: their checksum says what they are.
        others = {"data", "device"}
        common = {n: v for n, v in header["common"].items() if n not in others}
        same = same and all(held["common"][name] == value for name, value in common.items())
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} cannot be read: use another --out") from None
    if not same:
        raise ConfigError(f"{path}: is of other data, settings or orders; use another --out")


def keep_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write ``tune.json``."""
    write_json(folder / "tune.json", dict(header))
