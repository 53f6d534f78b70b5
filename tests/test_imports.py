"""Who may import whom: every contract of pyproject.toml holds something; there is no circle."""

import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("esapn_kernels", "esapn")

# A contract of pyproject.toml, a file, and an import that the contract must not let pass there.
FORBIDDEN = [
    ("the kernels know nothing of the search", "esapn_kernels/info.py", "import esapn.config"),
    (
        "kernels for GPUs and for CPUs do not know each other",
        "esapn_kernels/gpu/launch.py",
        "from ..cpu import lookup",
    ),
    (
        "kernels know neither operators nor modules nor storage",
        "esapn_kernels/cpu/update.py",
        "from ..ops import resize",
    ),
    (
        "operators and storage know no module",
        "esapn_kernels/storage/ledger.py",
        "from ..module import ResizableEmbedding",
    ),
    (
        "operators do not know storage",
        "esapn_kernels/ops/memory.py",
        "from ..storage import ledger",
    ),
    (
        "only the dispatch and the test tools import the reference",
        "esapn_kernels/ops/chain.py",
        "from ..reference import split_chain",
    ),
    (
        "the reference shares no code with what it judges",
        "esapn_kernels/reference.py",
        "from .ops import chain",
    ),
    (
        "the search knows tables, ids and losses, not where they come from",
        "esapn/policy.py",
        "from .data import stream",
    ),
    ("data and models know no run", "esapn/data/cache.py", "from ..run import metrics"),
    ("models and data do not know each other", "esapn/models/soft.py", "from ..data import load"),
    (
        "a run knows no comparison and no tuning",
        "esapn/run/metrics.py",
        "from ..tune import space",
    ),
    (
        "comparisons and tunings do not know each other",
        "esapn/tune/space.py",
        "from ..compare import intervals",
    ),
    ("nothing imports the command line's entry", "esapn/cli.py", "from . import __main__"),
    ("torchrec is for sharded tables", "esapn_kernels/grow.py", "import torchrec"),
    (
        "a checkpoint of sharded tables is read without torchrec",
        "esapn_kernels/sharded/placement.py",
        "from . import shards",
    ),
    ("jinja2 is for comparisons", "esapn/rules.py", "import jinja2"),
    ("scipy is for comparisons and tunings", "esapn/rules.py", "import scipy"),
    ("optuna is for tunings", "esapn/rules.py", "import optuna"),
]


def broken(folder: Path) -> set[str]:
    """Names of the contracts that ``lint-imports`` reports as broken in a copy of the packages."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(tool), "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    found = set(re.findall(r"^(.+) BROKEN$", done.stdout, re.MULTILINE))
    assert "kept" in done.stdout and done.returncode == bool(found), done.stdout + done.stderr
    return found


@pytest.fixture
def copied(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept(copied):
    contracts = re.findall(r'^name = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert [name for name, _, _ in FORBIDDEN] == contracts
    assert broken(copied) == set()


@pytest.mark.parametrize("contract, file, line", FORBIDDEN, ids=[c[0] for c in FORBIDDEN])
def test_every_contract_can_be_broken(contract, file, line, copied):
    """Some ways of writing a contract hold nothing, without a word."""
    path = copied / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    assert contract in broken(copied)


def test_no_file_is_in_a_circle():
    """Imports inside functions and for annotations count too."""
    graph = grimp.build_graph(*PACKAGES)
    files = {
        module: graph.find_modules_directly_imported_by(module)
        for module in graph.modules
        if not graph.is_module_squashed(module)
    }
    assert len(files) > 70 and any(files.values())
    graphlib.TopologicalSorter(files).prepare()
    files["esapn_kernels.ops.layout"].add("esapn_kernels.module")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(files).prepare()
