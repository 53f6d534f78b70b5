"""A comparison's folder as it is read: ``compare.json`` and the records of its finished runs.

Comparison   the folder: its header, its groups, the planned runs without a record
Group        one task in one mode: its methods and their records
Record       one finished run
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..jsonfile import load_json
from .intervals import Interval, mean_interval, paired_difference, pareto_front
from .jobs import record_name

__all__ = [
    "BYTES",
    "MEASURED",
    "Comparison",
    "Group",
    "Method",
    "Record",
    "ReportError",
    "is_finite",
    "load",
]

HEADER = {"data": dict, "tasks": list, "modes": list, "seeds": list, "methods": list}
HEADER |= {"reference": dict}
RECORD = {"test": dict, "bytes": dict, "memory": dict, "config": dict}
MEASURED = ("loss", "accuracy")
BYTES = ("serving", "serving_peak", "serving_mean", "training", "fixed128")


class ReportError(ConfigError):
    """A folder that holds no readable comparison; one line."""


@dataclass(frozen=True)
class Record:
    """One finished run; ``content`` is what its file holds."""

    task: str
    mode: str
    label: str
    family: str
    seed: int
    content: Mapping[str, Any]

    def value(self, name: str) -> float | None:
        """A number of the test part, of ``bytes`` or of the run as a whole; None if not finite."""
        for place in (self.content["test"], self.content["bytes"], self.content):
            if name in place:
                found = place[name]
                return float(found) if is_finite(found) else None
        return None

    def number(self, name: str) -> float:
        """``value`` of a number that :func:`load` has checked."""
        found = self.value(name)
        assert found is not None
        return found


@dataclass(frozen=True)
class Method:
    """A method as ``compare.json`` lists it."""

    label: str
    family: str
    mode: str
    text: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """One task in one mode: its methods, their records and the reference's label."""

    task: str
    mode: str
    methods: tuple[Method, ...]
    records: tuple[Record, ...]
    reference: str | None

    @property
    def loss_name(self) -> str:
        """The loss of the task in words."""
        return "MSE" if self.task == "binary" else "cross-entropy"

    def of(self, label: str) -> list[Record]:
        """The records of a method, by seed."""
        return [record for record in self.records if record.label == label]

    def values(self, label: str, name: str) -> dict[int, float]:
        """Seed to a method's number, for the seeds whose record has it."""
        found = {record.seed: record.value(name) for record in self.of(label)}
        return {seed: value for seed, value in found.items() if value is not None}

    def interval(self, label: str, name: str) -> Interval | None:
        """Mean of a method's number over the seeds that have it; None if no seed has."""
        values = self.values(label, name).values()
        return mean_interval(values) if values else None

    def mean(self, label: str, name: str) -> float:
        """Mean over seeds of a number that every record has."""
        return mean_interval(record.number(name) for record in self.of(label)).mean

    def standing(self, label: str) -> float:
        """The mean loss that a method is ranked by.

        Seeds differ more than methods do. A method whose seeds are not the reference's stands at
        the reference's mean loss plus the mean difference to it over their common seeds.
        """
        mine = self.values(label, "loss")
        reference = self.values(self.reference or "", "loss")
        common = mine.keys() & reference.keys()
        if not common or mine.keys() == reference.keys():
            return self.mean(label, "loss")
        return mean_interval(reference.values()).mean + paired_difference(mine, reference).mean

    @property
    def finished(self) -> list[Method]:
        """The methods with a record, by their standing."""
        done = {record.label for record in self.records}
        methods = [method for method in self.methods if method.label in done]
        return sorted(methods, key=lambda method: self.standing(method.label))

    @property
    def reference_method(self) -> Method | None:
        """The reference, if it has a record."""
        return next((m for m in self.finished if m.label == self.reference), None)

    @property
    def families(self) -> dict[str, list[Method]]:
        """Family to its finished methods by their mean bytes; families in the order planned."""
        done = {method.label for method in self.finished}
        families: dict[str, list[Method]] = {}
        for method in self.methods:
            if method.label in done:
                families.setdefault(method.family, []).append(method)
        for members in families.values():
            members.sort(key=lambda method: self.mean(method.label, "serving"))
        return families

    @property
    def front(self) -> list[str]:
        """Labels on the front of standing over mean serving bytes, from few bytes to many."""
        labels = [method.label for method in self.finished]
        points = [(self.mean(x, "serving"), self.standing(x)) for x in labels]
        return [labels[i] for i in pareto_front(points)]


@dataclass(frozen=True)
class Comparison:
    """What a folder holds of a planned comparison.

    ``missing`` names the planned runs without a record, ``not_finite`` those that ended without a
    finite loss; no mean includes them.
    """

    header: Mapping[str, Any]
    groups: tuple[Group, ...]
    methods: tuple[Method, ...]
    missing: tuple[str, ...]
    not_finite: tuple[str, ...]

    @property
    def records(self) -> list[Record]:
        """The records of every group."""
        return [record for group in self.groups for record in group.records]


def load(folder: Path) -> Comparison:
    """Read ``compare.json`` and the records of the runs that it plans.

    Args:
        folder: ``--out`` of a comparison; other files in it are left alone.

    Raises:
        ReportError: no ``compare.json``, or a file that is broken, lacks a part or belongs to
            other data.

    Example:
        >>> load(Path("nowhere"))
        Traceback (most recent call last):
        esapn.compare.records.ReportError: nowhere: no compare.json; is it a comparison's folder?
    """
    header = _read(folder / "compare.json", HEADER)
    try:
        methods = tuple(
            Method(m["label"], m["family"], m["mode"], m.get("text", ""), m.get("options", {}))
            for m in header["methods"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{folder / 'compare.json'}: methods: {error!r}") from error
    groups, missing, not_finite = [], [], []
    for task, mode in product(header["tasks"], header["modes"]):
        mine, records = tuple(m for m in methods if m.mode == mode), []
        for method, seed in product(mine, header["seeds"]):
            name = record_name(task, mode, method.label, seed)
            path = folder / "runs" / f"{name}.json"
            if not path.is_file():
                missing.append(name)
                continue
            content = _read_record(path, header["data"])
            if all(is_finite(content["test"][measure]) for measure in MEASURED):
                records.append(Record(task, mode, method.label, method.family, seed, content))
            else:
                not_finite.append(name)
        reference = header["reference"].get(mode)
        groups.append(Group(task, mode, mine, tuple(records), reference))
    return Comparison(header, tuple(groups), methods, tuple(missing), tuple(not_finite))


def _read(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    try:
        content = load_json(path)
    except FileNotFoundError as error:
        raise ReportError(f"{path.parent}: no {path.name}; is it a comparison's folder?") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: not readable as JSON: {error}") from error
    held = content if isinstance(content, dict) else {}
    lacking = [key for key, kind in keys.items() if not isinstance(held.get(key), kind)]
    if lacking:
        raise ReportError(f"{path}: lacks {', '.join(lacking)}")
    return held


def _read_record(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    content = _read(path, RECORD)
    lacking = [key for key in MEASURED if key not in content["test"]]
    lacking += [f"bytes {key}" for key in BYTES if not is_finite(content["bytes"].get(key))]
    if lacking:
        raise ReportError(f"{path}: lacks {', '.join(lacking)}")
    if content["bytes"]["serving"] <= 0:
        raise ReportError(f"{path}: serving bytes must be positive")
    own = content.get("data", data)
    checksum = own.get("sha256", data.get("sha256")) if isinstance(own, dict) else None
    if checksum != data.get("sha256"):
        raise ReportError(f"{path}: run on other data than compare.json names")
    return content


def is_finite(value: Any) -> bool:
    """Whether a value of a record is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)
