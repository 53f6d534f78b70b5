"""The package as a whole: its layers, its optional dependencies and its metadata."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

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
    """What setup.py passes to setuptools."""
    arguments: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
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
    offenders = {
        path.relative_to(ROOT).as_posix(): found
        for path in files
        if (found := forbidden & imported_names(path.read_text(encoding="utf-8")))
    }
    # Imported where a report is drawn; the next test imports the package without it.
    assert offenders == {"esapn_kernels/grow.py": {"matplotlib"}}


def test_without_triton_or_train_extras():
    """The package is imported, and what it says of the machine names what is missing."""
    # Blocked, not only absent from sys.modules afterwards: torch itself loads tqdm where it can.
    code = (
        "import sys\n"
        f"for name in {('triton', *TRAIN_EXTRAS)!r}:\n"
        "    sys.modules[name] = None\n"
        "import esapn_kernels, esapn_kernels.grow\n"
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
    assert set(names) == {"train", "tune", "bench", "serving", "docs", "dev"}
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


def test_the_extension_is_optional_and_names_every_source(setup_arguments):
    (native,) = setup_arguments["ext_modules"]
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "esapn_kernels/csrc").iterdir()}
    assert csrc and native.optional
    assert {*native.sources, *native.depends} == {*csrc, "setup.py"}
    assert not any(option.startswith("-march") for option in native.extra_compile_args)


@pytest.fixture
def checkout(tmp_path):
    """The packages, with another extension: it has one source, which compiles in no time."""
    without = shutil.ignore_patterns("csrc", "_native*", "__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=without)
    for name in ("setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    csrc = tmp_path / "esapn_kernels" / "csrc"
    csrc.mkdir()
    (csrc / "binding.cpp").write_text(
        "#include <Python.h>\n"
        'static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", 0, 0, 0, 0, 0, 0, 0};\n'
        "PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }\n"
    )
    return tmp_path


def build(checkout, *arguments, **env) -> set[str]:
    """Runs a command of setup.py; returns what it left of the module, there and in wheels."""
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=checkout,
        env={**{k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path.name for path in (checkout / "esapn_kernels").glob("_native*")}


def without_compiler(checkout) -> dict[str, str]:
    (checkout / "empty").mkdir(exist_ok=True)
    return {"PATH": str(checkout / "empty")}


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def wheel(checkout, **env) -> tuple[str, set[str]]:
    """Builds a wheel; returns its name, and those of its native files."""
    shutil.rmtree(checkout / "dist", ignore_errors=True)
    build(checkout, "bdist_wheel", **env)
    (path,) = (checkout / "dist").iterdir()
    with zipfile.ZipFile(path) as file:
        names = {Path(name).name for name in file.namelist()}
    return path.name, {
        name for name in names if name.startswith("_native") or name.endswith(".cpp")
    }


def reason(checkout) -> str:
    text = (checkout / "esapn_kernels/_native_error.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1
    return text


def test_without_a_compiler_the_reason_takes_the_modules_place(checkout):
    absent = without_compiler(checkout)
    assert build(checkout, "build_ext", "--inplace", **absent) == {"_native_error.txt"}
    assert reason(checkout).startswith("no C++ compiler was found; install g++ or clang")
    name, files = wheel(checkout, **absent)
    assert name.endswith("-py3-none-any.whl") and files == {"_native_error.txt"}


@needs_compiler
def test_no_build_leaves_what_the_one_before_made(checkout):
    absent, in_place = without_compiler(checkout), ("build_ext", "--inplace")
    for _ in range(2):
        assert build(checkout, *in_place, **absent) == {"_native_error.txt"}
        (built,) = build(checkout, *in_place)
        assert built.endswith(".so")
    for _ in range(2):
        name, (built,) = wheel(checkout)
        assert "-cp310-abi3-" in name and built.endswith(".so")
        name, files = wheel(checkout, **absent)
        assert name.endswith("-py3-none-any.whl") and files == {"_native_error.txt"}


@needs_compiler
def test_what_fails_is_named(checkout):
    failing = {"LDFLAGS": "-lno_such_library"}
    assert build(checkout, "build_ext", "--inplace", **failing) == {"_native_error.txt"}
    assert " failed to link; " in reason(checkout)
    source = checkout / "esapn_kernels/csrc/binding.cpp"
    source.write_text(source.read_text().replace("return", "retrun"))
    assert build(checkout, "build_ext", "--inplace") == {"_native_error.txt"}
    assert " failed on esapn_kernels/csrc/binding.cpp; " in reason(checkout)


def test_constraints_cover_what_the_extras_name(setup_arguments):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line and line[0] != "#"}
    named = set(setup_arguments["install_requires"])
    named.update(*setup_arguments["extras_require"].values())
    assert {re.split(r"[>;]", requirement)[0] for requirement in named} <= pinned


def pins(path: Path) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in path.read_text().splitlines()]
    assert all(not line or line[0] == "#" or "==" in line for line in lines)
    pairs = [line.split("==") for line in lines if "==" in line]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_sharded_tables_are_pinned_as_the_constraints_are():
    sharded, ours = pins(ROOT / "requirements-sharded.txt"), pins(ROOT / "constraints.txt")
    assert {"pytest", "hypothesis", "tqdm"} <= sharded.keys() & ours.keys()
    # TorchRec takes no newer one, and these tables take none at all.
    differing = {name for name in sharded.keys() & ours.keys() if sharded[name] != ours[name]}
    assert differing == {"torchmetrics"}


def test_the_clients_are_pinned_as_the_constraints_are():
    clients, ours = pins(ROOT / "tests/clients/requirements.txt"), pins(ROOT / "constraints.txt")
    assert {"pytest", "hypothesis", "numpy"} <= clients.keys() & ours.keys()
    assert all(clients[name] == ours[name] for name in clients.keys() & ours.keys())


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
