"""The command line in this process, and small data for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from esapn.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--events", "600", "--batch-size", "50", "--hidden", "8"]
SMALL += ["--policy-hidden", "8", "--max-frequency", "16"]
CSV = "user,item,rating,timestamp\n"
ROWS = "".join(f"{t % 7},{t % 5},{t % 10 / 2 + 0.5},{t}\n" for t in range(300))


def run(command: str, *arguments: object) -> int:
    """``main`` in this process; argparse leaves by SystemExit."""
    try:
        return main([command, *map(str, arguments)])
    except SystemExit as leave:
        return int(leave.code or 0)


def search(*arguments: object) -> int:
    return run("search", *arguments)


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake gives."""
    assert search(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert re.match(r"python -m esapn( search)?: error: \S", captured.err)
    return captured.err
