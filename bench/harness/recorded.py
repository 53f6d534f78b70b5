"""A plugin of pytest: every test's result is in a file as soon as it is there.

    pytest -n 14 -p harness.recorded --record FILE

Lines of JSON are appended to FILE: ``{"collected": [names]}`` once, ``{"started": name}``, and
``{"test": name, "outcome": ..., "seconds": ..., "text": ...}``; ``text`` only where a test failed.
It runs under pytest-xdist, with one worker or more: a worker that dies is a failed test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LONGEST = 4000  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="append results to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))


class Recorder:
    """Hooks of the process that hands the tests out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.collected = False

    def _write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self.collected:  # all workers collect the same
            self._write(collected=list(ids))
        self.collected = True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when in ("setup", "teardown") and report.passed:
            return
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
        line["seconds"] = round(report.duration, 3)
        if report.failed:
            line["text"] = report.longreprtext[:LONGEST]
        self._write(**line)
