"""report.html: whole, well-formed, fetching nothing, and saying what the records say."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from esapn.compare import page
from esapn.compare.contrasts import ReportError, load
from tests.esapn.fake_comparison import METHODS, loss_of, write_comparison

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps links, IDs, tables and the text outside ``style``."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids, self.tables, self.texts = [], [], [], {}, []
        self.heading, self.images = "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "h2":
            self.part = ""
        if tag in ("h2", "h3"):
            self.heading = ""
        if tag == "table":
            self.rows = self.tables.setdefault((self.part, self.heading), [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        assert "script" not in self.open
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.part += data
        if self.open and self.open[-1] == "h3":
            self.heading += data

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return write_comparison(folder, tasks=("binary",))


@pytest.fixture(scope="module")
def parsed(folder):
    path = page.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def small(folder, *labels, task="binary", seeds=(0, 1, 2), draw=False, **others):
    """Page of a few methods of one group, without its figures unless ``draw``."""
    write_comparison(
        folder, tasks=(task,), settings=("tuned",), seeds=seeds, labels=set(labels), **others
    )
    if draw:
        return Page(page.write(folder).read_text(encoding="utf-8"))
    return Page(page.render(load(folder), [[]]))


def test_fetches_nothing(parsed):
    for link in parsed.links:
        assert link.startswith(("#", "data:image/png;base64,")), link[:60]
    targets = [link[1:] for link in parsed.links if link.startswith("#")]
    assert len(targets) == 10 and set(targets) <= set(parsed.ids)
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_figures_are_inside(folder, parsed):
    files = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    inside = [base64.b64decode(image["src"].partition(",")[2]) for image in parsed.images]
    assert sorted(inside) == sorted(files.values()) and len(files) == 14
    assert all(image["alt"] for image in parsed.images)


def test_is_the_same_when_written_again(tmp_path):
    small(tmp_path / "out", "esapn-rich", "biases", draw=True)
    before = (tmp_path / "out" / "report.html").read_bytes()
    assert page.write(tmp_path / "out").read_bytes() == before


def test_numbers_are_the_records(parsed):
    head, *rows = parsed.tables["binary, tuned", "Results"]
    assert head[:4] == ["method", "seeds", "front", "accuracy %"] and "log loss" in head
    assert {row[0] for row in rows} == set(METHODS["tuned"])
    for row in rows:
        losses = [loss_of("binary", "tuned", row[0], seed) for seed in range(5)]
        mean = sum(losses) / 5
        half = 2.776445 * math.sqrt(sum((x - mean) ** 2 for x in losses) / 4 / 5)
        assert row[head.index("MSE")] == f"{mean:.5f} ± {half:.5f}"
    means = [float(row[head.index("MSE")].split()[0]) for row in rows]
    assert means == sorted(means)


def test_several_classes_have_cross_entropy_and_no_auc(tmp_path):
    parsed = small(tmp_path / "out", "esapn-rich", "biases", task="multiclass")
    head, *rows = parsed.tables["multiclass, tuned", "Results"]
    assert "cross-entropy" in head and not {"AUC", "log loss", "MSE"} & set(head)
    mean = sum(loss_of("multiclass", "tuned", "biases", seed) for seed in range(3)) / 3
    assert rows[1][0] == "biases" and rows[1][4].startswith(f"{mean:.5f} ±")
    assert "differs by" in parsed.text and "MSE" not in parsed.text


def test_differences_and_verdicts(parsed):
    _, *rows = parsed.tables["binary, tuned", "esapn-rich against every other method"]
    cells = {row[0]: row for row in rows}
    assert len(cells) == len(METHODS["tuned"]) - 1
    assert cells["biases"][3].startswith("−0.00335 [−0.00349, −0.0032")
    assert cells["biases"][5] == "better" and cells["fixed-128"][5] == "worse"
    assert cells["always"][5] == "no difference shown"
    _, *rows = parsed.tables["binary, tuned", "At the same serving bytes: MSE"]
    where = {row[0]: row[1] for row in rows}
    assert where["fixed (6)"] == "between fixed-8 and fixed-16"
    assert where["biases (1)"] == "only member, biases, with fewer bytes: 51,899"
    assert where["always (1)"].startswith("only member, always, with more bytes: 4,7")
    _, *rows = parsed.tables["binary, published", "At the same serving bytes: MSE"]
    where = {row[0]: row[1] for row in rows}
    smallest = "smallest of the family, fixed-128, with more bytes: 4,989,952"
    assert where["fixed (2)"] == smallest


def test_memory_in_the_published_form(parsed):
    head, *rows = parsed.tables["binary, published", "Final sizes of the users"]
    sizes = ["2", "4", "8", "16", "64", "128"]
    assert head == ["users at size", *sizes, "other sizes", "total dims", "IDs × 128", "ratio"]
    cells = {row[0]: row for row in rows}
    assert cells["darts"][7:] == ["222: 6,040", "1,340,880", "773,120", "173.44\xa0%"]
    counts = [int(cell.replace(",", "")) for cell in cells["esapn"][1:7]]
    dims = sum(int(size) * n for size, n in zip(sizes, counts, strict=True))
    assert sum(counts) == 6040 and cells["esapn"][8] == f"{dims:,}"
    head, *rows = parsed.tables["binary, published", "Real bytes"]
    assert {row[0]: row for row in rows}["fixed-128"][1:3] == ["4,989,952", "128"]


def test_summary_is_made_of_the_numbers(parsed):
    text = parsed.text
    assert "The lowest mean loss is that of fixed-128: MSE 0.17930 ± " in text
    assert "The reference, esapn-rich, is number 4 of 18 by loss" in text
    assert "the best control is the family thresholds (between thresholds-4 and" in text
    assert "1 method has a lower mean loss with no more bytes than esapn: biases" in text
    assert "No method has both a lower mean loss and no more serving bytes than esapn-rich" in text


def test_summary_follows_the_numbers(tmp_path):
    def change(record):
        if record["label"] == "fixed-8":
            record["test"] |= {"loss": 0.1 + 1e-4 * record["seed"] ** 2, "accuracy": 0.8}

    text = small(tmp_path / "out", "esapn-rich", "fixed-4", "fixed-8", change=change).text
    assert "The lowest mean loss is that of fixed-8" in text
    assert "largest of the family, fixed-8, with fewer bytes: 311,872" in text
    assert re.search(r"There the MSE of esapn-rich is 0\.0\d+ higher", text)
    assert "lower loss than 0 and a higher one than 1" in text
    assert "than esapn-rich: fixed-8; the difference is clear for fixed-8." in text


def test_conditions_and_settings(parsed):
    text = parsed.text
    for expected in ("ab" * 32, "shuffle", "0, 1, 2, 3, 4", "AMD EPYC", "0123abc", "750,000"):
        assert expected in text
    assert "settings differ" not in text
    assert "batch_size = 500" in text and '"method": "darts"' in text
    _, *rows = parsed.tables["Conditions", "Methods"]
    assert len(rows) == sum(map(len, METHODS.values()))
    assert ["fixed-4", "tuned", "fixed", "what fixed-4 does", "size 4"] in rows


def test_missing_runs_are_named(tmp_path):
    gone = {"binary-tuned-always-s1"}
    parsed = small(tmp_path / "out", "esapn-rich", "always", skip=gone)
    assert "5 of 6 runs" in parsed.text and "1 of 6 planned runs" in parsed.text
    assert "binary-tuned-always-s1" in parsed.text and "Seeds are missing" in parsed.text
    rows = parsed.tables["binary, tuned", "Results"]
    assert next(row[1] for row in rows if row[0] == "always") == "2"


def test_nothing_finished(tmp_path):
    every = {f"binary-tuned-{label}-s0" for label in ("esapn-rich", "biases")}
    parsed = small(tmp_path / "out", "esapn-rich", "biases", seeds=(0,), skip=every)
    assert "0 of 2 runs" in parsed.text and "No run of this part has finished." in parsed.text
    assert all(name in parsed.text for name in every) and not parsed.images


def test_reference_not_finished(tmp_path):
    gone = {f"binary-tuned-esapn-rich-s{seed}" for seed in range(3)}
    parsed = small(tmp_path / "out", "esapn-rich", "fixed-4", "biases", skip=gone)
    assert "The reference method, esapn-rich, has no finished run." in parsed.text
    rows = parsed.tables["binary, tuned", "Results"]
    assert rows[-1][:3] == ["esapn-rich", "0", "–"] and len(rows) == 4


def test_one_seed_has_no_interval(tmp_path):
    parsed = small(tmp_path / "out", "esapn-rich", "fixed-8", "fixed-16", seeds=(4,))
    rows = parsed.tables["binary, tuned", "Results"]
    assert not any("±" in cell for row in rows for cell in row)
    row = parsed.tables["binary, tuned", "At the same serving bytes: MSE"][1]
    assert row[4].endswith("(one seed)") and row[5:] == ["–", "one seed"]
    assert "one seed, so no interval" in parsed.text and "so no verdict" in parsed.text


def test_values_that_are_not_finite_stay_out(tmp_path):
    def change(record):
        if record["label"] == "biases" and record["seed"] == 1:
            record["test"]["loss"] = math.nan
        if record["label"] == "fixed-4":
            record["test"] |= {"auc": math.nan, "log_loss": None}
            record["log"][2]["loss"] = math.nan
            record["by_frequency"]["user"][0]["loss"] = math.nan

    labels = ("esapn-rich", "fixed-4", "biases")
    parsed = small(tmp_path / "out", *labels, draw=True, change=change)
    assert not re.search(r"\b(nan|NaN|inf|None)\b", parsed.text)
    assert "1 ended without a finite loss" in parsed.text
    assert "binary-tuned-biases-s1" in parsed.text


def test_texts_are_escaped(tmp_path):
    def change(record):
        record["config"]["note"] = f"<script>alert({record['seed']})</script>"

    parsed = small(tmp_path / "out", "esapn-rich", "biases", change=change)
    assert "<script>alert(0)</script>" in parsed.text
    assert "settings differ among its seeds, these are of seed 0" in parsed.text


def test_no_comparison_writes_nothing(tmp_path):
    with pytest.raises(ReportError, match=r"no compare\.json"):
        page.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
