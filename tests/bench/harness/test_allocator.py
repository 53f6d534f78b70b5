"""The variables of glibc's allocator, and when a command runs itself anew."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from harness import allocator

PINNED = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


@pytest.fixture
def started(monkeypatch: Any) -> list[dict[str, str]]:
    """The environments in which the command has been run anew."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(allocator, "has_glibc", lambda: True)
    monkeypatch.setattr(os, "execve", lambda path, words, env: found.append(env))
    for name in PINNED:
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_command_runs_itself_anew_once(started: Any, monkeypatch: Any) -> None:
    before = dict(os.environ)
    allocator.enter("warm")
    assert started == [before | PINNED]
    for name, value in PINNED.items():
        monkeypatch.setenv(name, value)
    allocator.enter("warm")
    assert len(started) == 1
    allocator.enter("default")
    assert started[1:] == [before]


def test_the_same_interpreter_and_arguments(started: Any, monkeypatch: Any) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda path, words, env: seen.append((path, words)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", "bench/cpu.py", "--quick"])
    allocator.enter("warm")
    assert seen == [(sys.executable, [sys.executable, "-W", "error", "bench/cpu.py", "--quick"])]


def test_without_glibc_nothing_is_run_anew(started: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(allocator, "has_glibc", lambda: False)
    allocator.enter("warm")
    assert not started


def test_description(started: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(allocator, "page_faults", lambda: 8192.0)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    text = allocator.describe("default")
    assert text.startswith("allocator, default: ") and "MALLOC_TRIM_THRESHOLD_=7" in text
    assert text.endswith("; 8,192 page faults in an output of 32 MiB")
