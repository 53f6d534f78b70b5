"""bench/lookup.py: what it prints and writes, its gate, its errors and its byte model."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers import install_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "lookup.py"
SMALL = {2: 5, 4: 4, 8: 3, 16: 3, 64: 2, 128: 6}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does, never with interpreted kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=env,
    )


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script as a module; ``bench.providers`` is its other file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("bench_lookup", SCRIPT)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "bench_lookup", module)
        spec.loader.exec_module(module)
        for name in ("gate", "goals", "promotions", "providers", "roof", "table", "updates"):
            setattr(module, f"{name}_file", sys.modules[f"harness.{name}"])
        module.plot_file = sys.modules["plot"]
        module.fill, module.Eager = module.table_file.fill, module.providers_file.Eager
        yield module


@pytest.fixture
def table(bench: Any) -> Any:
    torch.manual_seed(0)
    return bench.make_table("small", SMALL, torch.Generator().manual_seed(0))


@pytest.fixture
def ids(table: Any) -> torch.Tensor:
    """Every id but the first and the last, some of them several times."""
    return torch.cat([torch.arange(1, len(table) - 1), torch.tensor([3, 3, 7, 3])])


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench") / "lookup.json"
    done = run(
        "--quick",
        "--device",
        "cpu",
        "--ids",
        "64",
        "--repeats",
        "3",
        "--seed",
        "5",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_quick_json(quick: tuple[str, dict[str, Any]]) -> None:
    _, result = quick
    assert result["gate"] == {"passed": True, "tolerance": 5e-5}
    assert result["seed"] == 5 and result["device"] == "cpu"
    assert not result["provenance"]["interpreted"]
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
    # Nothing of 65,536 ids was measured, and no GPU was there.
    assert {goal["status"] for goal in result["goals"]} <= {"needs a GPU", "not measured", "met"}


def test_quick_text(quick: tuple[str, dict[str, Any]]) -> None:
    text, result = quick
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    distinct = result["rows"][0]["distinct"]
    heading = f"ml-20m (138,493 rows), uniform, 64 ids ({distinct} distinct); copy "
    assert lines[0].startswith(heading)
    assert sum(" ours " in line and "1.00x" in line for line in lines) >= 12
    for condition in result["conditions"]:
        assert condition in lines


def test_no_gpu_is_said(bench: Any, table: Any, monkeypatch: Any, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(bench, "PAPER_ROWS", SMALL)
    assert bench.main(["--quick", "--ids", "9", "--repeats", "1"]) == 0
    assert capsys.readouterr().out.startswith("no GPU found: measuring the CPU path\n")


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
def test_user_errors(bench: Any, capsys: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out and message in err and err.count("\n") == 1


def test_without_matplotlib(bench: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.main(["--plot", "x.png"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "argument --plot: needs matplotlib; " in line
    assert install_command(line) == ["pip", "install", "esapn-kernels[bench]"]


def test_user_error_from_a_shell() -> None:
    done = run("--device", "cuda") if not torch.cuda.is_available() else run("--device", "none")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("lookup.py: error: argument --device: ")
    assert done.stderr.count("\n") == 1


def test_out_is_not_left_behind_by_the_check(bench: Any, tmp_path: Path) -> None:
    bench.parse(["--out", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "old.json").write_text("old")
    bench.parse(["--out", str(tmp_path / "old.json")])
    assert (tmp_path / "old.json").read_text() == "old"


def test_gate_passes_every_provider(bench: Any, table: Any, ids: torch.Tensor) -> None:
    ours, fixed = bench.Ours(table, CPU), bench.Fixed(table, CPU)
    reference = bench.make_reference(ours, ids)
    assert bench.check(ours, ids, reference) < 1e-5
    assert bench.check(bench.Eager(ours), ids, reference) < 1e-5
    assert bench.check(fixed, ids, bench.make_reference(fixed, ids)) < 1e-5


def test_gate_refuses_wrong_outputs_and_gradients(
    bench: Any, table: Any, ids: torch.Tensor
) -> None:
    class Wrong(bench.Ours):  # type: ignore[misc, name-defined]
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            return self.spoil(super().__call__(ids))

    provider = Wrong(table, CPU)
    reference = bench.make_reference(provider, ids)
    for spoil, message in [
        (lambda out: out * (1 + 1e-3), "off by 1.0e-03"),
        (lambda out: out * torch.nan, "off by inf"),
        (lambda out: out * 2 - out.detach(), "gradient.* off by 1.0e\\+00"),
        (lambda out: out + 1e-20 * provider.parameters[0][-1], "not looked up"),
    ]:
        provider.spoil = spoil
        with pytest.raises(bench.GateError, match="ours: .*" + message):
            bench.check(provider, ids, reference)


def test_no_timing_is_printed_when_the_gate_fails(
    bench: Any, monkeypatch: Any, capsys: Any
) -> None:
    def refuse(*_: Any) -> float:
        raise bench.GateError("ours: outputs off by 1.0e+00")

    monkeypatch.setattr(bench, "PAPER_ROWS", SMALL)
    monkeypatch.setattr(bench, "check", refuse)
    monkeypatch.setattr(bench.Clock, "sample", lambda *_: pytest.fail("timed"))
    assert bench.main(["--quick", "--device", "cpu", "--ids", "9"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1] == "not timed: ours: outputs off by 1.0e+00"


def test_a_loop_that_does_not_compile_is_a_note(bench: Any, table: Any, monkeypatch: Any) -> None:
    def refuse() -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(bench.providers_file, "_compiled_loop", refuse)
    case = bench.make_case(table, "zipf", 30, CPU, torch.Generator().manual_seed(0))
    ours = bench.Ours(table, CPU)
    providers = [ours, bench.Compiled(bench.Eager(ours))]
    rows = bench.measure(case, providers, bench.Clock(CPU), 2)
    assert [row.note for row in rows] == ["", "not compiled: no C++ compiler"] * 3
    assert [row.median_ms is None for row in rows] == [False, True] * 3
    assert "not compiled: no C++ compiler" in bench.report(rows)


def test_statistics_by_hand(bench: Any) -> None:
    rows = [
        bench.Row("t", 9, "uniform", 4, 3, "forward", name, memory_bytes=1, bytes=6_000_000)
        for name in ("ours", "fixed")
    ]
    bench.fill(rows[0], [5.0, 1.0, 2.0, 3.0, 4.0, 6.0], 4.0)
    bench.fill(rows[1], [7.0, 7.0], 4.0)
    bench.relate(rows)
    assert (rows[0].p20_ms, rows[0].median_ms, rows[0].p80_ms) == (2.0, 3.5, 5.0)
    assert rows[0].gb_per_s == pytest.approx(6 / 3.5)
    assert rows[0].roof_ms == pytest.approx(1.5)  # 6 MB at 4 GB/s
    assert rows[0].roof_share == pytest.approx(1.5 / 3.5)
    assert (rows[0].times_ours, rows[1].times_ours) == (1.0, 2.0)
    assert rows[1].limit_times_ours == 1.0


def test_table_and_traffic(bench: Any, table: Any) -> None:
    assert {d: int((table.sizes == d).sum()) for d in SMALL} == SMALL
    assert not torch.equal(table.sizes, table.sizes.sort().values)
    assert sorted(table.popular.tolist()) == list(range(len(table)))
    assert torch.equal(table.sizes[table.popular], table.sizes.sort(descending=True).values)
    generator = torch.Generator().manual_seed(0)
    weight = torch.arange(1, len(table) + 1, dtype=torch.float64).pow(-1.05)
    drawn = bench.providers_file.make_ids(table, "zipf", 200_000, generator).bincount(
        minlength=len(table)
    )
    share = drawn[table.popular] / 200_000
    torch.testing.assert_close(share, (weight / weight.sum()).float(), atol=0.005, rtol=0)
    drawn = bench.providers_file.make_ids(table, "uniform", 230_000, generator).bincount(
        minlength=len(table)
    )
    assert int(drawn.min()) > 9_500 and int(drawn.max()) < 10_500


def test_bytes_by_hand(bench: Any) -> None:
    model = bench.roof_file
    # Three ids: one row of size 2 twice, one of 128.
    looked = model.Looked([2, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1])
    plain = model.Looked([0, 0, 0, 0, 0, 3], [0, 0, 0, 0, 0, 2], ragged=False)
    # 3 * (8 id + 4 location + 512 output) + 4 * 130 of rows; cold reads the small row twice.
    assert model.forward_bytes(looked) == 2_092
    assert model.forward_bytes(looked.cold) == 2_100
    # 3 * (8 id + 512 output) + 2 * 512 of rows
    assert model.forward_bytes(plain) == 2_584
    # bf16 output: 256 bytes instead of 512
    assert model.forward_bytes(looked, out_itemsize=2) == 2_092 - 3 * 256
    # 3 * (8 index + 512 gradient) + 8 of the row of size 2 + 800 of gradient
    assert model.dense_backward_bytes(looked, 200) == 2_368
    assert model.dense_backward_bytes(plain, 256) == 2_584
    # 3 * (8 index + 512 gradient) + rows read and written, 2 * 4 * 130
    assert model.sparse_backward_bytes(looked, "sgd") == 1_560 + 1_040
    # and Adam's two moments read and written, and when each of 2 rows was last stepped
    assert model.sparse_backward_bytes(looked, "adam") == 1_560 + 1_040 + 4 * 4 * 130 + 2 * 2 * 4
    assert model.sparse_step_bytes(looked, "sgd") == 2_092 + 2_600
    # gradient read, weight read and written, two moments read and written: 7 * 4 bytes an element
    dense = model.forward_bytes(looked) + model.dense_backward_bytes(looked, 200)
    assert model.dense_step_bytes(looked, "adam", 200) == dense + 28 * 200


def test_what_is_looked_up(bench: Any, table: Any, ids: torch.Tensor) -> None:
    looked = bench.roof_file.Looked.of(ids, table.sizes)
    sizes = table.sizes[ids].tolist()
    assert looked.counts == [sizes.count(d) for d in SMALL]
    assert looked.ids == len(ids)
    assert looked.elements == int(table.sizes[ids.unique()].sum())


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_gate_of_steps(bench: Any, table: Any, ids: torch.Tensor, rule: str) -> None:
    updates = bench.updates_file
    for step in updates.make_steps(table, CPU, rule):
        assert updates.check_step(step, ids, rule) < 5e-5, step.name
    wrong = updates.fused_step(table, CPU, rule)
    assert wrong.rows is not None
    wrong.rows.param_groups[0]["lr"] *= 1.01
    with pytest.raises(bench.GateError, match="rows of level .* off by"):
        updates.check_step(wrong, ids, rule)


def test_gate_of_promotion(bench: Any, table: Any, monkeypatch: Any) -> None:
    promotions = bench.promotions_file
    ours = bench.Ours(table, CPU)
    (ids, *_) = promotions.draw_batches(table, CPU, torch.Generator().manual_seed(0))
    assert max(promotions.check_promotion(ours, ids).values()) < 1e-5
    monkeypatch.setattr(promotions.Ready, "promote", lambda self, ids: torch.zeros(1).bool())
    with pytest.raises(bench.GateError, match="left where they are"):
        promotions.check_promotion(ours, ids)


def test_goals_come_from_rows(bench: Any) -> None:
    def row(mode: str, provider: str, ms: float, moved: int) -> Any:
        found = bench.Row("ml-20m", 9, "uniform", 65_536, 9, mode, provider, 1, bytes=moved)
        bench.fill(found, [ms], 1.0)
        return found

    rows = [
        row("forward", "ours", 2.0, 1_000_000),
        row("forward", "eager", 7.0, 1_000_000),
        row("forward out=", "ours", 8.0, 800),
        row("forward out=", "fixed", 2.0, 1000),
    ]
    goals = {g["name"]: g for g in bench.goals.judge(rows, {}, "cpu") if g["device"] == "cpu"}
    loop = goals["eager / ours, 65,536 uniform, ml-20m, forward"]
    # 7 / 2 ms; our roof is 1 ms (1 MB at 1 GB/s), so 7 at the most.
    assert (loop["value"], loop["limit"], loop["status"]) == (3.5, pytest.approx(7.0), "met")
    out = next(g for name, g in goals.items() if "index_select" in name)
    assert (out["value"], out["limit"], out["status"]) == (4.0, 0.8, "missed")
    assert goals["eager / ours, 65,536 uniform, ml-20m, forward + backward"]["value"] is None
    on_gpu = [g for g in bench.goals.judge(rows, {}, "cpu") if g["device"] == "cuda"]
    assert on_gpu and {g["status"] for g in on_gpu} == {"needs a GPU"}
    assert all(len(line) <= 120 for line in bench.goals.lines(on_gpu))


def test_plot_is_a_picture(bench: Any, quick: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    bench.plot(quick[1], tmp_path / "x.png")
    header = (tmp_path / "x.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (16, 20))
    assert width > 300 and height > 200
    with pytest.raises(ValueError, match="no measured row"):
        bench.plot({**quick[1], "rows": []}, tmp_path / "y.png")
