"""Distribution metadata; the tools are configured in pyproject.toml."""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def read_version() -> str:
    """Reads the version from the package's text, so that building imports nothing of it."""
    text = (HERE / "esapn_kernels" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__(?:\s*:\s*\w+)?\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    if match is None:
        raise RuntimeError("esapn_kernels/__init__.py holds no __version__ = '...' line")
    return match.group(1)


CSRC = "esapn_kernels/csrc"
AGAIN = (
    "then this package again (make install, or pip install --force-reinstall --no-deps "
    "--no-cache-dir)"
)
VERBOSE = "pip install -v shows why"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


class BuildNative(build_ext):
    """Compiles the sources side by side, and tells the package why where that fails.

    The extension is optional: without it the package runs on torch. pip hides what a build prints,
    so the reason is installed in the module's place; ``python -m esapn_kernels.info`` reads it.
    """

    failed = False

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        reason = module.with_name("_native_error.txt")
        # The folder may hold what an earlier build left.
        reason.unlink(missing_ok=True)
        try:
            self.choose_compiler()
            self.compiler.compile = self.side_by_side(self.compiler.compile)
            super().build_extension(ext)
        except Exception as error:
            self.failed = True
            module.unlink(missing_ok=True)
            module.parent.mkdir(parents=True, exist_ok=True)
            why: object = error
            if isinstance(error, LinkError):
                why = f"{self.compiler.compiler_so_cxx[0]} failed to link; {VERBOSE}"
            reason.write_text(f"{why}\n", encoding="utf-8")
            raise

    def choose_compiler(self) -> None:
        """The one that Python was built with, which the machine may lack, or another."""
        if os.name == "nt":
            raise CompileError("there are none for Windows")
        if FREE_THREADED:
            raise CompileError("there are none for a Python without the GIL")
        named = [self.compiler.compiler_so_cxx[0]]
        if "CXX" not in os.environ:
            named += ["c++", "g++", "clang++"]
        found = [compiler for compiler in named if shutil.which(compiler)]
        if not found:
            raise CompileError(f"no C++ compiler was found; install g++ or clang, {AGAIN}")
        for command in ("compiler_so_cxx", "compiler_cxx", "linker_so_cxx", "linker_exe_cxx"):
            getattr(self.compiler, command)[0] = found[0]

    def side_by_side(self, compile_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
        def compile_one(source: str, options: dict[str, Any]) -> list[str]:
            try:
                return compile_all([source], **options)
            except CompileError as error:
                if not any(Path(path, "Python.h").exists() for path in self.compiler.include_dirs):
                    header = "Python.h was not found; install Python's headers (python3-dev)"
                    raise CompileError(f"{header}, {AGAIN}") from error
                compiler = self.compiler.compiler_so_cxx[0]
                raise CompileError(f"{compiler} failed on {source}; {VERBOSE}") from error

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                # The longest first; objects are linked in the order of `sources`.
                longest = sorted(sources, key=lambda source: "/isa_" not in source)
                jobs = {source: pool.submit(compile_one, source, options) for source in longest}
                return [name for source in sources for name in jobs[source].result()]

        return compile_each

    def copy_extensions_to_source(self) -> None:
        """Beside the sources, too, there is either the module or the reason."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            here = HERE / self.get_ext_filename(ext.name)
            reason = here.with_name("_native_error.txt")
            reason.unlink(missing_ok=True)
            if self.failed:
                here.unlink(missing_ok=True)
                shutil.copy(built.with_name(reason.name), reason)


class TagOfWhatWasBuilt(bdist_wheel):
    """Without the module a wheel holds nothing of one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        if self.get_finalized_command("build_ext").failed:
            return "py3", "none", "any"
        return super().get_tag()


FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]
# Nothing of libstdc++ is called, but g++ names it.
LINK_FLAGS = ["-Wl,--as-needed"]

setup(
    name="esapn-kernels",
    version=read_version(),
    description="Triton kernels and CPU paths for embeddings whose rows have their own sizes "
    "and grow (ESAPN, SIGIR 2020)",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="ESAPN kernels contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["embedding", "recommender systems", "triton", "pytorch", "embedding size search"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        "esapn_kernels",
        *(f"esapn_kernels.{folder}" for folder in ("cpu", "gpu", "ops", "sharded", "storage")),
        "esapn",
        *(f"esapn.{folder}" for folder in ("compare", "data", "models", "run", "tune")),
    ],
    ext_modules=[
        Extension(
            "esapn_kernels._native",
            sources=sorted(glob(f"{CSRC}/*.cpp", root_dir=HERE)),
            depends=["setup.py", *sorted(glob(f"{CSRC}/*.h", root_dir=HERE))],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=FLAGS,
            extra_link_args=[] if sys.platform == "darwin" else LINK_FLAGS,
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": TagOfWhatWasBuilt},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
    package_data={
        "esapn_kernels": ["py.typed"],
        "esapn": ["py.typed", "tuned.json"],
        "esapn.compare": ["page.html"],
    },
    entry_points={"console_scripts": ["esapn = esapn.__main__:main"]},
    # Floors only: torch itself pins the Triton it was built with.
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        'triton>=3.6; sys_platform == "linux" '
        'and (platform_machine == "x86_64" or platform_machine == "aarch64")',
    ],
    extras_require={
        "train": [
            "polars>=1.0",
            "pooch>=1.8",
            "tqdm>=4.66",
            "torchmetrics>=1.4",
            "matplotlib>=3.8",
            "scipy>=1.11",
            "jinja2>=3.1",
        ],
        "tune": [
            "optuna>=5.0",
        ],
        "serving": [
            "safetensors>=0.4",
            "onnx>=1.16",
            "onnxscript>=0.3",
            "onnxruntime>=1.19",
        ],
        "docs": ["pdoc>=15.0"],
        "bench": ["pytest-benchmark>=4.0", "matplotlib>=3.8"],
        "dev": [
            "pytest>=8.2",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "pytest-benchmark>=4.0",
            "ruff>=0.9",
            "mypy>=1.15",
            "import-linter>=2.17",
        ],
    },
    zip_safe=False,
)
