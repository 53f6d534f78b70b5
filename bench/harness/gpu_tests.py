"""A plugin of pytest: tests that run on the device, and every result as soon as it is there.

    pytest -n 14 -p harness.gpu_tests --record FILE [files]

Other tests are left out: those that neither take the fixture ``device`` nor are marked ``cuda``.
Those of the backend ``torch``, which launch no kernel, come last.

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
    parser.addoption("--record", type=Path, required=True, metavar="FILE", help="append results")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("--record")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def runs_there(item: pytest.Item) -> bool:
        fixtures = getattr(item, "fixturenames", ())
        return "device" in fixtures or item.get_closest_marker("cuda") is not None

    def of_torch(item: pytest.Item) -> bool:
        parameters = getattr(item, "callspec", None)
        return parameters is not None and parameters.params.get("backend") == "torch"

    config.hook.pytest_deselected(items=[item for item in items if not runs_there(item)])
    items[:] = sorted(filter(runs_there, items), key=of_torch)


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
