"""Launches: on the device of their tensors, and compiled once whatever the numbers of a step."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from esapn_kernels.ops.backend import INTERPRETED, TRITON_ERROR, is_capturing, launch_kernel

ROOT = Path(__file__).resolve().parents[2]
SIZES = (2, 4, 8, 16, 64, 128)

pytestmark = pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))


@pytest.fixture
def two_devices(monkeypatch) -> list[int]:
    """CUDA's notion of a current device without CUDA; the only element is its number."""
    current = [0]

    def exchange(device: int) -> int:
        before, current[0] = current[0], current[0] if device < 0 else device
        return before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return current


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("n_ids", [500, 1 << 18], ids=["small", "grouped"])
def test_launches_run_on_the_device_of_their_tensors(n_ids, current, two_devices, monkeypatch):
    from triton.runtime.jit import KernelInterface

    from tests.kernels.launches import calls

    two_devices[0] = current
    launched = []

    def launch(kernel, grid):
        def run(*args, **known):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            assert tensors and all(t.device == torch.device("cuda:1") for t in tensors), kernel
            launched.append((kernel.__name__, two_devices[0]))

        return run

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    for label, call in calls(SIZES, torch.float32, torch.int32, n_ids, device="cuda:1"):
        before = len(launched)
        call()
        assert len(launched) > before, label
        assert two_devices == [current], label
    assert {device for _, device in launched} == {1}
    assert len({name for name, _ in launched}) >= 11


def test_a_graph_is_looked_for_on_the_device_of_the_tensor(two_devices, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: two_devices == [1])
    with FakeTensorMode():
        there, here = (torch.empty(1, device=f"cuda:{i}") for i in (1, 0))
    assert is_capturing(there) and not is_capturing(here) and two_devices == [0]
    assert not is_capturing(torch.empty(1))


def test_every_launch_goes_through_launch_kernel():
    """Triton launches on the current device, so only a function that sets it may launch."""
    assert launch_kernel.__module__ == "esapn_kernels.ops.backend"
    launches, calls = [], 0
    for path in sorted((ROOT / "esapn_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                what = ast.unparse(node.func.value)
                if what.endswith(("kernel", "compiled")):
                    launches.append(f"{path.name}: {what}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "launch_kernel":
                calls += 1
    # Interpreted, found by Triton, and kept.
    assert sorted(launches) == ["backend.py: compiled", *["backend.py: kernel"] * 2]
    assert calls >= 15


def process(*arguments: str) -> Any:
    """The JSON that a process prints last; it does not interpret kernels."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What tests/kernels/kept_worker.py found."""
    facts: dict[str, Any] = process("-m", "tests.kernels.kept_worker")
    return facts


def test_kept_kernels_are_launched_as_triton_launches_them(kept):
    """The same binary with equal arguments, one by one, hooks and what they are told included."""
    for name in ("differences", "differences with a hook"):
        assert kept[name] == {"differing": [], "missing": []}


def test_kernels_are_kept_by_what_triton_compiles_them_for(kept):
    changes = dict(kept["changes"])
    assert [changes.pop(name) for name in ("another number", "other memory")] == [[0, 0]] * 2
    assert len(changes) == 9 and set(map(tuple, changes.values())) == {(1, 0)}


def test_kernels_are_kept_by_device(kept):
    assert kept["devices"] == {
        "searches": [1, 1, 0, 0, 0],
        "loaded": [0, 1, 1, 0, 1],
        "same": [True] * 5,
        "after": [0] * 5,
    }


def test_triton_specialises_no_integer_of_ours(kept):
    assert kept["specialized"] == []
    # A kernel with one is left to Triton: a search each time, and code for 1, for 16 and for 17.
    assert kept["numbers"] == [4, 3]


def compiled(scripts: dict[str, str]) -> dict[str, list[list[str]]]:
    """For every ``mark()`` in a script, the kernels that it would have compiled since the last.

    A process of its own, with Triton's real cache keys and a device that is not there: whatever
    would be compiled is noted, and nothing runs. Each script begins with nothing compiled.
    """
    parts = ["import json", "from tests.kernels.counting import begin, mark, marks"]
    for name, script in scripts.items():
        parts += [f"begin({name!r})", script]
    code = "\n".join([*parts, "print(json.dumps(marks))"])
    found: dict[str, list[list[str]]] = process("-c", code)
    return found


PREPARED = """
import torch
from esapn_kernels import ResizableEmbedding, optim
sizes = (2, 4, 8, 16, 64, 128)
module = ResizableEmbedding(
    5000, initial_size=torch.tensor(sizes)[torch.arange(5000) % 6], backend="triton"
)
rows = optim.{optimizer}(module, lr=0.1)
def step(n_ids):
    ids = torch.randint(module.num_embeddings, (n_ids,))
    module(ids).backward(torch.randn(n_ids, 128))
    module.promote(ids[: n_ids // 2])
"""
LENGTHS = """
for n in (512, 1000, 2000, 5000, 9000):  # one of every kind of batch
    step(n)
mark()
for n in (500, 333, 1, 2, 1023, 1024, 2047, 2048, 8192, 8193, 20_000):
    step(n)
    mark()
"""
MOMENTUM = """
schedule = torch.optim.lr_scheduler.OneCycleLR(rows, max_lr=0.2, total_steps=20)
seen = set()
for _ in range(20):
    seen.add(rows.param_groups[0]["betas"])
    step(512)
    rows.step()
    schedule.step() if len(seen) < 20 else None
    mark()
assert len(seen) > 15
"""
TABLES = """
modules = [
    ResizableEmbedding(int(n), initial_size=torch.tensor(sizes)[torch.arange(int(n)) % 6])
    for n in torch.logspace(1, 5.3, 26)
]
assert len({module.arena.page for module in modules}) > 4
for module in modules:
    module.backend = "triton"
    rows = optim.Adam(module, lr=0.1)
    step(64)
    mark()
"""
GROWTH = """
for _ in range(5):
    step(512)
    mark()
    capacity = module.arena.storage.numel()
    module.reserve(capacity // 64)
    assert module.arena.storage.numel() > 2 * capacity
"""


def test_other_lengths_momenta_and_tables_compile_nothing():
    optimizers = ("Adam", "Adagrad", "SGD")
    scripts = {name: PREPARED.format(optimizer=name) + LENGTHS for name in optimizers}
    for name, script in (("momentum", MOMENTUM), ("tables", TABLES), ("growth", GROWTH)):
        scripts[name] = PREPARED.format(optimizer="Adam") + script
    found = compiled(scripts)
    assert {name: len(marks) for name, marks in found.items()} == {
        **dict.fromkeys(optimizers, 12),
        "momentum": 20,
        "tables": 26,
        "growth": 5,
    }
    for name, (first, *others) in found.items():
        assert {"_rows_kernel", "_sums_kernel", "_move_kernel"} <= set(first), name
        assert others == [[]] * len(others), name


KEYS = (
    PREPARED.format(optimizer="Adam")
    + """
for n in (20, 3):
    step(n)
page = module.arena.page
for dtype in (torch.float32, torch.bfloat16):
    rows, hops = module.arena.storage.detach().to(dtype), module.chain.detach().to(dtype)
    for first in (0, 1):  # elements of 8 bytes: the second is not aligned
        ids = torch.arange(21)[first:]
        launch_fwd(ids, rows, launch_compose(hops, sizes), module.arena.layout)
for target in (0, 1, 16, 1 << 31):
    launch_kernel(_fill_rows_kernel, (0,), rows, ids, ids, target, **fill)
"""
)
IMPORTS = """
from esapn_kernels.gpu.compose import launch_compose
from esapn_kernels.gpu.lookup_fwd import launch_fwd
from esapn_kernels.gpu.resize import _fill_rows_kernel
from esapn_kernels.ops.backend import launch_kernel
fill = {"SIZES": (2, 4), "DIM": 4, "VALUE": 0.0, "BLOCK_ROWS": 16, "BLOCK_DIM": 16}
"""


@pytest.mark.skipif(not INTERPRETED, reason="counts interpreted launches")
def test_variants_are_counted_as_triton_counts_them():
    from tests.kernels.variants import counted

    script = IMPORTS + KEYS
    with counted() as variants:
        exec(script, {})
    ((new,),) = compiled({"keys": script + "mark()"}).values()
    assert variants.by_kernel == {name: new.count(name) for name in sorted(set(new))}
    assert variants.by_kernel["_lookup_fwd_kernel"] == 4
    assert variants.by_kernel["_fill_rows_kernel"] == 2  # by the integer's width alone
    assert variants.launches["_fill_rows_kernel"] == 4
    *lines, last = variants.lines()
    assert lines == [f"  {k}: {n} of {variants.launches[k]}" for k, n in variants.by_kernel.items()]
    assert last.startswith(f"variants: {len(new)} to compile of {variants.launches.total()} ")
