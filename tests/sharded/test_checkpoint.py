"""Checkpoints: any number of ranks to any other, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from esapn_kernels.sharded import read, update
from esapn_kernels.sharded.reading import Served
from tests.sharded.beside import OPTIMIZERS


def compare(found: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert found["sizes"] == expected["sizes"]
    for kind in ("rows", "dense"):
        parts = found[kind], expected[kind]
        pairs = (
            ((parts[0][name], parts[1][name]) for name in expected[kind])
            if kind == "rows"
            else zip(*parts, strict=True)
        )
        for mine, other in pairs:
            torch.testing.assert_close(
                torch.tensor(mine), torch.tensor(other), rtol=rtol, atol=atol
            )


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_other_numbers_of_ranks_go_on_as_one_would(ranks, tmp_path, optimizer):
    ranks(1).run("start", folder=str(tmp_path), optimizer=optimizer)
    shutil.copytree(tmp_path, tmp_path / "whole")
    expected = ranks(1).run(
        "train_a_part", folder=str(tmp_path / "whole"), first=0, last=8, optimizer=optimizer
    )[0]
    for part, world in enumerate((2, 3, 4, 1)):
        found = ranks(world).run(
            "train_a_part", folder=str(tmp_path), first=2 * part, last=2 * part + 2,
            optimizer=optimizer,
        )  # fmt: skip
        assert all(other == found[0] for other in found)
    compare(found[0], expected)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("half_life", [float("inf"), 40.0])
def test_growth_goes_on(ranks, tmp_path, world, half_life):
    ranks(world).run("restart_with_growth", folder=str(tmp_path), half_life=half_life)


def test_growth_goes_on_on_other_numbers_of_ranks(ranks, tmp_path):
    """Where no budget binds, sizes go by counts, whoever counts."""
    ranks(1).run("start", folder=str(tmp_path), optimizer="sgd")
    shutil.copytree(tmp_path, tmp_path / "whole")
    arguments = {"folder": str(tmp_path / "whole"), "first": 0, "last": 9}
    expected = ranks(1).run("growth_on_other_ranks", **arguments)[0]
    for first, last, world in ((0, 3, 2), (3, 6, 4), (6, 9, 3)):
        arguments = {"folder": str(tmp_path), "first": first, "last": last}
        found = ranks(world).run("growth_on_other_ranks", **arguments)
    assert found[0] == expected


@pytest.mark.parametrize("world", [1, 3])
def test_the_background_writes_what_was_there(ranks, tmp_path, world):
    ranks(world).run("written_in_the_background", folder=str(tmp_path))


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "saved"
    ranks(2).run("save_whole", path=str(path))
    return path


def test_a_folder_that_exists_is_left_alone(ranks, saved):
    before = sorted(p.stat().st_mtime_ns for p in saved.iterdir())
    for said in ranks(2).run("save_twice", path=str(saved)):
        assert "exists: save to another folder" in said
    assert sorted(p.stat().st_mtime_ns for p in saved.iterdir()) == before


@pytest.mark.parametrize("world", [2, 3])
def test_what_cannot_be_read_changes_nothing(ranks, saved, tmp_path, world):
    for name, spoil in {
        "none": lambda path: shutil.rmtree(path),
        "empty": lambda path: (shutil.rmtree(path), path.mkdir()),
        "cut": cut,
        "one lost": lambda path: next(path.glob("*.distcp")).unlink(),
        "no metadata": lambda path: (path / ".metadata").unlink(),
        "spoilt metadata": lambda path: (path / ".metadata").write_bytes(b"not a pickle"),
    }.items():
        path = tmp_path / name
        shutil.copytree(saved, path)
        spoil(path)
        for said in ranks(world).run("load_refused", path=str(path)):
            assert "cannot be read" in said or "there is no checkpoint" in said, (name, said)
            assert "\n" not in said


def cut(path) -> None:
    """The largest file ends in the middle."""
    largest = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_what_is_of_something_else_changes_nothing(ranks, saved, tmp_path):
    dcp.save({"a": torch.zeros(3)}, checkpoint_id=tmp_path / "foreign", no_dist=True)
    for said in ranks(2).run("load_refused", path=str(tmp_path / "foreign")):
        assert "is no checkpoint of sharded tables" in said
    for said in ranks(2).run("load_refused", path=str(saved), optimizer="adam"):
        assert "was saved with rule adagrad, not adam" in said
    for said in ranks(2).run("load_refused", path=str(saved), init="tails"):
        assert "was saved with init isometric, not tails" in said


def test_one_machine_reads_it(ranks, saved):
    """With the package, and in NumPy by the reader of docs/serving.md."""
    ids = list(range(0, 103, 5))
    expected = np.array(ranks(4).run("outputs_of", path=str(saved), ids=ids)[0])
    tables = read(saved)
    assert {name: t.num_embeddings for name, t in tables.items()} == {
        "t": 103, "u": 60, "v": 37, "w": 50,
    }  # fmt: skip
    assert len(tables["t"].sizes_of().unique()) > 1
    found = tables["t"](torch.tensor(ids)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_every_row_is_written_once(saved):
    entries = dcp.FileSystemReader(saved).read_metadata().state_dict_metadata
    for name, rows in (("t", 103), ("u", 60)):
        chunks = entries[f"tables.{name}.levels"].chunks
        assert sum(chunk.sizes[0] for chunk in chunks) == rows
        assert sorted(chunk.offsets[0] for chunk in chunks) == [0, rows // 2]


def test_other_ways_to_save_say_so(ranks):
    for said in ranks(2).run("plain_saving"):
        assert len(said) == 2
        assert "esapn_kernels.sharded.save" in said[0]
        assert "esapn_kernels.sharded.load" in said[1]


@pytest.mark.parametrize("world", [1, 3])
def test_changes_bring_what_serves_up_to_date(ranks, tmp_path, world):
    demoted = ranks(world).run("write_changes", folder=str(tmp_path))
    assert sum(demoted) > 0
    serving, expected = read(tmp_path / "whole"), read(tmp_path / "expected")
    for part in range(2):
        update(serving, tmp_path / f"changes-{part}")
    for name, table in serving.items():
        assert torch.equal(table.sizes_of(), expected[name].sizes_of())
        assert torch.equal(table.chain, expected[name].chain)
        for row in range(table.num_embeddings):
            assert torch.equal(table.arena.read(row), expected[name].arena.read(row))
    written = [dcp.FileSystemReader(tmp_path / f"changes-{i}").read_metadata() for i in range(2)]
    rows = [part.state_dict_metadata["tables.t.ids"].size[0] for part in written]
    assert all(0 < n < 103 for n in rows)
    with pytest.raises(ValueError, match="holds changes, not checkpoint"):
        read(tmp_path / "changes-0")
    with pytest.raises(ValueError, match="holds checkpoint, not changes"):
        update(serving, tmp_path / "whole")
    with pytest.raises(ValueError, match="number 1 since the mark, and the tables have taken 2"):
        update(serving, tmp_path / "changes-0")
    with pytest.raises(ValueError, match="number 2 since the mark, and the tables have taken 0"):
        update(read(tmp_path / "whole"), tmp_path / "changes-1")
    with pytest.raises(ValueError, match="the changes are of the tables"):
        update(Served(t=serving["t"]), tmp_path / "changes-0")
    update(read(tmp_path / "whole"), tmp_path / "nothing")


def test_other_optimizers_are_refused_and_state_that_was_not_there_goes(ranks, tmp_path):
    for said in ranks(2).run("other_optimizers", folder=str(tmp_path)):
        assert said == [
            "the optimizer was saved by ['Adam'], not ['Adagrad']",
            "the optimizer that was saved steps other parameters, or in other groups",
            "the optimizer that was saved steps other parameters, or in other groups",
        ]


@pytest.mark.parametrize("kind", ["row_wise", "table_wise"])
def test_tables_of_other_kernels_are_not_saved_wrong(ranks, kind):
    for said in ranks(2).run("beside_others", kind=kind):
        assert "plain is sharded by TorchRec's own kernels" in said


def test_a_rule_that_counts_says_so_to_checkpoints(ranks, tmp_path):
    for said in ranks(2).run("growth_of_their_own", folder=str(tmp_path)):
        assert "Mine counts lookups" in said
