"""What the commands share: a mistake is one line, values are checked, a result is a JSON file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        default = str(action.default).replace("%", "%%")
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, without the usage; its status is 2."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}".replace("\n", " ") + "\n")


def at_least(least: int) -> Callable[[str], int]:
    """The ``type`` of a flag whose value is an integer, not below ``least``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    integer.__name__ = "int"  # argparse says "invalid int value"
    return integer


def seed(text: str) -> int:
    """The ``type`` of ``--seed``."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {value}")
    return value


seed.__name__ = "int"


def _paths(path: Path) -> tuple[Path, Path]:
    """Where a result ends, and what it is first written to: a file beside it.

    What is no file, such as ``/dev/stdout``, is written to at once.
    """
    end = path.resolve()
    return end, end if end.exists() and not end.is_file() else end.with_name(end.name + ".part")


def check_writable(path: Path) -> None:
    """Raises ``OSError`` if a result cannot be written to ``path``; leaves no file behind."""
    for each in _paths(path):
        existed = each.exists()
        with each.open("a"):
            pass
        if not existed:
            each.unlink()


def output(text: str) -> Path:
    """The ``type`` of a flag that names a file to write."""
    path = Path(text)
    try:
        check_writable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}") from None
    return path


def picture(text: str) -> Path:
    """The ``type`` of a flag that names a PNG to draw."""
    if find_spec("matplotlib") is None:
        how = "pip install 'esapn-kernels[bench]'"
        raise argparse.ArgumentTypeError(f"needs matplotlib; to install: {how}")
    return output(text)


def record(benchmark: str, **values: Any) -> dict[str, Any]:
    """The result of a benchmark that ends now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"benchmark": benchmark, "time": now, **values}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """A reader of ``path`` finds the result of before, or this one, never a part."""
    end, beside = _paths(path)
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if beside != end:
        os.replace(beside, end)
