"""Figures of a comparison: what is drawn, of which methods, and in one colour per family."""

from __future__ import annotations

import math
import struct

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esapn.compare import figures
from esapn.compare.records import load
from tests.esapn.fake_comparison import TRAIN, write_comparison

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Three seeds of every method; a few values of two of them are not finite."""

    def change(record):
        if record["label"] == "thresholds-4":
            record["log"][2] |= {"loss": math.nan, "serving_bytes": None}
            record["by_frequency"]["user"][0]["loss"] = math.nan
        if record["label"] == "never":
            record["events_per_second"] = math.inf

    folder = tmp_path_factory.mktemp("comparison") / "out"
    return load(write_comparison(folder, tasks=("binary",), seeds=(0, 1, 2), change=change))


@pytest.fixture(scope="module")
def tuned(comparison):
    return comparison.groups[1]


def drawn_by(name, group, comparison):
    figure = Figure(figsize=(11, 4.4))
    FigureCanvasAgg(figure)
    words = figures.FIGURES[name](figure, group, figures.family_styles(comparison), comparison)
    return figure, words


def line(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_every_figure_is_a_png_of_its_own(comparison, tuned, tmp_path):
    drawn = figures.draw(comparison, tuned, tmp_path / "figures")
    assert [d.path.name for d in drawn] == [f"binary-tuned-{name}.png" for name in figures.FIGURES]
    for picture in drawn:
        content = picture.path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(PNG) and width in (960, 1320) and 200 < height < 1000
        assert picture.title and picture.caption.endswith(".")


def test_family_styles_are_distinct_and_vermillion_is_the_references(comparison):
    styles = figures.family_styles(comparison)
    assert set(styles) == {method.family for method in comparison.methods}
    assert len(set(styles.values())) == len(styles)
    assert styles["esapn"] == figures.REFERENCE
    others = [color for family, (color, _) in styles.items() if family != "esapn"]
    assert figures.REFERENCE[0] not in others and len(set(others)) == len(others)


def test_selected_methods(tuned):
    # Reference; fixed table of 128; best control's nearest member; lowest loss; fewest bytes.
    labels = [method.label for method in figures.selected(tuned)]
    assert labels == ["esapn-rich", "fixed-128", "thresholds-4", "biases"]


def test_pareto_points_and_front(comparison, tuned):
    figure, (_, caption) = drawn_by("pareto", tuned, comparison)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "MSE (lower is better)"
    assert {x.get_label() for x in axes.get_lines()} == {*tuned.families, "front"}
    labels = ["fixed-2", "fixed-4", "fixed-8", "fixed-16", "fixed-64", "fixed-128"]
    x, y = line(axes, "fixed").get_data()
    assert list(x) == pytest.approx([tuned.mean(label, "serving") for label in labels])
    assert list(y) == pytest.approx([tuned.mean(label, "loss") for label in labels])
    # Its band goes through both ends of every member's interval.
    ends = {
        (tuned.mean(label, "serving"), getattr(tuned.interval(label, "loss"), end))
        for label in labels
        for end in ("low", "high")
    }
    corners = [
        {tuple(point) for path in band.get_paths() for point in path.vertices}
        for band in axes.collections
    ]
    assert any(ends <= found for found in corners)
    figure, _ = drawn_by("accuracy", tuned, comparison)
    accuracy = line(figure.axes[0], "fixed").get_ydata()
    assert accuracy[0] == pytest.approx(100 * tuned.mean("fixed-2", "accuracy"))
    for label in tuned.front:
        assert label in caption
    assert "power-0.3" not in caption and "always" not in caption


@pytest.mark.parametrize(
    ("least", "most", "scale"), [(311, 312, "linear"), (200, 790, "linear"), (200, 800, "log")]
)
def test_bytes_that_hardly_differ_share_an_axis(least, most, scale):
    axes = Figure().subplots()
    axes.plot([1, 2], [1000 * least, 1000 * most])
    figures._bytes_axis(axes, "y")
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale and low < 1000 * least < 1000 * most < high > 1.4 * low
    axes.figure.canvas.draw()
    texts = [tick.get_text() for tick in axes.get_yticklabels() if tick.get_text()]
    assert len(set(texts)) == len(texts) > 1 and all(text.endswith(" kB") for text in texts)


def test_curves_by_frequency(comparison, tuned):
    figure, _ = drawn_by("frequency", tuned, comparison)
    runs = [run.content["by_frequency"]["user"] for run in tuned.of("biases")]
    curve = line(figure.axes[0], "biases")
    assert list(curve.get_xdata()) == [bucket["from"] for bucket in runs[0]]
    assert curve.get_ydata()[3] == pytest.approx(sum(run[3]["loss"] for run in runs) / 3)
    assert figure.axes[2].get_ylabel() == "accuracy (%)"

    figure, _ = drawn_by("difference", tuned, comparison)
    bars = next(bar for bar in figure.axes[0].containers if bar.get_label() == "biases")
    mine = [run.content["by_frequency"]["user"] for run in tuned.of("esapn-rich")]
    expected = sum(a[3]["loss"] - b[3]["loss"] for a, b in zip(runs, mine, strict=True)) / 3
    assert bars.lines[0].get_ydata()[3] == pytest.approx(expected)


def test_histogram_is_of_the_references_rows(comparison, tuned):
    figure, (_, caption) = drawn_by("histogram", tuned, comparison)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == [f"size {d}" for d in (2, 4, 8, 16, 64, 128)]
    assert "seed 0" in caption
    rows = tuned.of("esapn-rich")[0].content["log"][-1]["user_rows"]
    last = figure.axes[0].collections[0].get_paths()[0].vertices
    assert max(y for x, y in last if x == last[:, 0].max()) == pytest.approx(rows[0] / sum(rows))


def test_stream_marks_the_test_part(comparison, tuned):
    figure, _ = drawn_by("stream", tuned, comparison)
    logs = [run.content["log"] for run in tuned.of("fixed-128")]
    curve = line(figure.axes[0], "fixed-128")
    assert list(curve.get_xdata()) == [entry["events"] for entry in logs[0]]
    assert curve.get_ydata()[0] == pytest.approx(sum(log[0]["loss"] for log in logs) / 3)
    assert any(list(mark.get_xdata()) == [TRAIN, TRAIN] for mark in figure.axes[0].get_lines())


def test_throughput_of_every_method(comparison, tuned):
    figure, _ = drawn_by("throughput", tuned, comparison)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == [method.label for method in tuned.methods if method.label != "never"]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([tuned.mean(label, "events_per_second") for label in names])


def test_what_the_runs_hold_nothing_for_is_left_out(tmp_path):
    def change(record):
        for key in ("log", "by_frequency", "sizes_by_frequency", "events_per_second"):
            del record[key]

    folder = write_comparison(
        tmp_path / "out", tasks=("binary",), modes=("paper",), seeds=(3,), change=change
    )
    comparison = load(folder)
    drawn = figures.draw(comparison, comparison.groups[0], tmp_path / "figures")
    assert [picture.path.name for picture in drawn] == [
        "binary-paper-pareto.png",
        "binary-paper-accuracy.png",
    ]


def test_values_that_are_not_finite_stay_out(comparison, tuned):
    figure, _ = drawn_by("frequency", tuned, comparison)
    upper_left, lower_left = figure.axes[0], figure.axes[2]
    assert len(line(upper_left, "thresholds-4").get_xdata()) == 10
    assert len(line(lower_left, "thresholds-4").get_xdata()) == 11
    figure, _ = drawn_by("stream", tuned, comparison)
    assert [len(line(axes, "thresholds-4").get_xdata()) for axes in figure.axes] == [19, 19]
    assert [len(line(axes, "biases").get_xdata()) for axes in figure.axes] == [20, 20]


def test_frequency_zero_has_a_place_on_the_logarithmic_axis(tmp_path):
    def change(record):
        for side in ("user", "item"):
            record["by_frequency"][side][0] |= {"from": 0, "to": 1}
            record["by_frequency"][side][1] |= {"events": 0, "loss": None, "accuracy": None}

    folder = write_comparison(
        tmp_path / "out",
        tasks=("binary",),
        modes=("tuned",),
        seeds=(0,),
        labels={"esapn-rich", "biases"},
        change=change,
    )
    comparison = load(folder)
    figure, _ = drawn_by("frequency", comparison.groups[0], comparison)
    assert list(line(figure.axes[0], "biases").get_xdata())[:2] == [figures.ZERO, 4]
