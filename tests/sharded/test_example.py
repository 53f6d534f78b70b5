"""examples/sharded.py as torchrun starts it: killed, and gone on with on other numbers of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "sharded.py"


def run(out: Path, ranks: int, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), str(EXAMPLE),
         "--out", str(out), "--save-every", "10", *arguments],
        capture_output=True,
        text=True,
    )  # fmt: skip


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    whole = run(tmp_path / "whole", 2, "--steps", "45")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", 2, "--steps", "45", "--kill-at", "27", restarts=1)
    assert killed.returncode == 0, killed.stderr
    assert "step 20: goes on from" in killed.stdout
    expected, found = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert abs(found.pop("log_loss") - expected.pop("log_loss")) < 1e-5
    assert found == expected
    assert all(a <= b for a, b in zip(found["bytes"], found["budget"], strict=True))
    assert found["rows"]["8"] > 0

    for ranks, steps in ((2, 20), (3, 45)):
        part = run(tmp_path / "parts", ranks, "--steps", str(steps))
        assert part.returncode == 0, part.stderr
    assert "step 20: goes on from" in part.stdout
    assert (
        abs(result(tmp_path / "parts")["log_loss"] - result(tmp_path / "whole")["log_loss"]) < 1e-4
    )
    assert not list(tmp_path.glob("*/*.part"))


def test_without_restarts_a_killed_run_fails(tmp_path):
    assert run(tmp_path, 2, "--steps", "5", "--kill-at", "2").returncode != 0


def test_mistakes_are_told_in_a_line(tmp_path):
    for arguments, said in (
        (["--steps", "0"], "--steps and --save-every must be at least 1"),
        (["--budget", "1 kB"], "error: max_bytes_per_rank: a budget of 1000 bytes does not hold"),
    ):
        found = run(tmp_path, 1, *arguments)
        assert found.returncode != 0
        assert said in found.stderr
    alone = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert alone.returncode == 2
    assert "start it by torchrun" in alone.stderr
