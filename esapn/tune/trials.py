"""The trials of a folder: every walk as a line of ``trials.csv``, written as soon as it is made."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .space import SETTINGS
from .walk import Walked

__all__ = ["COLUMNS", "append", "mend", "read"]

_LOSSES = ("quarter_1", "quarter_2", "quarter_3", "validation")
COLUMNS = (
    *("method", "trial", "order", *SETTINGS, *_LOSSES),
    *("accuracy", "serving_bytes", "seconds"),
)
_HEADING = ",".join(COLUMNS)


def append(path: Path, walked: Walked) -> None:
    """Add a line, and the heading to a new file; a loss that was not reached is empty."""
    values: dict[str, Any] = {"method": walked.method, "trial": walked.trial}
    values |= {"order": walked.order, **walked.settings}
    values |= dict(zip(_LOSSES, map(repr, walked.losses), strict=False))
    values |= {"accuracy": f"{walked.accuracy:.5f}", "serving_bytes": walked.serving}
    values |= {"seconds": f"{walked.seconds:.1f}"}
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        lines.writeheader()
    lines.writerow(values)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())


def read(path: Path) -> list[Walked]:
    """The walks of a file; none if there is none. A last line that was cut off is left out.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        text = path.read_bytes().decode()
        lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True)
        if text and tuple(lines.fieldnames or COLUMNS) != COLUMNS:
            raise ValueError
        if not lines.fieldnames and not _HEADING.startswith(text):
            raise ValueError
        return [_walked(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, OverflowError, csv.Error):
        raise ConfigError(f"{path} cannot be read as trials") from None


def mend(path: Path) -> None:
    """Cut off what is left of a last line, so that lines can be appended."""
    if path.exists() and not (held := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, held.rfind(b"\n") + 1)


def _walked(line: Mapping[str, str]) -> Walked:
    if set(line) != set(COLUMNS) or None in line.values():
        raise ValueError
    losses = [float(line[name]) for name in _LOSSES if line[name]]
    settings = {
        name: int(line[name]) if span.whole else float(line[name])
        for name, span in SETTINGS.items()
        if line[name]
    }
    whole = bool(losses) and all(line[name] for name in _LOSSES[: len(losses)])
    if not whole or not settings or not all(map(math.isfinite, settings.values())):
        raise ValueError
    return Walked(
        line["method"],
        line["trial"],
        int(line["order"]),
        settings,
        tuple(losses),
        float(line["accuracy"]),
        int(line["serving_bytes"]),
        float(line["seconds"]),
    )
