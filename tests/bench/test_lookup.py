"""bench/lookup.py: what it prints and writes, and its errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lookup
import pytest
import torch
from harness import command
from harness.gate import GateError
from harness.timing import Timer

from tests.bench.small import BENCH, SMALL, run
from tests.helpers import install_command

ROWS = {size: rows // 100 for size, rows in lookup.PAPER_ROWS.items()}
"""The paper's mix of sizes, a hundredth of its rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lookup")


@pytest.fixture(scope="module")
def quick(folder: Path) -> tuple[str, dict[str, Any]]:
    """What one quick run printed, and what it wrote; its plot is beside that."""
    arguments = ["--quick", "--ids", "64", "--repeats", "3", "--seed", "5"]
    arguments += ["--out", str(folder / "x.json"), "--plot", str(folder / "x.png")]
    if torch.cuda.is_available():
        arguments += ["--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(lookup, "PAPER_ROWS", ROWS)
        assert lookup.main(arguments) == 0
    return text.getvalue(), json.loads((folder / "x.json").read_text())


def test_quick_json(quick: tuple[str, dict[str, Any]]) -> None:
    _, result = quick
    assert result["gate"] == {"passed": True, "tolerance": 5e-5}
    assert (
        result["complete"]
        and result["seed"] == 5
        and result["device"] == "cpu"
        and result["provenance"]["torch"]
    )
    assert any("torch.compile is left out" in note for note in result["notes"])
    seen = {(row["traffic"], row["mode"], row["provider"]) for row in result["rows"]}
    for traffic in ("uniform", "zipf"):
        for mode in ("forward", "backward", "both"):
            assert {(traffic, mode, name) for name in ("ours", "fixed", "eager")} <= seen
    for provider in ("ours", "eager"):
        assert ("promotion", "promote adam", provider) in seen
    for row in result["rows"]:
        assert row["repeats"] == 3 == len(row["samples_ms"])
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["gate_error"] <= (4e-3 if "bf16" in row["mode"] else 5e-5)
        assert row["memory_bytes"] > 0 and row["cold_bytes"] >= row["bytes"]
        roof = row["bytes"] / row["copy_gb_per_s"] / 1e6
        assert row["roof_ms"] == pytest.approx(roof)
        assert row["roof_share"] == pytest.approx(roof / row["median_ms"])
    assert result["facts"]["exact"]["runs"] == 20
    assert set(result["facts"]["exact"]["ours"].values()) == {20}
    # Nothing of 65,536 ids was measured, and no GPU was there.
    assert {goal["status"] for goal in result["goals"]} == {"needs a GPU", "not measured", "met"}


def test_quick_text(quick: tuple[str, dict[str, Any]]) -> None:
    text, result = quick
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    if not torch.cuda.is_available():
        assert lines.pop(0) == "no GPU found: measuring the CPU path"
    rows, distinct = sum(ROWS.values()), result["rows"][0]["distinct"]
    heading = f"ml-20m ({rows:,} rows), uniform, 64 ids ({distinct} distinct); copy "
    assert lines[0].startswith(heading)
    assert sum(" ours " in line and "1.00x" in line for line in lines) >= 12
    for condition in result["conditions"]:
        assert condition in lines


def test_quick_plot(quick: tuple[str, dict[str, Any]], folder: Path) -> None:
    header = (folder / "x.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert width > 300 and height > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--ids", "5", "0"], "argument --ids: must be at least 1, got 0"),
        (["--ids", "many"], "argument --ids: invalid int value: 'many'"),
        (["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        (["--seed", "-1"], "argument --seed: must be in [0, 2**63), got -1"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
        (["--out", "/"], "cannot write /: Is a directory"),
    ],
)
def test_user_errors(capsys: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        lookup.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out and message in err and err.count("\n") == 1


def test_without_matplotlib(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        lookup.main(["--plot", "x.png"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "argument --plot: needs matplotlib; " in line
    assert install_command(line) == ["pip", "install", "esapn-kernels[bench]"]


def test_user_error_from_a_shell() -> None:
    device = "none" if torch.cuda.is_available() else "cuda"
    done = run("lookup.py", "--device", device)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("bench/lookup.py: error: argument --device: ")
    assert done.stderr.count("\n") == 1


def test_out_is_not_left_behind_by_the_check(tmp_path: Path) -> None:
    lookup.parse(["--out", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "old.json").write_text("old")
    lookup.parse(["--out", str(tmp_path / "old.json")])
    assert (tmp_path / "old.json").read_text() == "old"


def test_no_timing_is_printed_when_the_gate_fails(monkeypatch: Any, capsys: Any) -> None:
    def refuse(*_: Any) -> float:
        raise GateError("ours: outputs off by 1.0e+00")

    monkeypatch.setattr(lookup, "PAPER_ROWS", SMALL)
    monkeypatch.setattr("harness.lookups.check", refuse)
    monkeypatch.setattr(Timer, "sample", lambda *_: pytest.fail("timed"))
    assert lookup.main(["--quick", "--device", "cpu", "--ids", "9"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1] == "not timed: ours: outputs off by 1.0e+00"


def test_out_has_every_workload_as_soon_as_it_is_measured(tmp_path: Path, monkeypatch: Any) -> None:
    """And the gate's word where it ends the run."""
    out = tmp_path / "x.json"
    out.write_text("of an earlier run")
    found = []
    measure = lookup.measure_lookups

    def measured(workload: Any, *rest: Any) -> Any:
        found.append(json.loads(out.read_text()))
        if len(found) == 2:
            raise GateError("ours: outputs off by 1.0e+00")
        return measure(workload, *rest)

    monkeypatch.setattr(lookup, "PAPER_ROWS", SMALL)
    monkeypatch.setattr(lookup, "measure_lookups", measured)
    arguments = ["--quick", "--device", "cpu", "--ids", "9", "--repeats", "1", "--out", str(out)]
    assert lookup.main(arguments) == 1
    before, partial = found
    assert not before["complete"] and not before["rows"]
    assert partial["gate"]["passed"] and not partial["complete"]
    ended = json.loads(out.read_text())
    assert not ended["gate"]["passed"] and not ended["complete"]
    assert ended["notes"][-1].endswith("ours: outputs off by 1.0e+00")
    assert ended["rows"] == partial["rows"]
    assert {row["traffic"] for row in ended["rows"]} == {"uniform"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_matplotlib_is_needed_for_plots_only() -> None:
    program = "import sys; sys.modules['matplotlib'] = None; import lookup; lookup.parse([])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
