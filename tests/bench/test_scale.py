"""bench/scale.py: its model against what can be counted by hand, what it prints, its errors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import scale
import torch
from harness.sharded import Job, Machine, Traffic, memory, memory_traffic, own_width, times, wire

from esapn_kernels import ResizableEmbedding, optim
from esapn_kernels.grow import ByCounts
from esapn_kernels.row_counts import RowCounts
from esapn_kernels.sharded.placement import Placement
from tests.bench.small import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
CHECKED = ROOT / "bench" / "results" / "scale-check-cpu.json"
SMALL = ["--ids", "1e5", "--world", "4", "--lookups", "1000", "--events", "1e6"]
COIN = Traffic(torch.ones(2).double(), torch.tensor([0.5, 0.5]).double())
"""Two ids, each at every second lookup."""

TWO = Job(COIN, world=2, lookups=2, events=32, sizes=(2, 4), comm="fp32")


def skewed(**more) -> Job:
    return Job(Traffic.zipf(100_000, 1.05), **{"world": 4, "lookups": 5000, "events": 1e7, **more})


def test_the_chances_of_zipf():
    ids, exponent = 50_000, 0.8
    traffic = Traffic.zipf(ids, exponent)
    assert traffic.ids == ids and traffic.count.min() >= 1
    assert float(traffic.count @ traffic.chance) == pytest.approx(1)
    exact = torch.arange(1, ids + 1, dtype=torch.float64) ** -exponent
    exact /= exact.sum()
    found = torch.repeat_interleave(traffic.chance, traffic.count.long())
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)
    torch.testing.assert_close(found[:4096], exact[:4096], rtol=1e-6, atol=0)


@pytest.mark.parametrize("ids", [1, 5, 4096, 4097, 5000])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_every_id_has_a_class(ids, exponent):
    traffic = Traffic.zipf(ids, exponent)
    assert traffic.ids == ids and float(traffic.count @ traffic.chance) == pytest.approx(1)


@pytest.mark.parametrize("traffic", [Traffic.zipf(20_000, 1.05), Traffic.cubed(20_000)])
def test_distinct_ids_are_those_of_draws(traffic):
    chances = torch.repeat_interleave(traffic.chance, traffic.count.long())
    lookups = 8000
    draws = torch.multinomial(chances, 10 * lookups, replacement=True).view(10, lookups)
    drawn = sum(len(ids.unique()) for ids in draws) / len(draws)
    assert Job(traffic, 4, lookups).asked == pytest.approx(drawn, rel=0.01)


def test_cubed_is_where_cubes_fall():
    draws = (torch.rand(200_000, dtype=torch.float64) ** 3 * 10).long()
    found = torch.bincount(draws, minlength=10) / len(draws)
    torch.testing.assert_close(found.double(), Traffic.cubed(10).chance, rtol=0.05, atol=0)


def test_bytes_by_hand():
    # Of two lookups of two ids 1.5 are distinct; half of them are the other rank's.
    assert TWO.asked == 1.5
    assert wire(TWO) == {
        "splits": 8 * 4,  # lengths, ids, counts, batch size
        "lengths": 8,
        "ids": 8 * 0.75,
        "counts": 4 * 0.75,
        "outputs": 4 * 4 * 0.75,
        "gradients": 4 * 4 * 0.75,
        "hops": 4 * (2 * 4 + 4) * 2 / 2,
    }
    plain = wire(replace(TWO, dedup=False, comm="bf16", tables=2))
    assert "counts" not in plain and plain["splits"] == 8 * 3 and plain["lengths"] == 16
    assert plain["ids"] == 8 and plain["outputs"] == plain["gradients"] == 2 * 4
    assert plain["hops"] == 2 * 48
    assert "counts" not in wire(replace(TWO, growth=False))


def test_sizes_are_those_of_the_counts():
    assert TWO.row_size.tolist() == [4, 4]  # 16 times each
    assert replace(TWO, events=31.9).row_size.tolist() == [2, 2]
    assert replace(TWO, events=8, scale=2.0).row_size.tolist() == [4, 4]
    assert replace(TWO, events=0).row_size.tolist() == [2, 2]
    assert TWO.asked_size == 4 and TWO.stepped == (2 * (1 - 0.5**4) / 2, 4)
    # Ids and rows of four numbers, their level, there and back.
    assert own_width(TWO) == (9 + 2 * 4 * 4) * 0.75


def test_times_by_hand():
    machine = Machine(nic=2.0, efficiency=0.5, hbm=4.0, latency=100.0)
    assert TWO.owned == (0.5, 0.5)
    sent, moved, found = wire(TWO), memory_traffic(TWO), times(TWO, machine)
    exchanged = sum(sent[name] for name in ("splits", "lengths", "ids", "counts"))
    assert found["ids"] == exchanged + 4 * 100
    assert found["outputs"] == found["gradients"] == 12 + 100
    assert found["hops"] == 48 + 100
    assert found["look up"] == moved["look up"] / 4
    # Id, start, level, row and output of 1.5 ids.
    assert moved["look up"] == 1.5 * (8 + 4 + 1 + 16 + 16)
    # Gradients of outputs and of rows; of 1.875 / 2 distinct rows and sums, there and back.
    assert moved["step"] == 1.5 * (16 + 2 * 16) + 2 * 0.9375 * (16 + 4)
    assert moved["spread"] == 2 * (1.5 * 16 + 2 * 16)
    parts = ("ids", "look up", "outputs", "spread", "gradients", "step", "hops")
    assert found["sum"] == pytest.approx(sum(found[part] for part in parts))
    assert found["ahead"] == pytest.approx(found["sum"] - found["ids"])


def test_the_busiest_owner():
    job = skewed(dedup=False)
    ids = torch.arange(4096)
    place = Placement(100_000, 4)
    hottest = int(place.owner(place.position(ids[:1])))
    load = (
        torch.zeros(4)
        .double()
        .index_add_(0, place.owner(place.position(ids)), job.traffic.chance[:4096])
    )
    load += (1 - load.sum()) / 4
    # The ids behind the first 4,096 hardly count.
    assert job.owned == pytest.approx((float(load.min()), float(load.max())), rel=1e-3)
    assert int(load.argmax()) == hottest
    assert job.owned[1] > skewed().owned[1] > 0.25
    slower = times(job, Machine(latency=0))["outputs"]
    assert slower == pytest.approx(wire(job)["outputs"] / 40e9 * 3 * job.owned[1] * 4 / 3)


def test_one_rank_sends_nothing():
    alone = skewed(world=1)
    assert not any(wire(alone).values())
    found = times(alone, Machine())
    assert found["ids"] == found["outputs"] == found["hops"] == 0 < found["look up"]


def test_what_brings_more_and_less():
    job = skewed()
    assert job.asked < skewed(dedup=False).asked == pytest.approx(5000)
    assert wire(skewed(comm="fp32"))["outputs"] == 2 * wire(job)["outputs"]
    assert Job(Traffic.zipf(100_000, 0.8), 4, 5000).asked > job.asked
    held = [
        memory(skewed(optimizer=o))["total"] for o in ("sgd", "rowwise_adagrad", "adagrad", "adam")
    ]
    assert held == sorted(held) and len(set(held)) == 4
    assert memory(skewed(growth=False))["total"] < memory(job)["total"] < memory(job)["fixed"]
    assert memory(skewed(scale=4.0))["rows"] > memory(job)["rows"]
    assert memory(skewed(world=8))["rows"] < memory(job)["rows"]
    assert own_width(job) < wire(job)["outputs"] + wire(job)["gradients"]
    fewer = Job(Traffic.zipf(100_000, 0.8), 4, 5000, events=1e5)
    assert fewer.asked_size < replace(fewer, events=1e7).asked_size


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("sgd", lambda table: optim.SGD(table, lr=0.1)),
        ("rowwise_adagrad", lambda table: optim.Adagrad(table, lr=0.1, rowwise=True)),
        ("adagrad", lambda table: optim.Adagrad(table, lr=0.1)),
        ("adam", lambda table: optim.Adam(table)),
    ],
)
def test_memory_is_that_of_a_table(name, make):
    ids = 4096
    job = Job(Traffic.zipf(ids, 1.0), 1, 100, events=1e6, optimizer=name)
    table = ResizableEmbedding(ids, 128, initial_size=job.row_size.long())
    found, report = memory(job), table.memory_report()
    assert found["rows"] == report.payload + report.slack
    # Beside the locations a table holds its sizes and its count of moves.
    assert 0 <= report.locations - found["starts"] - found["levels"] < 100
    assert found["hops"] == report.chain
    state = make(table).state[table.arena.parameter]
    assert found["optimizer"] == sum(t.nbytes for key, t in state.items() if key != "clock")
    assert found["counts"] == RowCounts(table.arena).u.nbytes
    assert found["fixed"] == report.fixed + {"sgd": 0, "adagrad": 4 * ids * 128}.get(
        name, 4 * ids if name == "rowwise_adagrad" else 8 * ids * 128 + 4 * ids
    )


def test_noted_ids_are_those_of_a_growth():
    job = Job(Traffic.zipf(500, 0.0), 1, 100, events=1, every=10, dedup=False)
    table = ResizableEmbedding(500, 128)
    growth = ByCounts(torch.nn.Sequential(table), "50%", every=10)
    beside = growth.counter_bytes("0")
    for _ in range(10):
        table(torch.arange(100))
    assert growth.counter_bytes("0") - beside == pytest.approx(memory(job)["noted"])


def test_starts_are_wider_past_two_to_the_31():
    # Rows of 128 numbers, 2^24 of them: 2^31 elements, which int32 does not count.
    job = Job(Traffic.zipf(1 << 24, 0.0), 1, 100, events=1e14)
    found = memory(job)
    assert found["rows"] == 4 << 31 and found["starts"] == 8 * ((1 << 24) + 1)


def test_a_run(tmp_path, capsys):
    out = tmp_path / "x.json"
    assert scale.main([*SMALL, "--zipf", "1.05", "0.8", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "scale" and result["provenance"]["torch"]
    assert result["settings"]["ids"] == 100_000 and result["assumed"]["hbm"] == 3.3e12
    first, second = result["jobs"]
    assert first["zipf"] == 1.05 and second["zipf"] == 0.8 and second["events"] == 1e6
    for job in result["jobs"]:
        assert sum(job["rows_per_size"].values()) == pytest.approx(100_000)
        assert sum(job["sent"].values()) == job["sent_sum"]
        assert [way["sent"] for way in job["ways"]][1] == job["sent_sum"]
        assert job["seconds"]["sum"] == job["ways"][1]["seconds"]
    text = capsys.readouterr().out.splitlines()
    assert text[2:] == scale.lines(scale.jobs_of(scale.parse([*SMALL])), 128)
    assert text[0].startswith("computed: 100,000 ids in 1 tables on 4 GPUs")
    assert text[1].startswith("assumed: ")


def test_a_run_as_a_command():
    done = run("scale.py", *SMALL, "--zipf", "1", "--tables", 3, "--no-dedup", "--no-growth")
    assert done.returncode == 0 and not done.stderr
    assert "counts" not in done.stdout and "Zipf 1\n" in done.stdout


def test_the_page_has_what_the_command_prints(capsys):
    scale.main([])
    assert capsys.readouterr().out in PAGE


def test_figures_of_the_page():
    first, second = scale.jobs_of(scale.parse([]))
    (many, _) = scale.jobs_of(scale.parse(["--tables", "26"]))
    hops = [f"{1e3 * job['seconds']['hops']:.2f}" for job in (many, first)]
    assert f"the hops take {hops[0]} ms in place of {hops[1]}" in PAGE
    for job in (first, second):
        held, sent = job["memory"]["sgd"], job["sent"]
        assert held["fixed"] / held["rows"] == pytest.approx(50, rel=0.1)
        assert (sent["outputs"] + sent["gradients"]) / job["sent_sum"] > 0.97
    assert first["own_width"] / first["sent_sum"] < 0.5
    assert second["own_width"] / second["sent_sum"] == pytest.approx(1 / 7, rel=0.05)
    assert f"{first['ways'][2]['largest']:.1f} times the mean at Zipf 1.05" in PAGE


def test_the_page_has_what_was_counted():
    result = json.loads(CHECKED.read_text())
    assert result["benchmark"] == "scale" and not scale.failures(result["check"])
    assert "\n".join(scale.checked(result["check"])) in PAGE
    assert {row["world"] for row in result["check"]} == {2, 4} and len(result["check"]) == 16


ROW = {
    "world": 2,
    "dedup": True,
    "comm": "fp32",
    "growth": True,
    "model": 1e6,
    "counted": 1.01e6,
    "ratio": 1.01,
    "written": None,
    "worst": ("ids", 0.99),
    "uneven": 1.1,
}


def test_what_the_check_fails_on():
    assert scale.failures([ROW]) == []
    what = "2 ranks, dedup True, fp32, growth True: "
    wrong = {**ROW, "worst": ("ids", 0.97)}
    assert scale.failures([wrong]) == [f"{what}ids is 0.9700 of the model, all 1.0100"]
    assert scale.failures([{**ROW, "uneven": 1.31}]) == [f"{what}a rank sends 1.31 times the mean"]
    head, line = scale.checked([ROW])
    assert len(head) == len(line) and line.split()[-2:] == ["-", "1.100"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--ids", "1.5"], "argument --ids: invalid int value: '1.5'"),
        (["--ids", "inf"], "argument --ids: invalid int value: 'inf'"),
        (["--ids", "10"], "--ids must be at least --tables x --world, 64"),
        (["--ids", "4e9"], "--ids: a sharded table has 1 to 3e9 rows, got 4000000000"),
        (["--zipf", "-1"], "argument --zipf: must be in [0, 4], got -1"),
        (["--zipf", "nan"], "argument --zipf: must be in [0, 4], got nan"),
        (["--nic", "0"], "argument --nic: must be at least 1, got 0"),
        (["--events", "1", "2", "3"], "--events needs one number, or 2, as --zipf has"),
        (["--lookups", "2", "--tables", "3"], "--lookups must be at least --tables, 3"),
        (["--comm", "fp8"], "argument --comm: invalid choice: 'fp8'"),
        (["--out", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        scale.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert re.match(r"bench/scale\.py: error: ", err) and message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(find_spec("torchrec") is not None, reason="TorchRec is here")
def test_without_torchrec_one_line_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        scale.main(["--check"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("bench/scale.py: error: --check needs TorchRec, which `make sharded`")


def test_numbers_of_flags():
    assert scale.whole(1)("1e9") == 10**9
    assert math.isclose(scale.number(0)("2.5"), 2.5)
