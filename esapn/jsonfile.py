"""JSON files that are whole at any time."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["read_json", "write_json"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if the file is missing or holds something else.

    >>> read_json(Path("absent.json"))
    {}
    """
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
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
