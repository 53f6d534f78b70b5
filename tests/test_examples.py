"""examples/: each runs, small, and says what it should."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


def load(name):
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_ctr(capsys):
    ctr = load("ctr")
    small = ["--events", "60000", "--dim", "8"]
    plain = ctr.main([*small, "--embedding", "plain", "--init-std", "0.05"])
    ours = ctr.main([*small, "--embedding", "resizable", "--init-std", "0.05"])
    searched = ctr.main([*small, "--embedding", "searched", "--init-std", "0.05"])
    said = capsys.readouterr().out
    assert "plain" in said and "resizable" in said and "searched" in said
    assert ours["bytes"] < plain["bytes"]
    for found in (plain, ours, searched):
        assert 0.3 < found["log_loss"] < 0.69 and found["auc"] > 0.55


def test_budget(tmp_path, capsys):
    budget = load("budget")
    found = budget.main(["--events", "40000", "--out", str(tmp_path)])
    plain, same, rows = (found[name] for name in (budget.PLAIN, budget.SAME, budget.ROWS))
    assert rows["bytes"] <= same["bytes"] == plain["bytes"] // 16
    assert rows["loss"] < plain["loss"]
    said = capsys.readouterr().out
    assert f"{plain['bytes']:,}" in said and f"{rows['loss']:.4f}" in said
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_own_rule(capsys):
    found = load("own_rule").main(["--rows", "300", "--steps", "200", "--batch", "128"])
    assert "rows by size" in capsys.readouterr().out
    losses = {name: loss for name, (loss, _) in found.items()}
    sizes = {name: size for name, (_, size) in found.items()}
    assert sizes["never"] < sizes["own rule"] <= sizes["always"] == sizes["all large"]
    assert losses["own rule"] < losses["never"]


@pytest.mark.filterwarnings("ignore")  # torch's exporters, of parts of their own
def test_serving(tmp_path, capsys):
    onnx = all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime"))
    errors = load("serving").main(
        ["--rows", "2000", "--out", str(tmp_path), *([] if onnx else ["--no-onnx"])]
    )
    assert len(errors) == 3 + onnx and max(errors.values()) < 1e-5
    size = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert size["ragged.safetensors"] < size["dense.pt2"] / 4
    assert "serving / fixed" in capsys.readouterr().out


MISTAKES = [
    ["ctr.py", "--events", "0"],
    ["ctr.py", "--init-std", "-1"],
    ["ctr.py", "--embedding", "other"],
    ["budget.py", "--events", "0"],
    ["budget.py", "--seed", "-1"],
    ["budget.py", "--events", "4000", "--budget", "9%"],
    ["budget.py", "--events", "4000", "--budget", "much"],
    ["own_rule.py", "--steps", "-1"],
    ["serving.py", "--rows", "0"],
    ["serving.py", "--out", __file__],
]


@pytest.mark.parametrize("command", MISTAKES, ids=" ".join)
def test_bad_arguments(command, monkeypatch, capsys):
    name, *arguments = command
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        load(Path(name).stem).main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"{name}: error: ")


@pytest.mark.parametrize("command", MISTAKES[2:5], ids=" ".join)
def test_as_a_process(command):
    """Every script as a user starts it, here with a mistake."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / command[0]), *command[1:]], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{command[0]}: error: ")
