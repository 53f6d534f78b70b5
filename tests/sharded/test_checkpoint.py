"""Checkpoints: any number of ranks to any other, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch

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
