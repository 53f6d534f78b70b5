"""Command line: ``python -m esapn search | compare | tune | report``."""

from __future__ import annotations

import argparse
import re
import sys

from .cli import parse, program
from .errors import UserError

# What torch says on a GPU and on a CPU.
OUT_OF_MEMORY = "out of memory|allocate memory"
GOES_ON = {"search": "; --resume goes on"}
GOES_ON |= dict.fromkeys(("compare", "tune"), "; the same command goes on")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line and status 2."""
    args = parse(argv)
    try:
        return _run(args)
    except UserError as error:
        return _refuse(args.command, str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        less = "; --workers 1 needs least" if args.command in ("compare", "tune") else ""
        return _refuse(args.command, f"out of memory{less}")
    except KeyboardInterrupt:
        print(f"interrupted{GOES_ON.get(args.command, '')}", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename} " if error.filename else ""
        return _refuse(args.command, f"{where}{error.strerror or error}")


def _run(args: argparse.Namespace) -> int:
    # Imported for the command alone: torch takes seconds.
    if args.command == "search":
        from .run.command import search

        return search(args)
    if args.command == "tune":
        from .tune.command import tune

        return tune(args)
    from .compare.command import compare, report

    return compare(args) if args.command == "compare" else report(args)


def _refuse(command: str, message: str) -> int:
    print(f"{program()} {command}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
