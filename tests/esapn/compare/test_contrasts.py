"""The reference against methods and families, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from esapn.compare.contrasts import at_bytes, best_control, paired_contrasts, same_bytes, verdict
from esapn.compare.records import Record, load
from tests.esapn.fake_comparison import FIXED, loss_of, write_comparison

T_975 = 2.7764  # t(0.975) with 4 degrees of freedom, from a printed table


def make_record(label, seed, serving, loss, accuracy=0.5, family="fixed"):
    content = {"test": {"loss": loss, "accuracy": accuracy}, "bytes": {"serving": serving}}
    return Record("binary", "tuned", label, family, seed, content)


def test_at_bytes_interpolates_in_the_logarithm_within_a_seed():
    family = [
        make_record("fixed-1", 0, 100, 0.40, 0.60),
        make_record("fixed-2", 0, 1_600, 0.20, 0.80),
        make_record("fixed-3", 0, 3_200, 0.90, 0.10),
        make_record("fixed-1", 1, 100, 0.50),
        make_record("fixed-2", 1, 400, 0.30),
        make_record("fixed-1", 2, 100, 0.70),
    ]
    loss = at_bytes(family, {0: 200, 1: 400, 2: 90, 3: 100})
    assert loss[0].value == pytest.approx(0.40 - 0.20 / 4)  # log2: 1 of 4 doublings
    assert (loss[0].below, loss[0].above, loss[0].outside) == ("fixed-1", "fixed-2", "")
    assert (loss[1].value, loss[1].below, loss[1].above) == (0.30, "fixed-2", "fixed-2")
    assert (loss[2].value, loss[2].outside, loss[2].nearest) == (0.70, "smallest", 100)
    assert set(loss) == {0, 1, 2}
    assert at_bytes(family, {0: 200}, "accuracy")[0].value == pytest.approx(0.65)
    beyond = at_bytes(family, {0: 10_000})[0]
    assert (beyond.value, beyond.outside, beyond.nearest) == (0.90, "largest", 3_200)


def test_at_bytes_of_equal_bytes_takes_the_lower_loss():
    family = [make_record("a", 0, 100, 0.4, 0.9), make_record("b", 0, 100, 0.3, 0.1)]
    assert at_bytes(family, {0: 100})[0].value == 0.3
    assert at_bytes(family, {0: 100}, "accuracy")[0].value == 0.1


@pytest.mark.parametrize(
    ("difference", "p", "lower", "word"),
    [
        (-1.0, 0.049, True, "better"),
        (1.0, 0.049, True, "worse"),
        (1.0, 0.049, False, "better"),
        (-1.0, 0.049, False, "worse"),
        (-1.0, 0.051, True, "no difference shown"),
        (-1.0, None, True, "one seed"),
    ],
)
def test_verdict(difference, p, lower, word):
    assert verdict(difference, p, lower_is_better=lower) == word


def test_paired_contrasts_of_known_losses(tuned):
    rows = {row.name: row for row in paired_contrasts(tuned)}
    assert set(rows) == {m.label for m in tuned.methods} - {"esapn-rich"}
    for label, row in rows.items():
        differences = [
            loss_of("binary", "tuned", "esapn-rich", s) - loss_of("binary", "tuned", label, s)
            for s in range(5)
        ]
        mean = sum(differences) / 5
        half = T_975 * math.sqrt(sum((d - mean) ** 2 for d in differences) / 4 / 5)
        assert row.loss.difference.mean == pytest.approx(mean, abs=1e-12)
        assert row.loss.difference.half == pytest.approx(half, rel=1e-4, abs=1e-12)
    assert rows["fixed-128"].loss.verdict == "worse"
    assert rows["always"].loss.verdict == "no difference shown"
    assert rows["biases"].loss.verdict == rows["biases"].accuracy.verdict == "better"
    # Its own interval leaves 0 out, the correction over 17 rows does not.
    assert rows["random-0.1"].loss.difference.high < 0
    assert rows["random-0.1"].loss.verdict == "no difference shown"


def test_same_bytes_of_known_losses(tuned):
    rows = {row.name: row for row in same_bytes(tuned)}
    assert set(rows) == {"fixed", "thresholds", "power", "random", "always", "never", "biases"}
    differences = []
    for seed in range(5):
        low, high = (loss_of("binary", "tuned", f"fixed-{d}", seed) for d in (8, 16))
        serving = int(FIXED * 0.081) + 1_000 * seed
        share = math.log(serving / int(FIXED / 16)) / math.log(2)
        expected = low + share * (high - low)
        point = rows["fixed"].points[seed]
        assert point.value == pytest.approx(expected, rel=1e-7)
        assert (point.below, point.above, point.outside) == ("fixed-8", "fixed-16", "")
        differences.append(loss_of("binary", "tuned", "esapn-rich", seed) - expected)
    assert rows["fixed"].loss.difference.mean == pytest.approx(sum(differences) / 5, rel=1e-5)
    assert rows["always"].larger and not rows["biases"].larger
    assert {p.outside for p in rows["biases"].points.values()} == {"largest"}
    # "always" has the lower loss but no run with as few bytes: it is no control at these bytes.
    assert rows["always"].loss.other.mean < rows["thresholds"].loss.other.mean
    assert best_control(tuned).name == "thresholds"


def test_no_reference(tmp_path):
    labels = {"fixed-4", "biases"}
    write_comparison(tmp_path / "out", tasks=("binary",), modes=("tuned",), labels=labels)
    group = load(tmp_path / "out").groups[0]
    assert group.reference_method is None
    assert paired_contrasts(group) == same_bytes(group) == []
    assert best_control(group) is None
    assert [method.label for method in group.finished] == ["fixed-4", "biases"]
