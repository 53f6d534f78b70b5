"""tests/kernels/sanitizer.py finds what is planted, and nothing where it is mended."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("compiled kernels need no interpreter", allow_module_level=True)
triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from esapn_kernels import ResizableEmbedding, optim  # noqa: E402
from esapn_kernels.gpu import launch, update  # noqa: E402
from tests.kernels.sanitizer import EXEMPT, Plugin, sanitized  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SIZES = (2, 4, 8, 16, 64, 128)


@triton.jit
def reads_a_neighbour(x_ptr, y_ptr, MENDED: tl.constexpr):
    offs = tl.program_id(0) * 8 + tl.arange(0, 8)
    mask = offs < 20 if MENDED else offs < 21
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask, other=0), mask=offs < 20)


@triton.jit
def writes_a_neighbour(x_ptr, y_ptr, MENDED: tl.constexpr):
    offs = tl.program_id(0) * 8 + tl.arange(0, 8) - (0 if MENDED else 1)
    tl.store(y_ptr + offs, offs, mask=offs < 20)


@triton.jit
def writes_by_its_number(x_ptr, y_ptr, MENDED: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(y_ptr + (pid if MENDED else 0), pid)


@triton.jit
def writes_by_its_lane(x_ptr, y_ptr, MENDED: tl.constexpr):
    lane = tl.arange(0, 8)
    tl.store(y_ptr + (lane if MENDED else lane // 2), lane)


@triton.jit
def writes_again(x_ptr, y_ptr, MENDED: tl.constexpr):
    lane = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(y_ptr + lane, lane, mask=lane < 20)
    if MENDED:
        tl.debug_barrier()
    tl.store(y_ptr + lane, lane + 1, mask=lane < 20)


@triton.jit
def reads_what_another_writes(x_ptr, y_ptr, MENDED: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load((x_ptr if MENDED else y_ptr) + pid + 1))


@triton.jit
def adds_and_reads(x_ptr, y_ptr, MENDED: tl.constexpr):
    pid = tl.program_id(0)
    tl.atomic_add(y_ptr, 1)
    tl.store(y_ptr + pid + 1, tl.load(x_ptr if MENDED else y_ptr))


@triton.jit
def writes_what_it_read(x_ptr, y_ptr, MENDED: tl.constexpr):
    lane = tl.program_id(0) * 8 + tl.arange(0, 8)
    value = tl.load(y_ptr + lane, mask=lane < 20)
    if MENDED:
        tl.debug_barrier()
    tl.store(y_ptr + lane, value + 1, mask=lane < 20)


@triton.jit
def reads_what_it_wrote(x_ptr, y_ptr, MENDED: tl.constexpr):
    lane = tl.program_id(0) * 8 + tl.arange(0, 8)
    tl.store(y_ptr + lane, lane, mask=lane < 20)
    if MENDED:
        tl.debug_barrier()
    tl.store(x_ptr + lane, tl.load(y_ptr + lane, mask=lane < 20), mask=lane < 20)


@triton.jit
def takes_places_in_turn(x_ptr, y_ptr, MENDED: tl.constexpr):
    turn = tl.atomic_add(y_ptr, 1)
    tl.store(x_ptr + tl.program_id(0), 0 if MENDED else turn)


@triton.jit
def masks_by_number(x_ptr, y_ptr, MENDED: tl.constexpr):
    lane = tl.program_id(0) * 8 + tl.arange(0, 8)
    first = tl.program_id(0) == 0
    mask = lane < tl.where(first, 8, 0) if MENDED else (lane < 8) & first
    tl.store(y_ptr + lane, lane, mask=mask)


UNFENCED, ELSEWHERE = "without a barrier between, first", "in another program, first"
PLANTED = {
    reads_a_neighbour: [
        "line 4 reads outside of its argument, first x_ptr[20] in program (2, 0, 0)",
    ],
    writes_a_neighbour: [
        "line 3 writes outside of its argument, first y_ptr[-1] in program (0, 0, 0)",
    ],
    writes_by_its_number: [
        f"line 3 writes what line 3 wrote {ELSEWHERE} y_ptr[0] in program (1, 0, 0)",
        "the reversed order of programs changes bits, first y_ptr[0]",
        "a random order of programs changes bits, first y_ptr[0]",
    ],
    writes_by_its_lane: [
        "line 3 writes two values to one place, first y_ptr[0] in program (0, 0, 0)",
        f"line 3 writes what line 3 wrote {ELSEWHERE} y_ptr[0] in program (1, 0, 0)",
    ],
    writes_again: [
        f"line 6 writes what line 3 wrote {UNFENCED} y_ptr[0] in program (0, 0, 0)",
    ],
    reads_what_another_writes: [
        f"line 3 writes what line 3 read {ELSEWHERE} y_ptr[1] in program (1, 0, 0)",
        "the reversed order of programs changes bits, first y_ptr[0]",
        "a random order of programs changes bits, first y_ptr[0]",
    ],
    adds_and_reads: [
        f"line 4 reads what line 3 updated atomically {UNFENCED} y_ptr[0] in program (0, 0, 0)",
        f"line 3 updates atomically what line 4 read {ELSEWHERE} y_ptr[0] in program (1, 0, 0)",
        f"line 4 reads what line 3 updated atomically {ELSEWHERE} y_ptr[0] in program (1, 0, 0)",
        "the reversed order of programs changes bits, first y_ptr[1]",
        "a random order of programs changes bits, first y_ptr[1]",
    ],
    writes_what_it_read: [
        f"line 6 writes what line 3 read {UNFENCED} y_ptr[0] in program (0, 0, 0)",
    ],
    reads_what_it_wrote: [
        f"line 6 reads what line 3 wrote {UNFENCED} y_ptr[0] in program (0, 0, 0)",
    ],
    takes_places_in_turn: [
        "the reversed order of programs changes bits, first x_ptr[0]",
        "a random order of programs changes bits, first x_ptr[0]",
    ],
    masks_by_number: ["line 5 has a mask of int32, first in program (0, 0, 0)"],
}


def relative(messages, kernel):
    """Messages with lines counted from that of the kernel's decorator."""
    first = kernel.fn.__code__.co_firstlineno
    line = re.compile(r"test_sanitizer\.py:(\d+)")
    text = line.sub(lambda m: f"line {int(m[1]) - first}", "\n".join(messages))
    return text.replace(f"{kernel.__name__}, ", "").replace(f"{kernel.__name__}: ", "").splitlines()


@pytest.mark.parametrize("mended", [False, True], ids=["planted", "mended"])
@pytest.mark.parametrize("kernel", PLANTED, ids=lambda kernel: kernel.__name__)
def test_small_kernels(kernel, mended):
    # Two arguments side by side in one storage, each with others before and behind.
    every = torch.arange(60, dtype=torch.int32)
    x, y = every[5:25], every[30:50]
    with sanitized() as found:
        kernel[(3,)](x, y, MENDED=mended)
    assert found.launches == {kernel.__name__: 1}
    between = torch.tensor([*range(5), *range(25, 30), *range(50, 60)])
    assert torch.equal(every[between], between.int())
    assert relative(found.messages(), kernel) == ([] if mended else PLANTED[kernel])


def test_the_result_is_that_of_the_given_order():
    x, y = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with sanitized():
        takes_places_in_turn[(3,)](x, y, MENDED=False)
    assert x.tolist() == [0, 1, 2] and y.tolist() == [3]


@triton.jit
def steps(x_ptr, y_ptr, HOW: tl.constexpr):
    lane = tl.arange(0, 128)
    value = tl.load(x_ptr + lane)
    if HOW == "sum":
        value += tl.sum(value, axis=0)
    elif HOW == "of others":
        value = tl.load(y_ptr + lane)
    elif HOW == "read twice":
        value += tl.load(x_ptr + 127 - lane)
    elif HOW == "moved":
        lane = 127 - lane
    tl.store(x_ptr + lane, tl.where(lane < 100, 2 * value + 1, value).to(tl.int32))


@pytest.mark.parametrize(
    "how, exempt, num_warps, sound",
    [
        ("itself", {"steps"}, 4, True),
        ("sum", {"steps"}, 4, True),
        ("itself", {"another"}, 4, False),
        ("itself", {"steps"}, 8, False),
        ("of others", {"steps"}, 4, False),
        ("read twice", {"steps"}, 4, False),
        ("moved", {"steps"}, 4, False),
    ],
)
def test_a_step_of_a_place_on_itself(how, exempt, num_warps, sound):
    x, y = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    with sanitized(frozenset(exempt)) as found:
        steps[(1,)](x, y, HOW=how, num_warps=num_warps)
    assert (found.messages() == []) is sound and bool(found.exempted) is sound


CLIPS = {"clip_value": 1.0, "clip_row_norm": 2.0}
OPTIMIZERS = {
    "adam": lambda module: optim.Adam(module, lr=0.1),
    "adagrad": lambda module: optim.Adagrad(module, lr=0.1),
    "rowwise_adagrad": lambda module: optim.Adagrad(module, lr=0.1, rowwise=True),
    "sgd": lambda module: optim.SGD(module, lr=0.1),
    "rowwise_adam": lambda module: optim.Adam(module, lr=0.1, rowwise=True),
    "adagrad-shaped": lambda module: optim.Adagrad(module, lr=0.1, weight_decay=0.1, **CLIPS),
    "adam-shaped": lambda module: optim.AdamW(module, lr=0.1, **CLIPS),
    "gradient": lambda module: None,
}
DEFERRED = {
    "sgd": lambda module: optim.SGD(module, lr=0.1, deferred=True),
    "rowwise_adagrad": lambda module: optim.Adagrad(module, rowwise=True, deferred=True),
    "adam-shaped": lambda module: optim.AdamW(module, lr=0.1, deferred=True, **CLIPS),
}


def step_and_promote(rule):
    """Every row, some twice, and the first so often that a stretch of it is summed beforehand.

    The long batch is sorted by torch, the short one by one program.
    """
    size = torch.tensor(SIZES)[torch.arange(60) % len(SIZES)]
    module = ResizableEmbedding(60, initial_size=size, backend="triton")
    rows = OPTIMIZERS[rule](module)
    every = torch.cat([torch.arange(60), torch.arange(0, 60, 5)])
    for ids in (torch.cat([every, torch.zeros(960).long()]), every):
        module(ids).backward(torch.randn(len(ids), SIZES[-1]))
    module.promote(every[20:])
    del rows  # attached until here


@pytest.fixture(scope="module")
def compiled_pairs(tmp_path_factory) -> set[tuple[str, str]]:
    """Lines of ``finish_rows`` that load and store one place, of compiled kernels."""
    folder = tmp_path_factory.mktemp("ttgir")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script = str(ROOT / "tests" / "kernels" / "compile_kernels.py")
    rules = "|".join(rule for rule in OPTIMIZERS if rule != "gradient")
    only = rf"_(rows|sums|row_step)_kernel\[\w+-\w+-int32-\d+-(step-)?({rules})\]"
    command = [sys.executable, script, "--write", str(folder), "--only", only]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    files = list(folder.glob("*.ttgir"))
    assert len(files) >= 20
    return set().union(*(pairs_of(file.read_text(encoding="utf-8")) for file in files))


def pairs_of(text: str) -> set[tuple[str, str]]:
    """Pairs in one kernel; checks that one thread loads a place, and its value what is stored.

    The store then follows the load, whatever layout it has: a value that goes to another warp
    goes through shared memory, with a barrier. A second load at the line would be one that the
    compiler added, in a layout of which the store knows nothing.
    """
    layouts = dict(re.findall(r"^(#blocked\d*) = #ttg\.blocked<\{(.*)\}>", text, re.MULTILINE))
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    first = update.finish_rows.fn.__code__.co_firstlineno
    last = first + len(inspect.getsource(update.finish_rows.fn).splitlines())

    def line_of(place: str) -> int | None:
        """The line in ``finish_rows``; of inlined functions, the innermost counts."""
        while not (found := re.match(r'"(.*)":(\d+):', place)):
            place = places[re.search(r"#loc\d*", place)[0]]
        here = found[1].endswith("/update.py") and first <= int(found[2]) < last
        return int(found[2]) if here else None

    loaded: dict[str, set[int]] = {}  # by value: the loads that it is computed from, lane by lane
    counts: Counter[tuple[str, int]] = Counter()
    pairs = set()
    for row in text.splitlines():
        result, operation, rest = re.match(r"\s*(?:(%\w+) = )?([\w.]*)(.*)", row).groups()
        operands = re.findall(r"%\w+", rest)
        block = re.search(r"tensor<([\dx]+)x!tt\.ptr<\w+>, (#\w+)> loc\((.*)\)$", rest)
        line = line_of(block[3]) if block else None
        if operation == "tt.load":
            operands = []
        if line is not None:
            counts[operation, line] += 1
            if operation == "tt.load":
                shape = [int(n) for n in block[1].split("x")]
                layout = re.findall(r"\w+ = \[([\d, ]+)\]", layouts[block[2]])[:3]
                parts = [[int(n) for n in part.split(",")] for part in layout]
                fits = [prod(part) <= n for n, *part in zip(shape, *parts, strict=True)]
                assert all(fits), f"update.py:{line}: several threads load one place"
            elif operation == "tt.store":
                pairs |= {(load, line) for load in loaded.get(operands[1], ())}
        if result is not None:
            loaded[result] = set().union(*(loaded.get(name, ()) for name in operands))
            if operation == "tt.load" and line is not None:
                loaded[result] = {line}
    for load, store in pairs:
        assert counts["tt.load", load] == counts["tt.store", store], "a place is loaded twice"
    return {(f"update.py:{load}", f"update.py:{store}") for load, store in pairs}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_step(rule, monkeypatch, compiled_pairs):
    choose = launch.choose_few_runs
    monkeypatch.setattr(launch, "choose_few_runs", lambda n: choose(n) if n < 100 else None)
    monkeypatch.setattr(launch, "groups_ids", lambda n_ids, *_: n_ids < 100)
    with sanitized() as found:
        step_and_promote(rule)
    assert found.messages() == []
    assert len(found.launches) >= 18 and {"_few_runs_kernel", "_hot_kernel"} <= set(found.launches)
    assert {update.finish_rows.__name__} == EXEMPT
    assert bool(found.exempted) is (rule != "gradient") and found.exempted <= compiled_pairs


@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
@pytest.mark.parametrize("rule", DEFERRED)
def test_a_deferred_step(rule, far, compiled_pairs):
    """Gradients of no ids, of more ids than rows, and of rows that move before the step."""
    size = torch.tensor(SIZES)[torch.arange(60) % len(SIZES)]
    module = ResizableEmbedding(60, initial_size=size, backend="triton")
    if far:
        module.arena.row_start = module.arena.row_start.long()
    rows = DEFERRED[rule](module)
    every = torch.cat([torch.arange(60), torch.zeros(40).long()])
    with sanitized() as found:
        for ids in (every[:0], every, every[50:]):
            module(ids).backward(torch.randn(len(ids), SIZES[-1]))
        module.promote(torch.arange(9))
        rows.step()
    assert found.messages() == []
    assert {"_sums_kernel", "_rows_kernel", "_row_step_kernel"} <= set(found.launches)
    assert found.exempted and found.exempted <= compiled_pairs


def test_rows_that_come_and_go():
    with sanitized() as found:
        arena = ResizableEmbedding(60, sizes=(2, 4, 8), backend="triton").arena
        arena.free(torch.arange(0, 40, 3), backend="triton")
        arena.insert(torch.arange(0, 30), 1, backend="triton")
    assert {"_claim_kernel", "_scan_kernel", "_move_kernel"} <= set(found.launches)
    assert found.messages() == []


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """``plant(file, old, new)``: kernels of a file of ``esapn_kernels.gpu``, changed everywhere."""

    def plant(name: str, old: str, new: str) -> None:
        source = (ROOT / "esapn_kernels" / "gpu" / f"{name}.py").read_text(encoding="utf-8")
        assert old in source
        file = tmp_path / f"{name}.py"
        file.write_text(source.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"esapn_kernels.gpu.planted_{name}", file)
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        original = dict(vars(sys.modules[f"esapn_kernels.gpu.{name}"]))
        gpu = [m for n, m in list(sys.modules.items()) if n.startswith("esapn_kernels.gpu.")]
        for key, value in vars(changed).items():
            if not isinstance(value, InterpretedFunction) or value is original[key]:
                continue
            for module in gpu:
                if getattr(module, key, None) is original[key]:
                    monkeypatch.setattr(module, key, value)

    return plant


BARRIER = ("tl.debug_barrier()", "pass")


@pytest.mark.parametrize(
    "file, change, rule, expected",
    [
        (
            "update",
            BARRIER,
            "adam",
            {
                "_rows_kernel": "writes .* read without .*, first last_step_ptr",
                "_sums_kernel": "writes .* read without .*, first last_step_ptr",
            },
        ),
        (
            "update",
            BARRIER,
            "rowwise_adagrad",
            {
                "_rows_kernel": "writes .* read without .*, first square_ptr",
                "_sums_kernel": "writes .* read without .*, first square_ptr",
            },
        ),
        (
            "compose",
            BARRIER,
            "gradient",
            {
                "_compose_kernel": "reads .* wrote without .*, first composed_ptr",
                "_compose_bwd_kernel": "reads .* wrote without .*, first scratch_ptr",
            },
        ),
        (
            "resize",
            BARRIER,
            "gradient",
            {
                "_scan_kernel": "reads .* wrote without .*, first rank_ptr",
            },
        ),
        (
            "update",
            ("(offs_d < D)[None, :]", "(offs_d < D + 1)[None, :]"),
            "sgd",
            {
                "_rows_kernel": "writes two values to one place, first storage_ptr",
            },
        ),
    ],
    ids=["adam's barrier", "adagrad's barrier", "compose", "resize", "a mask"],
)
def test_changed_kernels(file, change, rule, expected, plant):
    plant(file, *change)
    with sanitized() as found:
        step_and_promote(rule)
    for kernel, what in expected.items():
        pattern = re.compile(rf"{kernel}, {file}\.py:\d+ {what}")
        assert any(map(pattern.match, found.messages())), found.messages()


TEST = """
import torch
from tests.kernels.test_sanitizer import masks_by_number, writes_a_neighbour

def test_planted():
    writes_a_neighbour[(3,)](torch.zeros(20), torch.zeros(20).int(), MENDED=False)

def test_mended():
    writes_a_neighbour[(3,)](torch.zeros(20), torch.zeros(20).int(), MENDED=True)
"""


def test_the_option(tmp_path):
    file = tmp_path / "test_planted.py"
    file.write_text(TEST, encoding="utf-8")
    # The conftest.py of the root is not above the file.
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--sanitize=1", "-n", "2", str(file)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "1 failed, 1 passed" in run.stdout, run.stdout + run.stderr
    assert "\nwrites_a_neighbour, test_sanitizer.py:" in run.stdout
    assert "sanitizer: 2 launches of 1 kernels in 2 tests" in run.stdout


def test_a_fraction_is_of_names():
    class Item:
        def __init__(self, number: int) -> None:
            self.nodeid = f"tests/kernels/test_lookup.py::test[{number}]"

    def taken(fraction: float) -> set[int]:
        plugin, found = Plugin(fraction), set()
        for number in range(1000):
            run = plugin.pytest_runtest_protocol(Item(number))
            next(run)
            if plugin.found is not None:
                found.add(number)
            with pytest.raises(StopIteration):
                run.send(None)
        return found

    few, many = taken(0.1), taken(0.3)
    assert few < many and 70 < len(few) < 130 and 250 < len(many) < 350
    assert taken(1.0) == set(range(1000)) and taken(0.0) == set()
