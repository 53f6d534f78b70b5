"""distributed.py: two gloo processes that stay one table while its rows grow."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from esapn_kernels.distributed import replicate

# Against ranks that wait for each other for ever; a busy machine must not reach it.
LONGEST_SECONDS = 1800
WORKER = Path(__file__).with_name("distributed_worker.py")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


# Each in processes of its own would spend its time importing torch.
CASES = [
    "ddp",
    "ddp_accumulate",
    "ddp_tails",
    "buffers",
    "buffers_of_ddp",
    "fsdp",
    "adopt",
    "compacted",
    "masks",
    "demoted",
    "refusal",
    "budgets",
    "differing",
    "thawed",
    "smallest",
]


def run(cases, folder, world=2):
    """Cases one after another in one process a rank, until one fails.

    Returns by case the results of every rank, or of the case that failed what the ranks printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), ",".join(cases)]
    said = [folder / f"{rank}.txt" for rank in range(world)]
    ranks = []
    for rank, path in enumerate(said):
        with path.open("w") as output:
            arguments = [*command, str(rank), str(world), str(folder)]
            ranks.append(
                subprocess.Popen(
                    arguments, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    end = time.monotonic() + LONGEST_SECONDS
    try:
        # A rank that failed leaves the others waiting for it.
        while any(rank.poll() is None for rank in ranks) and not any(r.returncode for r in ranks):
            assert time.monotonic() < end, f"the ranks of {cases} wait for each other"
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = {}
    for case in cases:
        if any((folder / f"{case}.{rank}.passed").exists() for rank in range(world)):
            saved = [folder / f"{case}.{rank}.pt" for rank in range(world)]
            found[case] = [torch.load(path, weights_only=True) for path in saved]
    if any(rank.returncode for rank in ranks):
        failed = next((case for case in cases if case not in found), cases[-1])
        found[failed] = "\n".join([f"{failed} failed", *(path.read_text() for path in said)])
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function from a case to the results of both ranks; cases behind a failed one run anew."""
    found = {}
    while waiting := [case for case in CASES if case not in found]:
        found.update(run(waiting, tmp_path_factory.mktemp("ranks")))

    def of(case):
        assert isinstance(found[case], list), found[case]
        return found[case]

    return of


@pytest.fixture(scope="module")
def worker():
    specification = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def assert_same(one, other, close=False):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if close:
            torch.testing.assert_close(value, other[key], rtol=1e-9, atol=1e-9, msg=key)
        else:
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize(
    "case, options",
    [("ddp", {}), ("ddp_accumulate", {"accumulate": 2}), ("ddp_tails", {"init": "tails"})],
)
def test_two_ranks_train_as_one(case, options, worker, results):
    """DDP, ids and promotions of each rank's own: the same bits, and those of one process."""
    first, second = results(case)
    assert first["lengths"][-1] > first["lengths"][0], "the arena did not grow"
    for part in ("state", "adam"):
        assert_same(first[part], second[part])
    expected = worker.alone(2, **options)
    assert_same(first["state"], expected["state"], close=True)
    assert_same(first["adam"], expected["adam"], close=True)


def test_ddp_leaves_locations_alone(results):
    """Where ranks differ, DDP's broadcast would say that rank 0's rows are everybody's."""
    ours = results("buffers")[1]
    assert ours["before"].sum() > 40 * 2 and torch.equal(ours["after"], ours["before"])
    assert float(ours["seen"]) == 0, "the model's other buffers are DDP's as ever"
    theirs = results("buffers_of_ddp")[1]
    assert not torch.equal(theirs["after"], theirs["before"])


def test_fully_shard(results):
    first, second = results("fsdp")
    assert_same(first["state"], second["state"])
    assert torch.equal(first["head"], second["head"])
    assert first["local"] != first["head"].shape, "the rest of the model is sharded"
    assert set(first["state"]["arena.page_level"].tolist()) > {0, -1}


def test_the_first_rank_is_adopted(results):
    first, second = results("adopt")
    assert_same(first["state"], second["state"])


def test_compaction_in_steps_keeps_the_ranks_together(results):
    first, second = results("compacted")
    assert first["rows"] == second["rows"] > 0
    assert torch.equal(first["starts"], second["starts"])


def test_masks_of_promotions(results):
    """Each rank hears of its own ids what became of them, whoever asked."""
    first, second = results("masks")
    # Rank 0 asks for 1, rank 1 for 3, 7 and 9; rank 0 also holds 3, masked.
    assert first["moved"].tolist() == [[True, False], [True, True]]
    assert second["moved"].tolist() == [True, True, True]
    assert first["nothing"].shape == second["nothing"].shape == (0,)
    assert first["resized"].tolist() == [[True, True]] and second["resized"].shape == (0,)
    assert torch.equal(first["sizes"], second["sizes"])
    assert first["sizes"][:10].tolist() == [2, 8, 8, 3, 2, 2, 2, 3, 2, 3]


def test_demotions_are_made_together(results):
    first, second = results("demoted")
    assert_same(first["state"], second["state"])
    assert_same(first["adam"], second["adam"])
    wanted = set(first["ids"].tolist()) | set(second["ids"].tolist())
    # Rank 0 masks its odd ids, but for those that rank 1 names.
    shrunk = {i for i in first["ids"].tolist() if i % 2 == 0} | set(second["ids"].tolist())
    assert shrunk < wanted
    expected = [3 if i in shrunk else 8 if i in wanted else 2 for i in range(40)]
    assert first["sizes"].tolist() == second["sizes"].tolist() == expected
    for rank in (first, second):
        assert rank["resized"].all() and rank["nothing"].shape == (0,)
        assert rank["moved"].tolist() == [i in shrunk for i in rank["ids"].tolist()]
    assert first["said"].startswith("RuntimeError: another rank")
    assert second["said"].startswith("IndexError")
    assert first["shrunk"].shape == (0,) and second["shrunk"].tolist() == [True, True]


def test_a_refusal_is_everybodys(results):
    first, second = results("refusal")
    assert [text.split(":")[0] for text in first["said"]] == [
        "RuntimeError",
        "ValueError",
        "ValueError",
    ]
    assert [text.split(":")[0] for text in second["said"]] == [
        "IndexError",
        "RuntimeError",
        "RuntimeError",
    ]
    assert "another rank raised" in first["said"][0] and "another rank" in second["said"][2]
    for rank in (first, second):
        assert rank["same"] and rank["moved"].tolist() == [True]


def test_refused(tmp_path):
    found = run(["refused"], tmp_path, world=1)["refused"]
    assert isinstance(found, list), found
    said = found[0]["said"]
    assert "ValueError" in said["no table"]
    for name, words in {
        "sparse": "sparse=False",
        "fused": "torch.optim",
        "twice": "already",
        "max_norm": "max_norm",
        "wrapped": "before",
    }.items():
        assert said[name].startswith("RuntimeError") and words in said[name], name
    assert said["fused later"].startswith("ValueError") and "replica" in said["fused later"]
    assert said["copy"] and said["copy replicated"] is None and said["collection"]


def test_rows_without_room_stay_on_all_ranks(results):
    first, second = results("budgets")
    assert first["refused"] == second["refused"] > 0 and first["within"] and second["within"]
    assert first["table"].keys() == second["table"].keys()
    assert all(torch.equal(first["table"][key], t) for key, t in second["table"].items())
    assert any(bool(mask.any()) for mask in first["moved"])


def test_ranks_with_other_tables_are_refused(results):
    for rank in results("differing"):
        assert len(rank["said"]) == 6 and all("differ" in text for text in rank["said"])


def test_a_frozen_table_is_averaged_once_it_trains(results):
    first, second = results("thawed")
    assert first["frozen"] and second["frozen"]
    assert_same(first["grads"], second["grads"])
    assert first["grads"]["arena.storage"].any()


def test_resizing_to_the_smallest_size_keeps_the_ranks_together(results):
    first, second = results("smallest")
    assert (first["said"], second["said"]) == ("RuntimeError", "IndexError")
    assert first["moved"].tolist() == second["moved"].tolist() == [True]
    assert torch.equal(first["sizes"], second["sizes"])


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        replicate(nn.Linear(2, 2))
