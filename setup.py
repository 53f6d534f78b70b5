"""Distribution metadata; the tools are configured in pyproject.toml."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def read_version() -> str:
    """Reads the version from the package's text, so that building imports nothing of it."""
    text = (HERE / "esapn_kernels" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__(?:\s*:\s*\w+)?\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    if match is None:
        raise RuntimeError("esapn_kernels/__init__.py holds no __version__ = '...' line")
    return match.group(1)


class BuildNative(build_ext):
    """Compiles the sources side by side, and tells the package why where that fails.

    The extension is optional: without it the package runs on torch. pip hides what a build prints,
    so the reason is kept in a file that ``python -m esapn_kernels.info`` reads.
    """

    def build_extension(self, ext: Extension) -> None:
        reason = Path(self.get_ext_fullpath(ext.name)).with_name("_native_error.txt")
        reason.parent.mkdir(parents=True, exist_ok=True)
        reason.unlink(missing_ok=True)
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            def compile_one(source: str) -> list[str]:
                return compile_all([source], **options)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [name for names in pool.map(compile_one, sources) for name in names]

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        except Exception as error:
            reason.write_text(f"{error}\n", encoding="utf-8")
            raise


FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
]
SOURCES = (
    *("binding", "available", "group", "parallel", "resize"),
    *("isa_avx512", "isa_avx2", "isa_baseline"),
)
CSRC = "esapn_kernels/csrc"
NATIVE = Extension(
    "esapn_kernels._native",
    # The longest first: they are compiled side by side.
    sources=[
        f"{CSRC}/{name}.cpp" for name in sorted(SOURCES, key=lambda s: not s.startswith("isa"))
    ],
    depends=[str(path.relative_to(HERE)) for path in (HERE / CSRC).glob("*.h")],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args=FLAGS,
    extra_link_args=[]
    if sys.platform == "darwin"
    else ["-static-libgcc", "-Wl,--exclude-libs,ALL"],
    py_limited_api=True,
    optional=True,
)

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
        *(f"esapn_kernels.{folder}" for folder in ("cpu", "gpu", "ops", "storage")),
        "esapn",
        *(f"esapn.{folder}" for folder in ("compare", "data", "models", "run")),
    ],
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    package_data={
        "esapn_kernels": ["py.typed"],
        "esapn": ["py.typed"],
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
