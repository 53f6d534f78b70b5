"""The parsers: help, how messages name the command, and mistyped words."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from dataclasses import fields

import pytest
import setuptools

from esapn.__main__ import main
from esapn.cli import parse
from esapn.config import CHOICES, GROUPS, SearchConfig
from tests.esapn.commands import ROOT, SMALL, refused, run

# Help


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a page of help, at 100 columns."""
    with pytest.raises(SystemExit) as leave:
        main([*command, "--help"])
    assert not leave.value.code
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 100 and "None" not in captured.out
    return lines


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_help_names_every_setting_in_its_group(capsys):
    lines = help_of("search", capsys=capsys)
    heads = [k for k, line in enumerate(lines) if line.removesuffix(":") in GROUPS]
    assert [lines[k].removesuffix(":") for k in heads] == list(GROUPS)
    ends = [*heads[1:], len(lines)]
    parts = {g: lines[a:b] for g, a, b in zip(GROUPS, heads, ends, strict=True)}
    for setting in fields(SearchConfig):
        group = " ".join(" ".join(parts[setting.metadata["group"]]).split())
        assert f" --{setting.name.replace('_', '-')} " in group
        assert setting.metadata["help"] in group
        if setting.name in CHOICES:
            assert all(choice in group for choice in CHOICES[setting.name])
    text = " ".join(" ".join(lines).split())
    more = ("archive", "url", "cache", "malformed", "checkpoint-seconds")
    for flag in (*more, "out", "threads", "resume", "keep-best", "tensorboard"):
        assert f" --{flag}" in text
    for shown in (
        "EVENTS in a batch [500]",
        "[60]",
        "[2 4 8 16 64 128]",
        "[linear; tuned: padded]",
    ):
        assert shown in text
    assert "ml-1m, " in text


def test_help_of_the_other_commands(capsys):
    text = " ".join(help_of(capsys=capsys))
    for word in ("search", "compare", "tune", "report"):
        assert f" {word} " in text
    text = " ".join(help_of("compare", capsys=capsys))
    for flag in ("data", "order", "tasks", "modes", "methods", "seeds", "workers", "out"):
        assert f" --{flag} " in text
    assert "--lr" not in text and "--seed " not in text
    assert "--out of a comparison" in " ".join(help_of("report", capsys=capsys))


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from esapn.__main__ import main\n"
        "main(['search', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--row-lr RATE" in done.stdout


# How it was called


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("bin/esapn", "esapn"),
        ("Scripts/esapn.exe", "esapn"),
        ("esapn/__main__.py", "python -m esapn"),
    ],
)
def test_messages_name_the_command_as_it_was_called(called, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called, "search"])
    assert run("search", "--out") == 2
    assert capsys.readouterr().err.startswith(f"{name} search: error: argument --out: ")
    assert run("search", "--sizes", 0, "--out", "x") == 2
    assert capsys.readouterr().err.startswith(f"{name} search: error: --sizes must")
    assert help_of("search", capsys=capsys)[0].startswith(f"usage: {name} search --out DIR")


def test_the_console_script_is_main():
    arguments: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path(str(ROOT / "setup.py"))
    (script,) = arguments["entry_points"]["console_scripts"]
    name, _, place = script.partition(" = ")
    module, _, function = place.partition(":")
    assert name == "esapn" and getattr(importlib.import_module(module), function) is main


# Mistakes


def test_out_is_required(capsys):
    assert "--out" in refused(capsys, *SMALL)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train' (choose from search, compare, tune, report)"),
        (["serach"], "report); did you mean search?"),
        (["--verison"], "unknown option --verison"),
        (["search", "--row-lt", "3"], "unknown option --row-lt; did you mean --row-lr?"),
        (["search", "--row_lr=3", "--out", "x"], "unknown option --row_lr; did you mean --row-lr?"),
        (["search", "-row-lr", "3"], "unknown option -row-lr; did you mean --row-lr?"),
        (["search", "--otu", "x"], "unknown option --otu; did you mean --out?"),
        # No abbreviations.
        (["search", "--size", "2", "--out", "x"], "unknown option --size; did you mean --sizes?"),
        (["search", "--method", "esapm"], "biases); did you mean esapn?"),
        (["search", "--frobnicate"], "unknown option --frobnicate"),
        (["search", "--reward", "x"], "unknown option --reward"),
        (["compare", "--metods", "esapn"], "unknown option --metods; did you mean --methods?"),
        (["compare", "--modes", "paper", "tunned"], "(choose from paper, tuned); did you mean"),
        (["report", "--oot", "x"], "unknown option --oot"),
        (["search", "x", "--out", "y"], "unrecognized arguments: x"),
    ],
    ids=" ".join,
)
def test_a_mistyped_word_is_answered_with_the_right_one(arguments, expected, capsys):
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert expected in captured.err
    assert ("did you mean" in captured.err) == ("did you mean" in expected)


def test_values_that_look_like_flags_are_left_to_the_parser():
    assert parse(["search", "--seed", "-1", "--lr", "-.5", "--out", "x"]).seed == -1
    assert str(parse(["report", "--", "--odd"]).folder) == "--odd"
