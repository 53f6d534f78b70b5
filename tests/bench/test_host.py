"""bench/host.py: what it counts and writes, in a process whose kernels are not interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import host
import pytest

from esapn_kernels.ops.backend import TRITON_ERROR
from tests.bench.small import BENCH

FORWARD = ["_compose_kernel", "_lookup_fwd_kernel"]
BACKWARD = [
    "_few_runs_kernel",
    "_sums_kernel",
    "_chain_kernel",
    "_rows_kernel",
    "_compose_bwd_kernel",
]
PROMOTE = ["_claim_kernel", "_scan_kernel", "_move_kernel"]
TINY = """
import sys
sys.path.insert(0, sys.argv[1])
import host
host.SIZES, host.ROWS, host.CALLS = (2, 16), 40, 2
sys.exit(host.main(sys.argv[2:]))
"""


@pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
def test_a_run(tmp_path):
    out = tmp_path / "x.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCH.parent), env.get("PYTHONPATH")]))
    arguments = ["--ids", "300", "--turns", "2", "--seed", "3", "--out", str(out)]
    command = [sys.executable, "-c", TINY, str(BENCH), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(out.read_text())
    assert result["benchmark"] == "host" and result["provenance"]["triton"]
    assert [result[name] for name in ("ids", "table_rows", "turns", "calls")] == [300, 40, 2, 2]
    assert {row["call"]: row["launches"] for row in result["rows"]} == {
        "forward, no_grad": FORWARD,
        "forward": FORWARD,
        "forward and backward, dense": FORWARD + BACKWARD,
        "forward and backward, SGD": FORWARD + BACKWARD,
        "forward and backward, Adam": FORWARD + BACKWARD,
        "promote, Adam": PROMOTE,
    }
    rules = [None, None, "gradient", "sgd", "adam", None]
    assert [row["rule"] for row in result["rows"]] == rules
    for row in result["rows"]:
        assert 0 < row["launch_share"] < 1
        assert ("ratio" in row) == (row["call"] != "promote, Adam")
    first, *rest = done.stdout.splitlines()
    triton = result["provenance"]["triton"]
    assert first == f"300 ids of 40 rows of 2, 16; Triton {triton}, no device"
    assert rest == [*host.LEGEND.splitlines(), "", *host.lines(result["rows"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "0"], "argument --ids: must be at least 1, got 0"),
        (["--turns", "1"], "argument --turns: must be at least 2, got 1"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
        ([], "TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(host.backend, "INTERPRETED", True)
    monkeypatch.setattr(host.backend, "TRITON_ERROR", None)
    with pytest.raises(SystemExit) as stop:
        host.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("bench/host.py: error: ") and message in err
