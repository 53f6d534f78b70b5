"""A run and its checkpoints: which one it goes on from, which it refuses, when one is saved."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from esapn.config import ConfigError, SearchConfig
from esapn.run import checkpoint
from esapn.run.checkpoint import CheckpointError
from esapn.run.resume import Saver, check_origin, resume_or_start, save_checkpoint
from tests.esapn.tiny import tiny

DATA = "0123456789abcdef"


run_of = partial(tiny, device="cpu")


def test_a_fresh_folder_starts(tmp_path):
    run = run_of()
    assert resume_or_start(run, tmp_path / "absent", DATA) == [] and run.index == 0


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    first, second = run_of(), run_of()
    for _ in range(5):
        first.step()
        save_checkpoint(first, tmp_path, DATA)
    newest = max(tmp_path.glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    passed_over, resumed = resume_or_start(second, tmp_path, DATA)
    assert passed_over.startswith("step-000000005.pt: cut short")
    assert resumed == "resumed at event 200 from step-000000004.pt"
    second.step()
    ours, theirs = (r.walk() for r in (first, second))
    assert ours.test == theirs.test and ours.log == theirs.log

    moved = run_of(data="copied.csv", device="auto")
    assert resume_or_start(moved, tmp_path, DATA) and moved.index == 4


@pytest.mark.parametrize(
    ("changes", "checksum", "expected"),
    [
        ({"lr": 0.5}, DATA, "made with other settings (lr 0.001 -> 0.5); use another --out"),
        ({"seed": 7, "dwell": 1.0}, DATA, "(dwell 0.0 -> 1.0, seed 0 -> 7)"),
        ({}, "theirs", "was made on other data (sha256 0123456789ab...)"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(changes, checksum, expected, tmp_path):
    save_checkpoint(run_of(), tmp_path, DATA)
    run = run_of(**changes)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        resume_or_start(run, tmp_path, checksum)
    assert expected in str(caught.value) and "step-000000000.pt" in str(caught.value)
    assert run.index == 0
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_setting_that_was_removed_is_another_setting(tmp_path):
    config = SearchConfig()
    held = config.to_json()
    check_origin(tmp_path, held, DATA, config, DATA)
    held["depth"] = 3
    with pytest.raises(ConfigError, match=r"\(depth 3 -> None\)"):
        check_origin(tmp_path, held, DATA, config, DATA)


@pytest.mark.parametrize("mode", ["paper", "tuned"])
def test_a_checkpoint_from_before_a_setting_goes_on_with_its_default(tmp_path, mode):
    first = run_of(mode, row_accumulator=0.0)
    for _ in range(3):
        first.step()
    save_checkpoint(first, tmp_path, DATA)
    state = checkpoint.load(tmp_path).state
    for name in ("tail_lr", "row_accumulator", "positive_above"):
        del state["config"][name]
    checkpoint.save(tmp_path, 3, state)
    second = run_of(mode, row_accumulator=0.0)
    (resumed,) = resume_or_start(second, tmp_path, DATA)
    assert resumed == "resumed at event 150 from step-000000003.pt"
    ours, theirs = (r.walk() for r in (first, second))
    assert ours.test == theirs.test and ours.log == theirs.log
    other = run_of(mode, row_accumulator=0.1, tail_lr=0.2)
    with pytest.raises(ConfigError, match=r"\(row_accumulator 0.0 -> 0.1, tail_lr 0.01 -> 0.2\)"):
        resume_or_start(other, tmp_path, DATA)


def test_no_checkpoint_to_go_on_from(tmp_path):
    run = run_of()
    path = checkpoint.save(tmp_path, 3, run.state_dict())
    with pytest.raises(ConfigError, match="is no checkpoint to go on from"):
        resume_or_start(run, tmp_path, DATA)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        resume_or_start(run, tmp_path, DATA)


def test_a_saver_waits_its_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = run_of()
    saver, saved = Saver(tmp_path, DATA, 10.0), []

    def steps() -> list[int]:
        return sorted(int(path.stem.partition("-")[2]) for path in tmp_path.glob("step-*.pt"))

    for now[0] in (100.0, 109.9, 110.0, 115.0, 119.9, 121.0, 500.0, 509.0):
        run.step()
        saver(run)
        saved.append(steps())
    assert saved == [[], [], [3], [3], [3], [3, 6], [6, 7], [6, 7]]
    while not run.done:
        run.step()
    now[0] = 1e9
    saver(run)  # the result is written instead
    assert steps() == [6, 7]


def test_a_saver_of_no_seconds_saves_always(tmp_path):
    run = run_of()
    saver = Saver(tmp_path, DATA, 0.0)
    for _ in range(3):
        run.step()
        saver(run)
    assert checkpoint.load(tmp_path).step == 3
