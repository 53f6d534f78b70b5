"""JSON files that are whole at any time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["load_json", "read_json", "write_json"]


def load_json(path: Path) -> Any:
    """The value in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON in UTF-8, or nested too deeply.

    Example:
        >>> load_json(Path("absent.json"))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'absent.json'
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if the file is missing or holds something else.

    >>> read_json(Path("absent.json"))
    {}
    """
    with suppress(OSError, ValueError):
        value = load_json(path)
        if isinstance(value, dict):
            return value
    return {}


def write_json(path: Path, value: Any) -> None:
    """Write all of ``value`` or nothing: the file is the old one or the new one at any time.

    Raises:
        OSError: the folder is missing or cannot be written.
        TypeError: ``value`` has no JSON form.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "result.json"), {"loss": 0.5})
        ...     read_json(Path(folder, "result.json"))
        {'loss': 0.5}
    """
    # Of this process: another one may write the same file at the same time.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
