"""bench/plot.py: its panels and its errors."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plot
import pytest
from harness.table import Row

from tests.bench.small import measured_row, run


@pytest.fixture
def result() -> dict[str, Any]:
    """Two batch sizes of two providers, as ``--out`` writes them."""
    rows = [
        measured_row(mode, provider, 2.0, ids=ids)
        for mode in ("forward", "backward", "both", "step adam")
        for provider in ("ours", "fixed")
        for ids in (500, 65_536)
    ]
    return {"conditions": ["device: x", "timing: y", "torch z"], "rows": list(map(asdict, rows))}


def size_of_png(path: Path) -> tuple[int, ...]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_plot_has_a_panel_per_table_and_mode(result: dict[str, Any], tmp_path: Path) -> None:
    # 3.9 x 3 inches a panel at 120 dots an inch, three side by side, and room for the legend.
    plot.plot(result, tmp_path / "four.png")
    assert size_of_png(tmp_path / "four.png") == (1476, 900)
    one = [r for r in result["rows"] if r["mode"] == "forward"]
    two = one + [{**r, "table": "other"} for r in one]
    plot.plot({**result, "rows": two}, tmp_path / "two.png")
    assert size_of_png(tmp_path / "two.png") == (540, 900)


def test_rows_are_read_from_json_again(result: dict[str, Any]) -> None:
    rows = json.loads(json.dumps(result))["rows"]
    assert [asdict(Row(**row)) for row in rows] == result["rows"]


def test_plot_from_a_shell(result: dict[str, Any], tmp_path: Path) -> None:
    source, target = tmp_path / "x.json", tmp_path / "x.png"
    source.write_text(json.dumps(result))
    done = run("plot.py", source, target)
    assert done.returncode == 0 and not done.stdout and not done.stderr
    assert size_of_png(target) == (1476, 900)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RESULT.json, FILE.png"),
        (["no.json", "x.png"], "No such file"),
        (["bad.json", "x.png"], "Expecting value"),
        (["empty.json", "x.png"], "no measured row of forward"),
        (["list.json", "x.png"], "list indices must be"),
        (["short.json", "x.png"], "list index out of range"),
        (["deep.json", "x.png"], "recursion"),
        (["empty.json", "no/x.png"], "cannot write no/x.png: No such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text('{"rows": []}')
    Path("bad.json").write_text("rows")
    Path("list.json").write_text("[]")
    row = json.dumps(asdict(measured_row("forward", "ours", 2.0, ids=500)))
    Path("short.json").write_text(f'{{"rows": [{row}], "conditions": []}}')
    Path("deep.json").write_text("[" * 200_000)
    with pytest.raises(SystemExit) as stop:
        plot.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and not Path("x.png").exists()
    assert message in err and err.count("\n") == 1
