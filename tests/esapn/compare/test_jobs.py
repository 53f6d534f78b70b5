"""The plan of a comparison: its header, its jobs, and which of them have a record."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from esapn.compare.jobs import is_finished
from esapn.compare.records import load
from esapn.config import CHOICES, MODES, ConfigError, mode_defaults
from esapn.data.ratings import DataError
from esapn.data.stream import build_stream
from esapn.data.synthetic import synthetic_ratings
from esapn.jsonfile import write_json
from esapn.methods import DEFAULT_METHODS, REFERENCES, method_settings
from tests.esapn.compare.planned import only_job, planned


@pytest.mark.parametrize(
    ("events", "batch_size", "fraction"),
    [
        (600, 50, 0.75),
        (601, 50, 0.75),
        (651, 50, 0.75),
        (100, 50, 0.75),
        (101, 50, 0.99),
        (777, 50, 0.01),
        (1000, 7, 0.29),
        (100, 2, 0.29),
        (1000, 100, 0.999),
    ],
)
@pytest.mark.parametrize("order", CHOICES["order"])
def test_the_header_says_what_the_streams_are(events, batch_size, fraction, order, tmp_path):
    ratings = synthetic_ratings(events, n_users=30, n_items=20)
    cut = {"order": order, "batch_size": batch_size, "train_fraction": fraction}
    header, _ = planned(tmp_path, ratings, tasks=["multiclass", "binary"], **cut)
    for task in header["tasks"]:
        stream = build_stream(ratings, task=task, **cut)
        assert header["data"] == {
            "name": "synthetic",
            "sha256": ratings.checksum,
            "events": len(stream.user),
            "users": stream.n_users,
            "items": stream.n_items,
            "train_events": stream.n_train,
            "counts": ratings.counts,
        }


def test_the_plan_is_complete(tmp_path):
    tasks, modes, seeds = ["multiclass", "binary"], ["tuned", "paper"], range(3)
    header, jobs = planned(tmp_path, tasks=tasks, modes=modes, seeds=seeds)
    assert (header["tasks"], header["modes"], header["seeds"]) == (tasks, modes, [0, 1, 2])
    assert header["order"] == "shuffle" and header["reference"] == REFERENCES
    assert header["info"]["torch"] and header["started"].endswith("+00:00")
    listed = [(m["mode"], m["label"]) for m in header["methods"]]
    assert listed == [(mode, label) for mode in modes for label in DEFAULT_METHODS[mode]]
    expected = {(t, s, *m) for t in tasks for s in seeds for m in listed}
    found = [(j.config.task, j.config.seed, j.config.mode, j.label) for j in jobs]
    assert len(found) == len(expected) and set(found) == expected
    assert [seed for _, seed, *_ in found] == sorted(seed for _, seed, *_ in found)
    for job in jobs:
        settings = method_settings(job.label)[1]
        assert (settings | {"sizes": (1, 2, 4), "order_seed": 0}).items() <= vars(
            job.config
        ).items()
    for method in header["methods"]:
        settings = method_settings(method["label"])[1]
        assert {**MODES[method["mode"]], **settings}.items() <= method["options"].items()
        assert all(f"{key} {value}" in method["text"] for key, value in settings.items())
    json.dumps(header)


def test_what_is_named_twice_is_done_once(tmp_path):
    twice = {"tasks": ["binary"] * 2, "modes": ["paper"] * 2, "methods": ["esapn"] * 2}
    header, jobs = planned(tmp_path, **twice, seeds=iter([3, 3]))
    assert [len(header[name]) for name in ("tasks", "modes", "methods", "seeds")] == [1] * 4
    assert len(jobs) == 1


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (["fixed-4", "esapn-rich", "esapn"], "esapn"),
        (["fixed-4", "esapn-rich", "esapn-argmax"], "esapn-rich"),
        (["fixed-4", "darts"], "fixed-4"),
    ],
)
def test_the_reference_is_among_the_methods(methods, reference, tmp_path):
    assert planned(tmp_path, methods=methods)[0]["reference"] == {"paper": reference}


def test_a_stream_that_cannot_be_built_is_found_when_planning(tmp_path):
    with pytest.raises(DataError, match="fewer than two batches"):
        planned(tmp_path, batch_size=500)
    ratings = replace(synthetic_ratings(600), timestamp=None)
    with pytest.raises(DataError, match="timestamps"):
        planned(tmp_path, ratings, order="time")


def test_names_are_files_of_their_own(tmp_path):
    methods = ["esapn", "esapn,lr=0.1", "esapn,lr=+0.1", "esapn,lr=1e-1", "esapn,hidden=3,lr=0.1"]
    methods += ["fixed-1", "fixed-01", "random-0.1", "random-.1"]
    tasks, modes = CHOICES["task"], tuple(MODES)
    header, jobs = planned(tmp_path, methods=methods, tasks=tasks, modes=modes, seeds=range(12))
    paths = {str(job.path).lower() for job in jobs}
    assert len(paths) == len(jobs) == 2 * 2 * 12 * len(methods)
    for job in jobs:
        assert job.path.parent == tmp_path / "runs" and job.path.suffix == ".json"
        assert not set(job.name) & set('/\\:*?"<>| ')
    # The names that the report looks for.
    write_json(tmp_path / "compare.json", header)
    assert set(load(tmp_path).missing) == {job.name for job in jobs}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("fixed-0", "--fixed-size must be at least 1, got 0"),
        ("random-2", "--promote-probability must lie between 0 and 1, got 2.0"),
        ("power-nan", "--power-scale must be positive and finite, got nan"),
        ("esapn,tower=round", "--tower must be one of norm, plain, got round"),
    ],
)
def test_a_setting_out_of_range_is_found_when_planning(method, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, methods=["biases", method])
    assert str(caught.value) == expected


def test_finished(finished, tmp_path):
    assert is_finished(finished)
    assert not is_finished(replace(finished, folder=tmp_path))
    elsewhere = replace(finished.config, data="copied.csv", device="auto")
    assert is_finished(replace(finished, config=elsewhere))


def test_other_settings_or_data_are_not_finished(finished):
    changed = replace(finished, config=replace(finished.config, lr=0.5, history=2))
    with pytest.raises(ConfigError, match=r"history 5 -> 2, lr 0.001 -> 0.5\); use another --out"):
        is_finished(changed)
    with pytest.raises(ConfigError, match="was made on other data"):
        is_finished(replace(finished, checksum="0" * 64))


def test_a_record_from_before_a_setting_has_its_default(finished, tmp_path):
    content = json.loads(finished.path.read_text())
    for name in ("tail_lr", "row_accumulator", "positive_above"):
        del content["config"][name]
    job = replace(finished, folder=tmp_path)
    job.path.parent.mkdir()
    write_json(job.path, content)
    assert is_finished(job)
    changed = replace(job, config=replace(job.config, row_accumulator=0.1))
    with pytest.raises(ConfigError, match=r"\(row_accumulator 0.0 -> 0.1\)"):
        is_finished(changed)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"config": {}}', '{"config": 3}'])
def test_half_a_record_is_none(content, tmp_path):
    job = only_job(tmp_path)
    job.path.parent.mkdir()
    job.path.write_text(content)
    assert not is_finished(job)


def test_a_mode_has_settings_of_its_own_for_every_task_and_method(tmp_path):
    methods = ("power-1", "fixed-2,row_lr=0.7")
    header, jobs = planned(tmp_path, modes=("tuned",), methods=methods, tasks=CHOICES["task"])
    for job in jobs:
        given = method_settings(job.label)[1]
        expected = mode_defaults("tuned", {**given, "task": job.config.task}) | given
        assert {name: getattr(job.config, name) for name in expected} == expected
    assert len({job.config.row_lr for job in jobs if job.label == "power-1"}) == 2
    first, second = (method["options"] for method in header["methods"])
    rates = {job.config.task: job.config.row_lr for job in jobs if job.label == "power-1"}
    assert first["row_lr"] == ", ".join(f"{rate} ({task})" for task, rate in rates.items())
    assert second["row_lr"] == 0.7 and first["tower"] == "plain"
