"""Statistics of a comparison against numbers worked out by hand or from printed tables."""

from __future__ import annotations

import json
import math

import pytest

from esapn.compare import contrasts as st
from tests.esapn.fake_comparison import FIXED, loss_of, write_comparison

# Printed t tables: t(0.975) of 1, 2, 4 and 9 degrees of freedom.
T_975 = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622}


def make_run(label, seed, serving, loss, accuracy=0.5, family="fixed"):
    record = {"test": {"loss": loss, "accuracy": accuracy}, "bytes": {"serving": serving}}
    return st.Run("binary", "tuned", label, family, seed, record)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_mean_interval_of_consecutive_integers(n):
    # The variance of 1..n with n - 1 in the denominator is n (n + 1) / 12.
    interval = st.mean_interval(range(1, n + 1))
    half = T_975[n - 1] * math.sqrt(n * (n + 1) / 12) / math.sqrt(n)
    assert interval.mean == (n + 1) / 2
    assert interval.half == pytest.approx(half, rel=1e-4)
    assert (interval.low, interval.high) == (
        interval.mean - interval.half,
        interval.mean + interval.half,
    )


def test_one_value_has_no_interval():
    assert st.mean_interval([0.25]) == st.Interval(0.25, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        st.mean_interval([])


def test_paired_difference_takes_common_seeds_only():
    a = {0: 10.0, 1: 21.0, 2: 35.0, 9: 1e6}
    b = {0: 9.0, 1: 19.0, 2: 32.0, 8: -1e6}
    difference = st.paired_difference(a, b)  # 1, 2, 3
    assert (difference.mean, difference.n) == (2.0, 3)
    assert difference.half == pytest.approx(T_975[2] / math.sqrt(3), rel=1e-4)
    # t = 2 sqrt(3); with 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert difference.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_p_with_one_degree_of_freedom_is_cauchys():
    difference = st.paired_difference({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0})
    assert difference.p == pytest.approx(1 - 2 / math.pi * math.atan(2.0), rel=1e-9)


def test_paired_difference_at_the_edges():
    assert st.paired_difference({3: 1.0}, {3: 0.5}) == st.Difference(0.5, None, 1, None)
    assert st.paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0
    assert st.paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).p == 0.0
    with pytest.raises(ValueError, match="common seed"):
        st.paired_difference({0: 1.0}, {1: 1.0})


def test_holm():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; then the maximum.
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_pareto_front():
    points = [(4, 0.3), (1, 0.5), (2, 0.6), (2, 0.4), (8, 0.3), (9, 0.1)]
    assert st.pareto_front(points) == [1, 3, 0, 5]
    assert st.pareto_front([(1, 1), (1, 1)]) == [0, 1]
    assert st.pareto_front([]) == []


def test_at_bytes_interpolates_in_the_logarithm_within_a_seed():
    family = [
        make_run("fixed-1", 0, 100, 0.40, 0.60),
        make_run("fixed-2", 0, 1_600, 0.20, 0.80),
        make_run("fixed-3", 0, 3_200, 0.90, 0.10),
        make_run("fixed-1", 1, 100, 0.50),
        make_run("fixed-2", 1, 400, 0.30),
        make_run("fixed-1", 2, 100, 0.70),
    ]
    loss = st.at_bytes(family, {0: 200, 1: 400, 2: 90, 3: 100})
    assert loss[0].value == pytest.approx(0.40 - 0.20 / 4)  # log2: 1 of 4 doublings
    assert (loss[0].below, loss[0].above, loss[0].outside) == ("fixed-1", "fixed-2", "")
    assert (loss[1].value, loss[1].below, loss[1].above) == (0.30, "fixed-2", "fixed-2")
    assert (loss[2].value, loss[2].outside, loss[2].nearest) == (0.70, "smallest", 100)
    assert set(loss) == {0, 1, 2}
    assert st.at_bytes(family, {0: 200}, "accuracy")[0].value == pytest.approx(0.65)
    beyond = st.at_bytes(family, {0: 10_000})[0]
    assert (beyond.value, beyond.outside, beyond.nearest) == (0.90, "largest", 3_200)


def test_at_bytes_of_equal_bytes_takes_the_lower_loss():
    family = [make_run("a", 0, 100, 0.4, 0.9), make_run("b", 0, 100, 0.3, 0.1)]
    assert st.at_bytes(family, {0: 100})[0].value == 0.3
    assert st.at_bytes(family, {0: 100}, "accuracy")[0].value == 0.1


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
    assert st.verdict(difference, p, lower_is_better=lower) == word


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "out"
    write_comparison(folder, tasks=("binary",), settings=("tuned",))
    return st.load(folder).groups[0]


def test_paired_contrasts_of_known_losses(tuned):
    rows = {row.name: row for row in st.paired_contrasts(tuned)}
    assert set(rows) == {m.label for m in tuned.methods} - {"esapn-rich"}
    for label, row in rows.items():
        differences = [
            loss_of("binary", "tuned", "esapn-rich", s) - loss_of("binary", "tuned", label, s)
            for s in range(5)
        ]
        mean = sum(differences) / 5
        half = T_975[4] * math.sqrt(sum((d - mean) ** 2 for d in differences) / 4 / 5)
        assert row.loss_difference.mean == pytest.approx(mean, abs=1e-12)
        assert row.loss_difference.half == pytest.approx(half, rel=1e-4, abs=1e-12)
    assert rows["fixed-128"].loss_verdict == "worse"
    assert rows["always"].loss_verdict == "no difference shown"
    assert rows["biases"].loss_verdict == rows["biases"].accuracy_verdict == "better"
    # Its own interval leaves 0 out, the correction over 17 rows does not.
    assert rows["random-0.1"].loss_difference.high < 0
    assert rows["random-0.1"].loss_verdict == "no difference shown"


def test_same_bytes_of_known_losses(tuned):
    rows = {row.name: row for row in st.same_bytes(tuned)}
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
    assert rows["fixed"].loss_difference.mean == pytest.approx(sum(differences) / 5, rel=1e-5)
    assert rows["always"].larger and not rows["biases"].larger
    assert {p.outside for p in rows["biases"].points.values()} == {"largest"}
    # "always" has the lower loss but no run with as few bytes: it is no control at these bytes.
    assert rows["always"].loss.mean < rows["thresholds"].loss.mean
    assert st.best_control(tuned).name == "thresholds"


def test_ranking_does_not_depend_on_which_seeds_are_missing(tuned, tmp_path):
    # Later seeds have the higher losses: without them a method's plain mean looks better.
    gone = {f"binary-tuned-biases-s{seed}" for seed in (2, 3, 4)}
    write_comparison(tmp_path / "out", tasks=("binary",), settings=("tuned",), skip=gone)
    partial = st.load(tmp_path / "out")
    assert set(partial.missing) == gone
    group = partial.groups[0]
    assert group.mean("biases", "loss") < group.mean("fixed-2", "loss")
    assert group.finished[-1].label == tuned.finished[-1].label == "biases"
    row = next(row for row in st.paired_contrasts(group) if row.name == "biases")
    assert row.loss_difference.n == 2


def test_runs_without_a_finite_loss_are_set_apart(tmp_path):
    def change(record):
        if (record["label"], record["seed"]) == ("fixed-4", 1):
            record["test"]["loss"] = math.nan
        if (record["label"], record["seed"]) == ("fixed-8", 1):
            record["test"]["loss"] = None
        if record["label"] == "fixed-16":
            record["test"]["auc"] = math.nan

    write_comparison(tmp_path / "out", tasks=("binary",), settings=("tuned",), change=change)
    comparison = st.load(tmp_path / "out")
    assert comparison.not_finite == ("binary-tuned-fixed-4-s1", "binary-tuned-fixed-8-s1")
    group = comparison.groups[0]
    assert set(group.values("fixed-4", "loss")) == {0, 2, 3, 4}
    assert group.interval("fixed-16", "auc") is None


def test_no_reference(tmp_path):
    labels = {"fixed-4", "biases"}
    write_comparison(tmp_path / "out", tasks=("binary",), settings=("tuned",), labels=labels)
    group = st.load(tmp_path / "out").groups[0]
    assert group.reference_method is None
    assert st.paired_contrasts(group) == st.same_bytes(group) == []
    assert st.best_control(group) is None
    assert [method.label for method in group.finished] == ["fixed-4", "biases"]


def test_folder_without_a_comparison(tmp_path):
    with pytest.raises(st.ReportError, match=r"no compare\.json"):
        st.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "lacks data, tasks"),
        ("{}", "lacks data, tasks"),
    ],
)
def test_broken_header(tmp_path, text, message):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(st.ReportError, match=message) as caught:
        st.load(tmp_path)
    assert "\n" not in str(caught.value) and "compare.json" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: None, "not readable as JSON"),
        (lambda record: record.pop("bytes"), "lacks bytes"),
        (lambda record: record["test"].pop("loss"), "lacks loss"),
        (lambda record: record["bytes"].pop("serving_peak"), "lacks bytes serving_peak"),
        (lambda record: record["bytes"].update(serving=0), "must be positive"),
        (lambda record: record["data"].update(sha256="other"), "other data"),
    ],
)
def test_broken_run(tmp_path, edit, message):
    folder = write_comparison(tmp_path / "out", tasks=("binary",), settings=("published",))
    path = folder / "runs" / "binary-published-darts-s2.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text("{" if "JSON" in message else json.dumps(record))
    with pytest.raises(st.ReportError, match=message) as caught:
        st.load(folder)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
