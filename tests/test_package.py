"""The package as a whole: its layers, its optional dependencies and its metadata."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import esapn_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("esapn_kernels", "esapn")
TRAIN_EXTRAS = (
    *("polars", "tqdm", "torchmetrics", "matplotlib"),
    *("pooch", "scipy", "jinja2"),
)
# Home folders of Linux, macOS and Windows: no file has a reason to name one.
HOME_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w|\b[A-Z]:\\+Users\\+\w")


def imported_names(source: str) -> set[str]:
    """Returns the top-level names that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def project_files() -> list[Path]:
    """Returns the tracked files, or without git those of the packages and beside setup.py."""
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        tracked = []
    files = {ROOT / name for name in tracked if name}
    files.update(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    files.update(path for path in ROOT.iterdir() if not path.name.startswith("."))
    return sorted(path for path in files if path.is_file())


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """What setup.py passes to setuptools, without setuptools."""
    arguments: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=arguments.update))
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def test_imported_names():
    source = (
        "import esapn.data.load\ndef f():\n    from esapn import search\nfrom .esapn import x\n"
    )
    assert imported_names(source) == {"esapn"}
    assert imported_names("from . import lookup\nimport esapn_kernels.ops.lookup") == {
        "esapn_kernels"
    }


def test_kernels_import_nothing_of_esapn_or_its_extras():
    files = sorted((ROOT / "esapn_kernels").rglob("*.py"))
    assert files
    forbidden = {"esapn", *TRAIN_EXTRAS}
    offenders = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if forbidden & imported_names(path.read_text(encoding="utf-8"))
    ]
    assert offenders == []


def test_without_triton_or_train_extras():
    """The package is imported, and what it says of the machine names what is missing."""
    # Blocked, not only absent from sys.modules afterwards: torch itself loads tqdm where it can.
    code = (
        "import sys\n"
        f"for name in {('triton', *TRAIN_EXTRAS)!r}:\n"
        "    sys.modules[name] = None\n"
        "import esapn_kernels\n"
        "assert 'esapn' not in sys.modules\n"
        "from esapn_kernels import info\n"
        "sys.exit(info.main([]))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "triton cannot be imported" in done.stdout


def test_version(setup_arguments):
    assert setup_arguments["name"] == "esapn-kernels"
    assert setup_arguments["version"] == esapn_kernels.__version__


def test_requirements_are_floors(setup_arguments):
    requirements = list(setup_arguments["install_requires"])
    for extra in setup_arguments["extras_require"].values():
        requirements += extra
    for requirement in requirements:
        specifier = requirement.partition(";")[0].strip()
        assert re.fullmatch(r"[a-z0-9-]+>=[\d.]+", specifier), requirement
    assert setup_arguments["python_requires"].startswith(">=")


def test_extras(setup_arguments):
    names = {
        extra: {re.split(r"[>;]", requirement)[0] for requirement in requirements}
        for extra, requirements in setup_arguments["extras_require"].items()
    }
    assert set(names) == {"train", "bench", "serving", "docs", "dev"}
    assert names["train"] == set(TRAIN_EXTRAS)


def test_every_package_is_listed_and_typed(setup_arguments):
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert found == set(setup_arguments["packages"])
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in setup_arguments["package_data"][package]


def test_constraints_cover_what_the_extras_name(setup_arguments):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line and line[0] != "#"}
    named = set(setup_arguments["install_requires"])
    named.update(*setup_arguments["extras_require"].values())
    assert {re.split(r"[>;]", requirement)[0] for requirement in named} <= pinned


def test_no_test_is_judged_by_the_clock():
    """A busy machine may take its time; what hangs is ended from outside."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                limits = [k for k in node.keywords if k.arg in ("timeout", "deadline")]
                limits = [k for k in limits if ast.unparse(k.value) != "None"]
                found += [f"{path.name}: {ast.unparse(k)}" for k in limits]
    # Ranks of a wrong program wait for each other for ever: half an hour is no measure of speed.
    half_an_hour = "timeout=timedelta(minutes=30)"
    allowed = {f"{name}_worker.py: {half_an_hour}" for name in ("distributed", "one_size")}
    assert set(found) <= allowed


def test_no_file_names_a_home_folder():
    assert HOME_PATH.search("see " + "/home" + "/someone/x")
    assert not HOME_PATH.search("https://example.org/home/page")
    offenders = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        if HOME_PATH.search(text):
            offenders.append(path.relative_to(ROOT).as_posix())
    assert offenders == []


def test_no_conftest_imports_the_packages():
    """Named on the command line, it is read before the root's one says how kernels run.

    What it takes from ``tests`` must keep to that as well: ``tests.bench.small`` holds numbers.
    """
    found = []
    for path in (ROOT / "tests").rglob("conftest.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # What only annotations need is not imported.
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = imported_names("\n".join(map(ast.unparse, top)))
        found += [f"{path}: {name}" for name in names & set(PACKAGES)]
    assert found == []
