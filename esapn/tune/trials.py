"""The trials of a folder: every walk as a line of ``trials.csv``, written as soon as it is made."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .space import SETTINGS, rounded
from .walk import Walked

__all__ = ["COLUMNS", "append", "read"]

_LOSSES = ("quarter_1", "quarter_2", "quarter_3", "validation")
COLUMNS = (
    *("method", "trial", "order", *SETTINGS, *_LOSSES),
    *("accuracy", "serving_bytes", "seconds"),
)


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
    """The walks of a file; none if there is none. What is left of a line cut off is removed.

    Raises:
        ConfigError: it is no such file.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        lines = csv.DictReader(io.StringIO(whole), strict=True)
        if whole and tuple(lines.fieldnames or ()) != COLUMNS:
            raise ValueError
        return [_walked(line) for line in lines]
    except (ValueError, TypeError, csv.Error):
        raise ConfigError(f"{path} cannot be read: use another --out, or remove it") from None


def _walked(line: Mapping[str, str]) -> Walked:
    losses = [float(line[name]) for name in _LOSSES if line[name]]
    return Walked(
        line["method"],
        line["trial"],
        int(line["order"]),
        {name: rounded(name, float(line[name])) for name in SETTINGS if line[name]},
        tuple(losses),
        float(line["accuracy"] or math.nan),
        int(line["serving_bytes"]),
        float(line["seconds"]),
    )
