"""``report.html`` of a comparison: one file with its figures inside, which fetches nothing.

Every number and every sentence of the page is computed from the records.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from ..config import SearchConfig
from ..data.ratings import SIDES
from . import figures
from .formats import plain
from .records import Comparison, Group, Record, load
from .summary import summary
from .tables import (
    PageTable,
    bytes_table,
    contrast_tables,
    cost_table,
    measure_table,
    method_table,
    result_table,
    size_table,
)

__all__ = ["render", "write"]


TASKS = {"binary": "binary", "multiclass": "five classes"}
MODES = {"paper": "published setting", "tuned": "settings found"}


@dataclass
class Part:
    """What the page shows of one group."""

    title: str
    anchor: str
    summary: list[str]
    results: PageTable | None = None
    first: dict[str, str] | None = None
    tables: list[PageTable] = field(default_factory=list)
    memory: list[PageTable] = field(default_factory=list)
    drawn: list[dict[str, str]] = field(default_factory=list)


def write(folder: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` of the comparison in ``folder``.

    Args:
        folder: holds ``compare.json`` and ``runs/``; the page names the runs that are missing.

    Returns:
        The page's path.

    Raises:
        ReportError: ``folder`` holds no readable comparison; nothing is written.

    Example:
        >>> write(Path("nowhere"))
        Traceback (most recent call last):
        esapn.compare.records.ReportError: nowhere: no compare.json; is it a comparison's folder?
    """
    comparison = load(folder)
    drawn = [figures.draw(comparison, group, folder / "figures") for group in comparison.groups]
    path = folder / "report.html"
    path.write_text(render(comparison, drawn), encoding="utf-8")
    return path


def render(comparison: Comparison, drawn: Sequence[Sequence[figures.Drawn]]) -> str:
    """The page's text; ``drawn`` holds the figures of every group of the comparison."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    header, data = comparison.header, comparison.header["data"]
    parts = [_part(group, mine) for group, mine in zip(comparison.groups, drawn, strict=True)]
    planned = len(comparison.records) + len(comparison.missing) + len(comparison.not_finite)
    return environment.get_template("page.html").render(
        name=data.get("name", "data"),
        order=header.get("order", "?"),
        seeds=", ".join(map(str, header["seeds"])),
        finished=len(comparison.records),
        planned=planned,
        missing=comparison.missing,
        not_finite=comparison.not_finite,
        parts=parts,
        conditions=_conditions(comparison),
        methods=method_table(comparison),
        shared=_shared_settings(comparison),
        configs=_method_settings(comparison),
    )


def _part(group: Group, drawn: Sequence[figures.Drawn]) -> Part:
    title = f"{TASKS.get(group.task, group.task)}, {MODES.get(group.mode, group.mode)}"
    anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    part = Part(title, anchor, summary(group))
    if group.records:
        part.results = result_table(group)
        part.tables = [*contrast_tables(group), measure_table(group), cost_table(group)]
        part.memory = [*(size_table(group, side) for side in SIDES), bytes_table(group)]
    for picture in drawn:
        encoded = base64.b64encode(picture.path.read_bytes()).decode("ascii")
        part.drawn.append(
            {"title": picture.title, "caption": picture.caption, "file": picture.path.name}
            | {"source": f"data:image/png;base64,{encoded}"}
        )
    if part.drawn:
        part.first = part.drawn.pop(0)
    return part


def _conditions(comparison: Comparison) -> list[tuple[str, str]]:
    """Data, order, seeds, versions and machine, as names and values."""
    header = comparison.header
    rows = [(f"data: {name}", plain(value)) for name, value in header["data"].items()]
    rows += [("order", str(header.get("order", "?"))), ("seeds", plain(header["seeds"]))]
    rows += [("started", str(header.get("started", "?")))]
    rows += [(str(name), plain(value)) for name, value in header.get("info", {}).items()]
    others = {json.dumps(r.content.get("info"), sort_keys=True) for r in comparison.records}
    if len(others) > 1:
        rows.append(("versions and machines among the runs", f"{len(others)} that differ"))
    return rows


def _settings(record: Record) -> dict[str, Any]:
    """All settings of a run, also if an earlier version made it."""
    return SearchConfig.complete(record.content["config"])


def _shared_settings(comparison: Comparison) -> dict[str, str]:
    """The settings that every run has the same value of."""
    configs = [_settings(record) for record in comparison.records]
    first = configs[0] if configs else {}
    return {
        name: json.dumps(value)
        for name, value in first.items()
        if all(name in config and config[name] == value for config in configs)
    }


def _method_settings(comparison: Comparison) -> list[tuple[str, str]]:
    """Of every task and method, the settings that not every run shares, without the seed."""
    shared = {"seed"} | _shared_settings(comparison).keys()
    result = []
    for group in comparison.groups:
        for method in group.methods:
            records = group.of(method.label)
            if not records:
                continue
            configs = [_settings(record) for record in records]
            own = [{k: v for k, v in config.items() if k not in shared} for config in configs]
            title = f"{method.label} ({group.task}, {group.mode})"
            if any(settings != own[0] for settings in own):
                title += f": settings differ among its seeds, these are of seed {records[0].seed}"
            result.append((title, json.dumps(own[0], indent=1)))
    return result
