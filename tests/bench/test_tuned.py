"""bench/tuned.py: the mode's settings out of checks, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esapn.tune.trials import append
from esapn.tune.walk import Walked

ROWS = {"row_lr": 0.1, "row_accumulator": 0.01, "init_std": 0.001}
OWN = {"fixed-2": {}, "counts-25%": {"count_scale": 2.0, "move_every": 20}}
OTHERS = {"default": 0.4, "shared": 0.1, "a": 0.2, "b": 0.3}


def check(path: Path, losses: dict[str, dict[str, float]], rate: float = 0.0) -> Path:
    """A check's trials: two orders about the loss of every method and settings."""
    for method, by in losses.items():
        for name, loss in by.items():
            settings = {**ROWS, "row_lr": OTHERS[name] + rate * (name != "default"), **OWN[method]}
            for order, more in ((3, 0.01), (4, -0.01)):
                losses_ = (0.5, 0.5, 0.5, loss + more)
                append(path, Walked(method, name, order, settings, losses_, 0.5, 8, 1.0))
    return path


def made(tmp_path, *, counts=(0.25, 0.2001, 0.2, 0.21)) -> list[Path]:
    tmp_path.mkdir(exist_ok=True)
    names = ("default", "shared", "a", "b")
    fixed = {"one": (0.3, 0.22, 0.2, 0.21), "two": (0.3, 0.25, 0.24, 0.2)}
    return [
        check(
            tmp_path / f"{file}.csv",
            {
                "fixed-2": dict(zip(names, fixed[file], strict=True)),
                "counts-25%": dict(zip(names, counts, strict=True)),
            },
        )
        for file in ("one", "two")
    ]


def test_shared_settings_where_they_serve_and_the_best_folders_where_not(tmp_path, capsys):
    from tuned import main

    out = tmp_path / "tuned.json"
    paths = made(tmp_path)
    other = made(tmp_path / "five", counts=(0.25, 0.3, 0.2, 0.21))
    tasks = ["--binary", *map(str, paths), "--multiclass", *map(str, other)]
    assert main([*tasks, "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    found = written["binary"]
    assert found["rows"] == {**ROWS, "row_lr": 0.1}
    # fixed-2 loses 10 % and 25 % with the shared ones; 0 % and 20 % with a's, 5 % and 0 % with b's.
    assert found["methods"]["fixed-2"] == {**ROWS, "row_lr": 0.3}
    # counts lose half a thousandth: below the tolerance.
    assert found["methods"]["counts"] == {**ROWS, "row_lr": 0.1, **OWN["counts-25%"]}
    assert written["multiclass"]["methods"]["counts"]["row_lr"] == OTHERS["a"]
    assert written["made_by"].startswith("python bench/tuned.py --binary")
    assert "one.csv" in written["made_by"] and "--out" in written["made_by"]
    said = capsys.readouterr().out
    assert "fixed-2: b" in said and "counts-25%: shared" in said
    assert means(said) == pytest.approx([500, 175, 100, 25])


def test_checks_of_smaller_tables_stand_beside_those_of_all_sizes(tmp_path):
    from tuned import main

    out = tmp_path / "tuned.json"
    every, small = made(tmp_path), made(tmp_path / "small", counts=(0.25, 0.3, 0.21, 0.2))
    paths = [*every, *(f"16:{path}" for path in small)]
    assert main([*tasks_of(*paths), "--out", str(out)]) == 0
    methods = json.loads(out.read_text())["binary"]["methods"]
    assert methods["counts"]["row_lr"] == OTHERS["shared"]
    assert methods["counts,to=16"] == {**ROWS, "row_lr": OTHERS["b"], **OWN["counts-25%"]}
    with pytest.raises(SystemExit):
        main(tasks_of(*paths[2:]))


def means(said: str) -> list[float]:
    """The mean regrets of fixed-2 in two classes."""
    line = next(x for x in said.split("mean:")[1].splitlines() if "fixed-2" in x)
    return [float(cell) for cell in line.split()[1:]]


def tasks_of(*paths: object) -> list[str]:
    """Arguments with the same files for both tasks."""
    return ["--binary", *map(str, paths), "--multiclass", *map(str, paths)]


def test_the_tolerance_decides(tmp_path):
    from tuned import main

    out = tmp_path / "tuned.json"
    assert main([*tasks_of(*made(tmp_path)), "--tolerance", "0.2", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["binary"]["methods"]["fixed-2"]["row_lr"] == 0.1


def test_files_of_one_name_in_two_folders_both_count(tmp_path, capsys):
    from tuned import main

    paths = []
    for path in made(tmp_path):
        paths.append(tmp_path / path.stem / "trials.csv")
        paths[-1].parent.mkdir()
        path.rename(paths[-1])
    assert main(tasks_of(*paths)) == 0
    said = capsys.readouterr().out
    assert all(f"{path}: regret" in said for path in paths)
    assert means(said) == pytest.approx([500, 175, 100, 25])


def refusal(capsys, *arguments: object) -> str:
    from tuned import main

    with pytest.raises(SystemExit) as left:
        main(tasks_of(*arguments))
    captured = capsys.readouterr()
    assert left.value.code == 2 and captured.err.count("\n") == 1 and not captured.out
    return captured.err


def test_what_is_no_check_is_refused(tmp_path, capsys):
    one, two = made(tmp_path)
    search = check(tmp_path / "search.csv", {"fixed-2": {"default": 0.3, "a": 0.2}})
    assert "no settings that were checked" in refusal(capsys, search)
    assert "no settings that were checked" in refusal(capsys, tmp_path / "absent.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "cannot be read" in refusal(capsys, tmp_path / "other.csv")
    less = check(tmp_path / "less.csv", {"fixed-2": dict.fromkeys(OTHERS, 0.2)})
    assert "has other methods or settings" in refusal(capsys, one, less)
    part = check(tmp_path / "part.csv", {"fixed-2": dict.fromkeys(OTHERS, 0.2)})
    check(part, {"counts-25%": {"default": 0.2, "shared": 0.2}})
    assert "lacks some settings on some order" in refusal(capsys, part)
    check(two, {"counts-25%": {"default": 0.2}})
    assert "lacks some settings on some order" in refusal(capsys, one, two)  # lines twice
    moved = check(
        tmp_path / "moved.csv",
        {method: dict.fromkeys(OTHERS, 0.2) for method in OWN},
        rate=0.5,
    )
    assert "other settings than in a file before" in refusal(capsys, one, moved)
