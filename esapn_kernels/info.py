"""What runs where: versions, devices and the backend a call takes.

``python -m esapn_kernels.info`` prints it for a bug report and :func:`collect` returns it as the
provenance of a result.

Importing this module queries no device and needs neither Triton nor a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .ops import backend as _backend
from .ops.backend import BACKENDS, resolve_backend

TESTED_TRITON = ("3.7.1", "3.8.0", "3.9.0")
"""Versions on which the kernels' tests passed, interpreted; spills are in ``docs/design.md``."""


def backend_status() -> dict[str, str | None]:
    """Returns for every backend why it cannot run here, or None where it can.

    Example:
        >>> backend_status()["torch"] is None
        True
    """
    triton = _backend.TRITON_ERROR
    if triton is None and not _backend.INTERPRETED and not _cuda_available():
        triton = "no CUDA device; runs interpreted with TRITON_INTERPRET=1"
    reasons = {"triton": triton, "native": _backend.NATIVE_ERROR}
    return {name: reasons.get(name) for name in BACKENDS}


def collect() -> dict[str, Any]:
    """Returns versions, devices, backends and the commit as values that JSON can hold.

    Whatever cannot be found out is None; nothing is raised. A key ``"auto"`` maps a device type to
    the backend that ``"auto"`` takes there. ``"instruction_sets"`` are those of the machine that
    native kernels are built for, the widest first, and ``"instruction_set"`` is the one in use.
    ``"commit"`` is set only where these very files are tracked by git.

    Example:
        >>> sorted(collect()["auto"])
        ['cpu', 'cuda']
    """
    commit, dirty = _commit()
    return {
        "esapn_kernels": _own_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton") if _backend.TRITON_ERROR is None else None,
        "triton_error": _backend.TRITON_ERROR,
        "triton_tested": list(TESTED_TRITON),
        "numpy": _version("numpy"),
        "torchrec": _version("torchrec"),
        "fbgemm": _version("fbgemm_gpu-cpu") or _version("fbgemm_gpu"),
        "cuda_runtime": torch.version.cuda,
        "driver": _driver(),
        "devices": _devices(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "interpreted": _backend.INTERPRETED,
        "instruction_set": _instruction_set(),
        "instruction_sets": _instruction_sets(),
        "auto": {kind: _auto(kind) for kind in ("cpu", "cuda")},
        "backends": backend_status(),
        "commit": commit,
        "dirty": dirty,
    }


def main(argv: list[str] | None = None) -> int:
    """Prints :func:`collect` as text, or as JSON with ``--json``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m esapn_kernels.info", description="Versions, devices and backends."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        resolve_backend("auto", torch.device("cpu"))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    info = collect()
    print(json.dumps(info, indent=2) if args.json else _text(info))
    return 0


def _sharded(info: dict[str, Any]) -> str:
    if info["torchrec"] is None:
        return "TorchRec is not installed: see docs/sharded.md"
    fbgemm = info["fbgemm"]
    return f"torchrec {info['torchrec']}, " + (f"fbgemm {fbgemm}" if fbgemm else "without fbgemm")


def _text(info: dict[str, Any]) -> str:
    commit = info["commit"]
    rows = [
        ("esapn_kernels", info["esapn_kernels"] or "unknown"),
        ("commit", f"{commit}{' (modified)' if info['dirty'] else ''}" if commit else "none"),
        ("python", info["python"]),
        ("torch", info["torch"]),
        ("triton", info["triton_error"] or info["triton"] or "unknown"),
        ("triton tested", ", ".join(info["triton_tested"])),
        ("numpy", info["numpy"] or "not installed"),
        ("sharded tables", _sharded(info)),
        ("cuda runtime", info["cuda_runtime"] or "none: torch is built without CUDA"),
        ("driver", info["driver"] or "none found"),
        ("platform", info["platform"]),
        ("cpu", f"{info['cpu'] or 'unknown'}, {info['threads']} threads"),
    ]
    for device in info["devices"]:
        memory = device["memory_bytes"] / 2**30
        rows.append(
            (device["device"], f"{device['name']}, sm_{device['capability']}, {memory:.1f} GiB")
        )
    if not info["devices"]:
        rows.append(("cuda device", "none"))
    rows += [(f"auto on {kind}", backend) for kind, backend in info["auto"].items()]
    for backend, reason in info["backends"].items():
        available = "available"
        if backend == "triton" and info["interpreted"]:
            available = "available, interpreted (TRITON_INTERPRET=1)"
        if backend == "native" and reason is None:
            sets = ", ".join(info["instruction_sets"])
            available = f"available, {info['instruction_set']} (of {sets})"
        rows.append((backend + " backend", available if reason is None else reason))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _auto(kind: str) -> str | None:
    try:
        return resolve_backend("auto", torch.device(kind))
    except (ValueError, RuntimeError):
        return None


def _instruction_sets() -> list[str]:
    return [] if _backend.NATIVE_ERROR is not None else _backend.native.instruction_sets()


def _instruction_set() -> str | None:
    return None if _backend.NATIVE_ERROR is not None else _backend.native.instruction_set()


def _cuda_available() -> bool:
    with warnings.catch_warnings():
        # An old driver is a warning in torch; here it is one more reason for "no CUDA device".
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _devices() -> list[dict[str, Any]]:
    if not _cuda_available():
        return []
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except (RuntimeError, AssertionError):
            continue
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _own_version() -> str | None:
    version = getattr(sys.modules.get("esapn_kernels"), "__version__", None)
    return version if isinstance(version, str) else _version("esapn-kernels")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    output = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0].strip() if output else None


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _commit() -> tuple[str | None, bool | None]:
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    # Installed inside someone else's checkout, the files are not tracked and HEAD says nothing.
    if not _run(*git, "ls-files", "--error-unmatch", here.name):
        return None, None
    commit = _run(*git, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None, None
    status = _run(*git, "status", "--porcelain", "--untracked-files=no")
    return commit, None if status is None else bool(status)


def _run(*command: str) -> str | None:
    """Returns the stripped output of a command, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,  # a driver in trouble may never answer
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
