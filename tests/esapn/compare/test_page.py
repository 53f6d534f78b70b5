"""report.html: whole, well-formed, fetching nothing, and saying what the records say."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from esapn.compare import figures, page
from esapn.compare.records import ReportError, load
from esapn.compare.summary import summary
from esapn.compare.tables import (
    bytes_table,
    contrast_tables,
    cost_table,
    measure_table,
    result_table,
    size_table,
)
from tests.esapn.fake_comparison import METHODS, write_comparison

MODES = {"paper": "published setting", "tuned": "settings found"}
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


@pytest.fixture(scope="module", autouse=True)
def two_figures():
    """The others are drawn by test_figures.py."""
    with pytest.MonkeyPatch.context() as patch:
        few = {name: figures.FIGURES[name] for name in ("pareto", "stream")}
        patch.setattr(figures, "FIGURES", few)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return write_comparison(folder, tasks=("binary",))


@pytest.fixture(scope="module")
def parsed(folder):
    path = page.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def small(folder, *labels, seeds=(0, 1, 2), **others):
    """Page of a few methods of one group, without its figures."""
    write_comparison(
        folder, tasks=("binary",), modes=("tuned",), seeds=seeds, labels=set(labels), **others
    )
    return Page(page.render(load(folder), [[]]))


def test_fetches_nothing(parsed):
    for link in parsed.links:
        assert link.startswith(("#", "data:image/png;base64,")), link[:60]
    targets = [link[1:] for link in parsed.links if link.startswith("#")]
    assert len(targets) == 3 and set(targets) <= set(parsed.ids)
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_figures_are_inside(folder, parsed):
    files = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    inside = [base64.b64decode(image["src"].partition(",")[2]) for image in parsed.images]
    assert sorted(inside) == sorted(files.values()) and len(files) == 4
    assert all(image["alt"] for image in parsed.images)


def test_a_group_begins_with_its_figure_and_one_table(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for part in text.split("<section ")[1:-1]:
        places = [part.index(mark) for mark in ("<img", "<table", "<details")]
        assert places == sorted(places) and part[: places[2]].count("<table") == 1


def test_is_the_same_when_written_again(folder, parsed):
    before = (folder / "report.html").read_bytes()
    assert page.write(folder).read_bytes() == before


def test_every_table_of_a_group_is_there(folder, parsed):
    comparison = load(folder)
    for group in comparison.groups:
        tables = [result_table(group), *contrast_tables(group)]
        tables += [measure_table(group), cost_table(group)]
        tables += [size_table(group, "user"), size_table(group, "item"), bytes_table(group)]
        title = f"binary, {MODES[group.mode]}"
        shown = {name: rows for (part, name), rows in parsed.tables.items() if part == title}
        assert shown == {table.title: [table.columns, *table.rows] for table in tables}
        for line in summary(group):
            assert " ".join(line.split()) in parsed.text


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


def test_nothing_finished(tmp_path):
    every = {f"binary-tuned-{label}-s0" for label in ("esapn-rich", "biases")}
    parsed = small(tmp_path / "out", "esapn-rich", "biases", seeds=(0,), skip=every)
    assert "0 of 2 runs" in parsed.text and "No run of this part has finished." in parsed.text
    assert all(name in parsed.text for name in every) and not parsed.images


def test_values_that_are_not_finite_stay_out(tmp_path):
    def change(record):
        if record["label"] == "biases" and record["seed"] == 1:
            record["test"]["loss"] = math.nan
        if record["label"] == "fixed-4":
            record["test"] |= {"auc": math.nan, "log_loss": None}

    parsed = small(tmp_path / "out", "esapn-rich", "fixed-4", "biases", change=change)
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
