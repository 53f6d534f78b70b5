"""bench/static.py: how SASS is read, walked and counted, and one kernel from end to end."""

from __future__ import annotations

import json

import pytest
import static
from harness.static import (
    COPY,
    LOADS,
    STORES,
    TARGETS,
    Instruction,
    Pass,
    blocks_per_multiprocessor,
    in_flight_bytes,
    loops,
    parse_sass,
    passes,
    walk,
    widths,
)

from esapn_kernels.ops.backend import TRITON_ERROR
from tests.bench.small import BENCH, run

RESULTS = BENCH / "results"
SOURCE = """
def _kernel(order_ptr, rows_ptr, out_ptr):
    row = tl.load(
        order_ptr + 1,
        mask=True,
    )
    tl.store(out_ptr + 2, tl.load(rows_ptr + row))
"""
# As nvdisasm prints them, from kernels of this package.
SASS = """
_kernel:
.text._kernel:
\t//## File "{file}", line 3
    /*0010*/    LDC.64 R2, c[0x0][0x220] ; /* 0x00008800ff027b82 */
                    /* 0x000ea20000000a00 */
    /*0050*/    LDG.E R17, desc[UR14][R2.64] ; /* 0x0000000e02117981 */
                    /* 0x004ea8000c1e1900 */
.L_x_5:
\t//## File "{file}", line 5 inlined at "{file}", line 7
    /*08f0*/    @!P5 LDG.E.U8 R24, desc[UR14][R14.64+0x20] ; /* 0x0000200e0e18d981 */
                    /* 0x000fe8000c1e1900 */
\t//## File "/no/such/file.py", line 5
    /*0ae0*/    LDGSTS.E.BYPASS.128 [R68], desc[UR14][R14.64], P4 ; /* 0x000000000e447fae */
                    /* 0x000fe8000c1e1900 */
    /*0bb0*/    LDGDEPBAR ; /* 0x00000000000079af */
                    /* 0x000e220000000000 */
    /*1000*/    DEPBAR.LE SB0, 0x1 ; /* 0x000080000000791a */
                    /* 0x000fc80000000000 */
\t//## File "{file}", line 7
    /*1010*/    STG.E.64 desc[UR14][R14.64], R24 ; /* 0x000000180e00a986 */
                    /* 0x000fec0000010000 */
    /*2080*/    @P1 BRA `(.L_x_5) ; /* 0xffffffec00dc1947 */
                    /* 0x000fea000383ffff */
    /*2090*/    BRA.U !UP0, `(.L_x_6) ; /* 0x0000000100dc1947 */
                    /* 0x000fea000383ffff */
    /*20a0*/    EXIT ; /* 0x000000000000794d */
                    /* 0x000fea0003800000 */
.L_x_6:
    /*20b0*/    BRA `(.L_x_6) ; /* 0xfffffffc00fc7947 */
                    /* 0x000fc0000383ffff */
"""


@pytest.fixture
def sass(tmp_path) -> list[Instruction]:
    file = tmp_path / "kernels.py"
    file.write_text(SOURCE)
    return parse_sass(SASS.format(file="/another/copy/kernels.py"), tmp_path)


def test_the_reading_of_sass(sass):
    kinds = "LDC LDG LDG LDGSTS LDGDEPBAR DEPBAR STG BRA BRA EXIT BRA"
    assert " ".join(each.kind for each in sass) == kinds
    # Computed by hand from the second word: bits 41 to 61 of it are the control bits.
    assert [each.sets for each in sass] == [2, 2, None, None, 0, *[None] * 6]
    assert [each.waits for each in sass] == [[], [2], *[[]] * 9]
    assert [each.target for each in sass] == [*[None] * 7, 2, 10, None, 10]
    assert [each.predicated for each in sass] == [i in (2, 7, 8) for i in range(11)]
    assert [each.ends for each in sass] == [*[False] * 9, True, True]
    assert [each.pointer for each in sass if each.kind in (*LOADS, COPY, *STORES)] == [
        "order", "order", "", "out",
    ]  # fmt: skip
    assert sass[5].operands == "SB0, 0x1"


def test_widths(sass):
    assert widths(sass, LOADS) == {32: 1, 8: 1}
    assert widths(sass, (COPY,)) == {128: 1}
    assert widths(sass, STORES) == {64: 1}
    wide = [Instruction("LDG.E.ENL2.256"), Instruction("LDG.E.128.CONSTANT")] * 2
    assert widths(wide, LOADS) == {256: 2, 128: 2}


def load(board: int, pointer: str = "rows", bits: int = 128) -> Instruction:
    name = "LDG.E" if bits == 32 else f"LDG.E.{bits}"
    return Instruction(name, control=board << 5, pointer=pointer)


def use(*boards: int, name: str = "FADD") -> Instruction:
    return Instruction(name, control=7 << 5 | sum(1 << board for board in boards) << 11)


NOTHING = 7 << 5


def test_loads_that_depend_on_one_another_take_a_trip_each():
    body = [load(0, "ids", 64), use(0), load(1, "start", 32), use(1), load(0), load(2), use(0, 2)]
    assert walk(body, repeats=False) == Pass(7, 3.0, 2, None, 32, 0, ["ids", "start", "rows"])
    assert walk(body, repeats=True).round_trips == 3


def test_loads_beside_one_another_take_one_trip():
    found = walk([*(load(i) for i in range(4)), *(use(i) for i in range(4))], repeats=False)
    assert (found.round_trips, found.in_flight) == (1.0, 4)
    # Waited for one by one, as many trips as loads.
    found = walk([load(0), use(0)] * 4, repeats=False)
    assert (found.round_trips, found.in_flight) == (4.0, 1)


def test_a_scoreboard_is_there_when_its_last_load_is():
    late = [load(0, "a"), use(0), load(1, "order"), load(2, "keys"), use(2), load(1), use(1)]
    assert walk(late, repeats=False).waits == ["a", "keys+order", "rows"]


@pytest.mark.parametrize("left", [0, 1, 3])
def test_copies_of_several_passes_share_a_trip(left):
    body = [
        Instruction("DEPBAR.LE", operands=f"SB0, {left:#x}", control=NOTHING),
        Instruction("LDGSTS.E.BYPASS.128", control=NOTHING, pointer="rows"),
        Instruction("LDGSTS.E.64", control=NOTHING, pointer="rows"),
        Instruction("LDGDEPBAR", control=NOTHING),
    ]
    found = walk(body, repeats=True)
    assert found.round_trips == 1 / (left + 1)
    assert found.in_flight == 2 * (left + 1) and found.groups_left == left
    assert found.loaded == 16 + 8


def test_bytes_that_count():
    store = Instruction("STG.E.128", control=NOTHING, pointer="out")
    narrow = Instruction("STG.E", control=NOTHING, pointer="out")

    def bytes_of(*body: Instruction) -> tuple[int, int]:
        found = walk(body, repeats=False)
        return found.loaded, found.stored

    assert bytes_of(load(0), load(1, "order", 64), load(2, "map"), store, narrow) == (16, 16)
    assert bytes_of(load(0, "order", 64), load(1, "order", 32), load(2, "map"), narrow) == (12, 4)


def code(*text: str) -> list[Instruction]:
    """Instructions from ``name``, ``BRA n`` and ``@BRA n``."""
    made = []
    for each in text:
        name, _, target = each.lstrip("@").partition(" ")
        to = int(target) if target else None
        made.append(Instruction(name, each.startswith("@"), control=NOTHING, target=to))
    return made


def test_loops():
    # A block behind the code returns with a branch back that closes no loop; 2 and 3 are one.
    assert loops(code("MOV", "@BRA 5", "MOV", "@BRA 2", "EXIT", "MOV", "BRA 2")) == [(2, 3)]
    # Its condition may stand at the beginning; what traps at the end is not reached.
    trap = code("MOV", "@BRA 4", "MOV", "BRA 1", "EXIT", "BRA 5")
    assert loops(trap) == [(1, 2, 3)]
    nested = code("MOV", "MOV", "MOV", "@BRA 2", "@BRA 1", "EXIT")
    assert loops(nested) == [(1, 2, 3, 4), (2, 3)]
    assert loops(code("MOV", "EXIT")) == []


def test_passes():
    two = [*code("MOV"), load(0), *code("@BRA 1"), load(0), load(1), *code("@BRA 3", "EXIT")]
    assert [(each.instructions, each.loaded) for each in passes(two)] == [(3, 32), (2, 16)]
    # With one loop the kernel itself is a pass.
    one = [load(0), load(1), *code("@BRA 1", "EXIT")]
    assert [(each.instructions, each.loaded) for each in passes(one)] == [(4, 32)]
    # Two loops, but the second moves nothing.
    trap = [load(0), load(1), *code("@BRA 1", "@BRA 5", "EXIT", "BRA 5")]
    assert [(each.instructions, each.loaded) for each in passes(trap)] == [(6, 32)]


@pytest.mark.parametrize(
    ("sm", "registers", "shared", "threads", "blocks"),
    [
        # 32 x 140 = 4,480, allocated as 4,608: 3 warps in each quarter's 16,384, 12 in all.
        (90, 140, 20 << 10, 128, 3),
        # 5,632 a warp: 2 a quarter, 8 in all.
        (90, 176, 20 << 10, 256, 1),
        # 4,032 and 128 x 32 = 4,096 are both 4 a quarter, 129 registers are 3.
        (90, 126, 20 << 10, 256, 2),
        (90, 128, 0, 128, 4),
        (90, 129, 0, 128, 3),
        # 168 registers: 5,376, 3 a quarter; 169 to 176 are 5,632, 2 a quarter.
        (90, 168, 0, 128, 3),
        (90, 169, 0, 128, 2),
        # 64 warps, then 32 blocks.
        (90, 32, 0, 128, 16),
        (90, 16, 0, 32, 32),
        # 24 KiB and the system's 1 KiB: six times in 164 KiB, nine times in 228 KiB.
        (80, 32, 24 << 10, 64, 6),
        (90, 32, 24 << 10, 64, 9),
        (100, 32, 24 << 10, 64, 9),
        # Sixteen warps of 4,096 are all registers; of 8,192, more than there are.
        (90, 128, 0, 512, 1),
        (90, 255, 0, 512, 0),
        # A thread more is a warp more.
        (90, 128, 0, 129, 3),
    ],
)
def test_blocks_per_multiprocessor(sm, registers, shared, threads, blocks):
    assert blocks_per_multiprocessor(TARGETS[sm], registers, shared, threads) == blocks


def test_littles_law():
    # Three blocks of 128 threads that each move 96 bytes in two round trips.
    assert in_flight_bytes(Pass(9, 2.0, 6, 0, 64, 32, []), 128, 3) == 18 << 10
    assert in_flight_bytes(Pass(9, 0.0, 6, 0, 64, 32, []), 128, 3) is None
    assert in_flight_bytes(Pass(9, 2.0, 6, 0, 0, 0, []), 128, 3) is None
    # 3,350 GB/s x 700 cycles / 1.98 GHz = 1,184,343 bytes on 132 multiprocessors.
    assert TARGETS[90].idle_bytes == pytest.approx(8972.3, abs=0.1)


@pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
def test_a_kernel_from_end_to_end(tmp_path):
    out = tmp_path / "x.json"
    done = run("static.py", "--sm", 90, "--only", "^run_count$", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert result["benchmark"] == "static" and result["dtype"] == "float32"
    assert result["provenance"]["triton"] in done.stdout.splitlines()[0]
    assert result["devices"]["90"]["multiprocessors"] == 132
    assert (row["kernel"], row["sm"]) == ("run_count", 90)
    # 1,024 positions a block of 256 threads, and one position more than ids.
    assert row["programs"] == 1025 and row["threads"] == 256
    assert row["spilled_bytes"] == 0 and 8 <= row["registers"] <= 64
    # Four positions a thread, each key and the one before it; a count a block.
    assert row["loads_by_bits"] == {"32": 8} and row["stores_by_bits"] == {"32": 1}
    assert row["passes"][0]["loaded_bytes"] == 8 * 4 * 256
    assert done.stdout.endswith("\n".join(static.lines([row])) + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sm", "70"], "argument --sm: invalid choice: 70"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--only", "("], "argument --only: not a regular expression: "),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
        ([], "TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(static, "INTERPRETED", True)
    monkeypatch.setattr(static, "TRITON_ERROR", None)
    with pytest.raises(SystemExit) as stop:
        static.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("bench/static.py: error: ") and message in err


@pytest.mark.skipif(TRITON_ERROR is not None, reason=str(TRITON_ERROR))
def test_tools_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    import triton

    tools = tmp_path / "backends" / "nvidia" / "bin"
    tools.mkdir(parents=True)
    (tools / "ptxas").touch(0o755)
    monkeypatch.setattr(static, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SystemExit) as stop:
        static.main([])
    assert stop.value.code == 2
    said = f"Triton {triton.__version__} has no cuobjdump, nvdisasm in {tools}\n"
    assert capsys.readouterr().err == "bench/static.py: error: " + said


def test_the_table_of_the_page_is_that_of_the_record():
    rows = json.loads((RESULTS / "static-3.7.1.json").read_text(encoding="utf-8"))["rows"]
    assert {row["sm"] for row in rows} == set(TARGETS) and len(rows) == 66
    assert [row["kernel"] for row in rows if row["spilled_bytes"]] == []
    table = [line for line in static.lines([r for r in rows if r["sm"] == 90]) if line[:1] == "|"]
    page = (BENCH.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.partition("## Static figures")[2].partition("\n## ")[0]
    assert len(table) == 24 and "\n".join(table) in section
