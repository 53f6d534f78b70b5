"""Every kernel compiles for sm_80, sm_90 and sm_100 without spilling. Needs no GPU."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.static import TARGETS as DEVICES
from bench.harness.static import blocks_per_multiprocessor, label
from esapn_kernels.ops.backend import TRITON_ERROR

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (80, 90, 100)
PROCESSES = 2

pytestmark = pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))


def kernels_in_the_package() -> set[str]:
    """Names of the @triton.jit functions that end in _kernel, from the sources."""
    found = set()
    for path in (ROOT / "esapn_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                if any("triton.jit" in d for d in decorators):
                    found.add(node.name)
    return found


@pytest.fixture(scope="session", params=TARGETS, ids=lambda sm: f"sm_{sm}")
def compiled(request) -> list[dict]:
    """Resource usage of every kernel for a target, compiled in processes that do not interpret."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script, target = str(ROOT / "tests" / "kernels" / "compile_kernels.py"), str(request.param)
    processes = [
        subprocess.Popen(
            [sys.executable, script, f"--share={index + 1}/{PROCESSES}", target],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(PROCESSES)
    ]
    results = []
    said = [process.communicate() for process in processes]
    for process, (output, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
        results += json.loads(output)
    assert {result["sm"] for result in results} == {request.param}
    return results


def test_every_kernel_is_compiled(compiled):
    names = kernels_in_the_package()
    assert "_lookup_fwd_kernel" in names
    assert {result["case"].partition("[")[0] for result in compiled} == names


def test_no_kernel_spills(compiled):
    assert [r for r in compiled if r["stack"] or r["local"]] == []
    assert [r for r in compiled if not 0 < r["registers"] <= 255] == []


def test_every_kernel_fits_in_shared_memory(compiled):
    # A block may use 163 KiB on sm_80 and 227 KiB on sm_90 and sm_100.
    limit = {80: 163, 90: 227, 100: 227}
    assert [r for r in compiled if r["shared"] > limit[r["sm"]] * 1024] == []


def test_as_many_blocks_as_recorded(compiled):
    """No fewer blocks a multiprocessor than in the record that ``bench/static.py`` wrote."""
    import triton

    path = ROOT / "bench" / "results" / f"static-{triton.__version__}.json"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    sm = compiled[0]["sm"]
    expected = {r["kernel"]: r["blocks_per_multiprocessor"] for r in rows if r["sm"] == sm}
    found = {}
    for r in compiled:
        case = re.fullmatch(r"(\w+)\[paper-float32-int32-(\d+)-(.+)\]", r["case"])
        if case and case[3] not in ("to-bf16", "demote", "insert", "free"):
            blocks = blocks_per_multiprocessor(
                DEVICES[sm], r["registers"], r["shared"], r["threads"]
            )
            found[label(case[1], case[3], int(case[2]))] = blocks
    assert len(expected) == 22 and set(expected) <= set(found)
    assert {name: found[name] for name in expected if found[name] < expected[name]} == {}
