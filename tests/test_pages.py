"""README.md and docs/: links have targets, names exist, commands are taken, Python runs."""

from __future__ import annotations

import ast
import csv
import doctest
import json
import pkgutil
import re
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from esapn.cli import parse
from esapn.methods import method_settings
from esapn_kernels import info

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
COMPARISON = ROOT / "docs" / "comparison.md"
FOLDERS = ("bench", "docs", "esapn", "esapn_kernels", "examples", "tests")
SUFFIXES = (".csv", ".html", ".json", ".md", ".py", ".svg", ".toml", ".txt")
# A run of the commands writes these; the checkout has no such files.
WRITTEN = {"compare.json", "report.html", "result.json", "settings.json", "trials.csv"}
FLAG = r"--[a-z][\w-]*"

every_page = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """A block of code: fenced, with its language, or indented, without one."""

    language: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass
class Command:
    """A command of a page, and the comments behind and below it."""

    words: list[str]
    comment: str = ""

    @property
    def flags(self) -> set[str]:
        return {word.partition("=")[0] for word in self.words if word.startswith("--")}

    @property
    def arguments(self) -> list[str] | None:
        """Those of ``esapn`` or ``python -m esapn``; None for other commands."""
        for program in (["esapn"], ["python", "-m", "esapn"]):
            if self.words[: len(program)] == program:
                return self.words[len(program) :]
        return None


@lru_cache
def split(page: Path) -> tuple[str, list[Block]]:
    """The prose of a page, and its blocks of code."""
    prose: list[str] = []
    blocks: list[Block] = []
    fenced = indented = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
            if fenced:
                blocks.append(Block(line[3:].strip(), []))
        elif fenced:
            blocks[-1].lines.append(line)
        elif line.startswith("    "):
            if not indented:
                blocks.append(Block("", []))
            blocks[-1].lines.append(line.strip())
        else:
            prose.append(line)
        indented = not fenced and line.startswith("    ")
    assert not fenced, f"{page.name}: a fence without an end"
    return "\n".join(prose), blocks


def spans(page: Path) -> list[str]:
    """What stands in backticks in the prose of a page, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split(page)[0])]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.+)$", split(page)[0], re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def commands(page: Path) -> list[Command]:
    """The commands in a page's blocks of code and backticks.

    Those after ``git checkout`` in their block are of another commit, and left out.
    """
    found = []
    for block in split(page)[1]:
        here: list[Command] = []
        for line in block.text.replace("\\\n", " ").splitlines():
            code, _, comment = line.partition("#")
            if code.startswith("git checkout"):
                break
            if block.language == "" and is_command(code):
                here.append(Command(shlex.split(code)))
            if here:
                here[-1].comment += comment
        found += here
    return found + [Command(shlex.split(span)) for span in spans(page) if is_command(span)]


def is_command(text: str) -> bool:
    """Whether ``text`` runs a program; the name of the program alone does not."""
    return bool(re.match(r"(esapn|make|pip|pytest|python) \S", text))


@lru_cache(maxsize=1)
def project_paths() -> list[str]:
    """Every file and folder of the project, as a path from its root."""
    found = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    found += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path.relative_to(ROOT).as_posix() for path in found]


def is_path(span: str) -> bool:
    """Whether ``span`` names a file or folder of the project."""
    if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", span) or span in WRITTEN:
        return False
    return span.endswith(SUFFIXES) or ("/" in span and span.split("/")[0] in FOLDERS)


def find(span: str) -> list[Path]:
    """The files that ``span`` may mean: a path from the root, its last part, or a pattern."""
    if "*" in span:
        return list(ROOT.glob(span))
    end = "/" + span.rstrip("/")
    return [ROOT / path for path in project_paths() if f"/{path}".endswith(end)]


@pytest.fixture(scope="module")
def script_help() -> dict[str, str]:
    """What ``--help`` of every script that is named with a flag prints; one process for all."""
    named = [command for page in (README, *DOCS) for command in commands(page)]
    scripts = {c.words[1] for c in named if c.flags and c.words[1].endswith(".py")}
    code = (
        "import contextlib, io, json, os, runpy, sys\n"
        "said, path = {}, sys.path[:]\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv, sys.path = [script, '--help'], [os.path.dirname(script), *path]\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    said[script] = text.getvalue()\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(scripts)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, str] = json.loads(done.stdout)
    return said


def test_the_reading_of_pages(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n\n# a\n# a\n\nSee `bench/x.py`\n`make\nit`.\n\n"
        "    esapn search \\\n        --seed 1   # once\n    # or twice\n\n"
        "```\nesapn report DIR\ngit checkout abc\nesapn report DIR\n```\n"
    )
    assert anchors(page) == {"one-two-three", "a", "a-1"}
    assert spans(page) == ["two", "bench/x.py", "make it"]
    search, report, make = commands(page)
    assert search.comment == " once or twice" and search.flags == {"--seed"}
    assert search.arguments == ["search", "--seed", "1"] and make.arguments is None
    assert report.words == ["esapn", "report", "DIR"]
    assert is_path("bench/x.py") and is_path("docs/") and is_path("ledger.py")
    assert not is_path("result.json") and not is_path("e / f") and not is_path("bench")
    assert find("test_pages.py") == [ROOT / "tests/test_pages.py"] and find("pages.py") == []
    assert find("tests/") == [ROOT / "tests"] and README in find("*.md")


@every_page
def test_links(page):
    prose = re.sub(r"`[^`]*`", "", split(page)[0])
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose)
    assert len(links) == prose.count("](")
    for link in links:
        if ":" in link:
            parts = urlsplit(link)
            assert parts.scheme == "https" and re.fullmatch(r"[\w.-]+\.\w+", parts.netloc), link
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"no file {link}"
        assert not anchor or anchor in anchors(target), f"no heading {link}"


def test_every_page_is_linked_from_the_readme():
    assert all(f"](docs/{page.name})" in split(README)[0] for page in DOCS)


@every_page
def test_paths_and_modules(page):
    """Of a test, ``file.py::test``, the file must have it."""
    for span in spans(page):
        file, _, test = span.partition("::")
        if is_path(file):
            paths = find(file)
            assert paths, f"no file {span}"
            texts = [path.read_text(encoding="utf-8") for path in paths if test]
            assert not test or any(f"def {test}(" in text for text in texts), f"no test {span}"
        name = re.fullmatch(r"((?:esapn|esapn_kernels)(?:\.\w+)+)(?:\(.*\))?", span)
        if name:
            pkgutil.resolve_name(name[1])


@pytest.fixture
def own_flags(capsys) -> dict[str, set[str]]:
    """The flags of every command of ``esapn``, from its help."""
    found = {}
    for command in ("search", "compare", "tune", "report"):
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        found[command] = set(re.findall(FLAG, capsys.readouterr().out))
    return found


@every_page
def test_flags_in_the_prose(page, own_flags, script_help):
    known = set().union(*own_flags.values(), *(re.findall(FLAG, h) for h in script_help.values()))
    for span in spans(page):
        if span.startswith("--"):
            assert set(re.findall(FLAG, span)) <= known, span


@every_page
def test_commands_of_the_search(page, own_flags, capsys):
    """Parsers and shells take them as they are, unabbreviated, and the methods are known."""
    for command in commands(page):
        if command.arguments in (None, [], ["search"], ["compare"], ["tune"], ["report"]):
            continue  # not ours, or named in a sentence
        said = " ".join(command.words)
        assert shlex.join(command.words) == said
        assert command.flags <= own_flags.get(command.arguments[0], set()), said
        try:
            args = parse(command.arguments)
        except SystemExit:
            pytest.fail(f"not taken: {said}: {capsys.readouterr().err}")
        for method in getattr(args, "methods", None) or []:
            method_settings(method)


def test_results_are_of_the_command_above_them():
    """``# N runs; FILE.csv`` under a comparison: the file has its methods, and they make N runs."""
    found = [c for c in commands(COMPARISON) if re.search(r"runs; \S+\.csv", c.comment)]
    assert len(found) == 2
    for command in found:
        count, path = re.findall(r"(\d+) runs; (\S+\.csv)", command.comment)[0]
        args = parse(command.arguments)
        with (ROOT / path).open(encoding="utf-8") as file:
            records = [(r["label"], r["task"], r["mode"]) for r in csv.DictReader(file)]
        labels = args.methods or {label for label, _, _ in records}
        made = [(a, t, m) for a in labels for t in args.tasks for m in args.modes] * args.seeds
        assert Counter(made) <= Counter(records)
        assert len(made) == int(count), command.comment


def test_figures_of_the_readme_are_in_the_comparison():
    def figures(line: str) -> set[str]:
        return set(re.findall(r"[\d.]+ %|0\.\d{4}", line))

    comparison = COMPARISON.read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\d %.*$", split(README)[0], re.MULTILINE)
    assert len(rows) >= 4
    for row in rows:
        assert len(figures(row)) == 3
        assert any(figures(row) <= figures(line) for line in comparison.splitlines()), row


NAMES = {"ESAPN": "esapn", "biases only": "biases"}


def label_of(name: str) -> str:
    """A method's label in the records, from its name in a table."""
    name = name.strip("* ")
    name = re.sub(r"power, d <= (\d*) ?f\^0.5", lambda m: f"power-{m[1] or 1}", name)
    name = re.sub(r"thresholds (\d+), .*", r"thresholds-\1", name)
    return re.sub(r",? ", "-", NAMES.get(name, name)).lower()


def test_the_tuned_table_is_that_of_its_records():
    """Means, and standard deviations in units of the last digit."""
    found: dict[str, list[tuple[float, float]]] = {}
    path = ROOT / "bench" / "results" / "compare-ml1m-tuned.csv"
    with path.open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            numbers = float(record["accuracy"]), float(record["loss"])
            found.setdefault(record["label"], []).append(numbers)
    section = COMPARISON.read_text(encoding="utf-8").partition("## At settings tuned by hand")[2]
    table = section.partition("| method |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines()[2:]]
    assert {label_of(name) for name, *_ in rows} == set(found)
    for name, *cells in rows:
        for cell, values in zip(cells, zip(*found[label_of(name)], strict=True), strict=True):
            spread = round(statistics.stdev(values) * 1e4)
            shown = cell.replace("*", "").strip()
            assert shown == f"{statistics.mean(values):.4f} ({spread})", name


FOUND = {
    "MovieLens-1M, two classes": "ml1m",
    "anime, two classes": "anime",
    "MovieLens-1M, five classes": "ml1m5",
}


@pytest.mark.parametrize("heading", FOUND)
def test_the_tables_of_the_settings_found_are_those_of_their_records(heading):
    names = {"counts, 6.25 %": "counts-6.25%", "counts, 6.25 %, tails": "counts-6.25%,hops=tails"}
    path = ROOT / "bench" / "results" / f"compare-{FOUND[heading]}-found.csv"
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    section = COMPARISON.read_text(encoding="utf-8").partition("## At the settings found")[2]
    table = section.partition(f"{heading}:")[2].strip().partition("\n\n")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 9
    for name, size, *cells in rows:
        label = names.get(name) or label_of(name)
        before = f"{label},row_lr=0.05,row_accumulator=0,init_std=0.01"
        before += ",policy_lr=0.0001" if label == "esapn" else ""
        for at, text in ((before, cells[:2]), (label, cells[2:4])):
            runs = [run for run in records if run["label"] == at]
            assert len(runs) == (4 if at == label or text != ["-", "-"] else 0)
            for measure, cell in zip(("accuracy", "loss"), text, strict=True):
                if runs:
                    mean = statistics.mean(float(run[measure]) for run in runs)
                    assert cell == f"{mean:.{len(cell) - 2}f}", name
        share = [float(run["serving_bytes"]) / float(run["fixed128_bytes"]) for run in runs]
        assert float(size.rstrip(" %")) == pytest.approx(100 * statistics.mean(share), abs=0.051)


@pytest.mark.parametrize(
    ("heading", "files"), [("## What was found", "tune"), ("## Sizes up to 16", "tune-to16")]
)
def test_the_losses_of_the_tuning_are_those_of_its_trials(heading, files):
    """Of every method before, trial 0, and of the trial with the least mean over all orders."""
    expected: dict[str, list[str]] = {}
    for name in ("ml1m", "ml1m5", "anime"):
        losses: dict[str, dict[str, list[float]]] = {}
        path = ROOT / "bench" / "results" / f"{files}-{name}.csv"
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line["validation"]:
                    trials = losses.setdefault(line["method"], {})
                    trials.setdefault(line["trial"], []).append(float(line["validation"]))
        for method, trials in losses.items():
            assert len(trials) <= 24
            means = {t: statistics.mean(each) for t, each in trials.items() if len(each) == 3}
            expected.setdefault(method, []).extend(
                f"{loss:.5f}" for loss in (means["0"], min(means.values()))
            )
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    table = page.partition(heading)[2].partition("| method |")[2].partition("\n\n")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {method: cells for method, *cells in rows} == expected


@every_page
def test_other_commands(page, script_help):
    """Scripts and their flags, modules, targets of make, extras of pip, folders of pytest."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r'^ +"(\w+)": \[$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for command in commands(page):
        program, first, *rest = command.words
        if program == "python" and first == "-m":
            assert find_spec(rest[0]), first
        elif program == "python":
            assert first in project_paths(), first
            known = set(re.findall(FLAG, script_help.get(first, "")))
            assert command.flags <= known, command
        elif program == "make":
            assert first in targets, first
        elif program == "pip" and rest and rest[-1][0] != ".":
            pinned = (ROOT / "requirements-sharded.txt").read_text()
            assert first == "install"
            for name in (word for word in rest if word != "--no-deps"):
                # Of CUDA, where the file names that for CPUs.
                assert name.replace("fbgemm-gpu=", "fbgemm-gpu-cpu=") in pinned, name
        elif program == "pip" and rest:
            named = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", rest[-1])
            assert first == "install" and named, command
            assert set((named[1] or extras[0]).split(",")) <= set(extras), command
        elif program == "pytest" and not first.startswith("-"):
            assert (ROOT / first).exists(), first


def test_the_report_of_backends_runs(capsys):
    words = [command.words for page in DOCS for command in commands(page)]
    assert ["python", "-m", "esapn_kernels.info"] in words
    assert info.main([]) == 0
    assert "auto on cpu" in capsys.readouterr().out


def test_python_of_the_readme_is_a_doctest():
    """pytest runs the doctests of README.md; other Python would stay untested."""
    blocks = [block for block in split(README)[1] if block.language == "python"]
    assert blocks and all(block.lines[0].startswith(">>> ") for block in blocks)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_python_of_the_docs(page):
    """Blocks with prompts run, one after the other; those without can be read and imported."""
    blocks = [block.text for block in split(page)[1] if block.language == "python"]
    session = [text for text in blocks if text.startswith(">>> ")]
    test = doctest.DocTestParser().get_doctest("\n".join(session), {}, page.name, str(page), 0)
    said: list[str] = []
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    doctest.DocTestRunner(optionflags=options).run(test, out=said.append)
    assert not said, "".join(said)
    for node in [node for text in blocks if text not in session for node in ast.parse(text).body]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                of = f"{node.module}:" if isinstance(node, ast.ImportFrom) else ""
                pytest.importorskip((of or alias.name).partition(":")[0].partition(".")[0])
                pkgutil.resolve_name(of + alias.name)
