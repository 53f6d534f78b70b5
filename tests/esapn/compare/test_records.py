"""A comparison's folder as it is read: whole, with runs missing, and broken."""

from __future__ import annotations

import json
import math

import pytest

from esapn.compare.contrasts import paired_contrasts
from esapn.compare.records import ReportError, load
from tests.esapn.fake_comparison import write_comparison


def test_ranking_does_not_depend_on_which_seeds_are_missing(tuned, tmp_path):
    # Later seeds have the higher losses: without them a method's plain mean looks better.
    gone = {f"binary-tuned-biases-s{seed}" for seed in (2, 3, 4)}
    write_comparison(tmp_path / "out", tasks=("binary",), modes=("tuned",), skip=gone)
    partial = load(tmp_path / "out")
    assert set(partial.missing) == gone
    group = partial.groups[0]
    assert group.mean("biases", "loss") < group.mean("fixed-2", "loss")
    assert group.finished[-1].label == tuned.finished[-1].label == "biases"
    row = next(row for row in paired_contrasts(group) if row.name == "biases")
    assert row.loss.difference.n == 2


def test_runs_without_a_finite_loss_are_set_apart(tmp_path):
    def change(record):
        if (record["label"], record["seed"]) == ("fixed-4", 1):
            record["test"]["loss"] = math.nan
        if (record["label"], record["seed"]) == ("fixed-8", 1):
            record["test"]["loss"] = None
        if record["label"] == "fixed-16":
            record["test"]["auc"] = math.nan

    write_comparison(tmp_path / "out", tasks=("binary",), modes=("tuned",), change=change)
    comparison = load(tmp_path / "out")
    assert comparison.not_finite == ("binary-tuned-fixed-4-s1", "binary-tuned-fixed-8-s1")
    group = comparison.groups[0]
    assert set(group.values("fixed-4", "loss")) == {0, 2, 3, 4}
    assert group.interval("fixed-16", "auc") is None


def test_folder_without_a_comparison(tmp_path):
    with pytest.raises(ReportError, match=r"no compare\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[" * 200_000, "not readable as JSON: nested too deeply"),
        ('{"data": 1, "tasks": {}, "modes": null}', "lacks data, tasks, modes, seeds"),
        ("[]", "lacks data, tasks"),
        ("{}", "lacks data, tasks"),
    ],
)
def test_broken_header(tmp_path, text, message):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(ReportError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "compare.json" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: None, "not readable as JSON"),
        (lambda record: record.pop("bytes"), "lacks bytes"),
        (lambda record: record.update(test=1, bytes=[], config=None), "lacks test, bytes, config"),
        (lambda record: record.update(data="x"), "other data"),
        (lambda record: record["test"].pop("loss"), "lacks loss"),
        (lambda record: record["bytes"].pop("serving_peak"), "lacks bytes serving_peak"),
        (lambda record: record["bytes"].update(serving=0), "must be positive"),
        (lambda record: record["data"].update(sha256="other"), "other data"),
    ],
)
def test_broken_run(tmp_path, edit, message):
    folder = write_comparison(tmp_path / "out", tasks=("binary",), modes=("paper",))
    path = folder / "runs" / "binary-paper-darts-s2.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text("{" if "JSON" in message else json.dumps(record))
    with pytest.raises(ReportError, match=message) as caught:
        load(folder)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
