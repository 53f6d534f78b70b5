"""The sentences of a group are made of its numbers."""

from __future__ import annotations

import re

import pytest

from esapn.compare.records import load
from esapn.compare.summary import summary
from tests.esapn.fake_comparison import write_comparison


def text_of(folder, *labels, mode="tuned", seeds=(0, 1, 2), **options) -> str:
    chosen = {"labels": set(labels)} if labels else {}
    options |= {"tasks": options.pop("tasks", ("binary",)), "modes": (mode,)}
    write_comparison(folder / "out", seeds=seeds, **options, **chosen)
    (group,) = load(folder / "out").groups
    return " ".join(summary(group))


def test_it_is_made_of_the_numbers(tuned):
    text = " ".join(summary(tuned))
    assert "The lowest mean loss is that of fixed-128: MSE 0.17930 ± " in text
    assert "The reference, esapn-rich, is number 4 of 18 by loss" in text
    assert "the best control is the family thresholds (between thresholds-4 and" in text
    assert "No method has both a lower mean loss and no more serving bytes than esapn-rich" in text


def test_a_better_method_with_fewer_bytes_is_named(tmp_path):
    text = text_of(tmp_path, mode="paper", seeds=range(5))
    assert "1 method has a lower mean loss with no more bytes than esapn: biases" in text


def test_it_follows_the_numbers(tmp_path):
    def change(record):
        if record["label"] == "fixed-8":
            record["test"] |= {"loss": 0.1 + 1e-4 * record["seed"] ** 2, "accuracy": 0.8}

    text = text_of(tmp_path, "esapn-rich", "fixed-4", "fixed-8", change=change)
    assert "The lowest mean loss is that of fixed-8" in text
    assert "largest of the family, fixed-8, with fewer bytes: 311,872" in text
    assert re.search(r"There the MSE of esapn-rich is 0\.0\d+ higher", text)
    assert "lower loss than 0 and a higher one than 1" in text
    assert "than esapn-rich: fixed-8; the difference is clear for fixed-8." in text


def test_several_classes(tmp_path):
    text = text_of(tmp_path, "esapn-rich", "biases", tasks=("multiclass",))
    assert "differs by" in text and "cross-entropy" in text and "MSE" not in text


def test_one_seed(tmp_path):
    text = text_of(tmp_path, "esapn-rich", "fixed-8", "fixed-16", seeds=(4,))
    assert "one seed, so no interval" in text and "so no verdict" in text


@pytest.mark.parametrize(
    ("labels", "gone", "sentence"),
    [
        (("fixed-4", "biases"), (), "The reference method, esapn-rich, has no finished run."),
        (("esapn-rich",), (), "No control has runs at the bytes of esapn-rich or fewer."),
        (("biases",), ("binary-tuned-biases-s0",), "No run of this part has finished."),
    ],
)
def test_what_cannot_be_said(labels, gone, sentence, tmp_path):
    assert sentence in text_of(tmp_path, *labels, seeds=(0,), skip=gone)
