"""Distribution metadata; the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def read_version() -> str:
    """Reads the version from the package's text, so that building imports nothing of it."""
    text = (HERE / "esapn_kernels" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__(?:\s*:\s*\w+)?\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    if match is None:
        raise RuntimeError("esapn_kernels/__init__.py holds no __version__ = '...' line")
    return match.group(1)


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
