"""What the command writes besides its tables: JSON and lines to stdout, the rest to stderr."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from bnfreeze.text import escaped

_SECOND: Final = 1.0


def print_json(value: dict[str, Any]) -> None:
    """Print one object."""
    import json

    # ASCII: what could move a terminal's cursor or turn its text around is written as \u....
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_line(*cells: str) -> None:
    """Print one line, with a tab between cells."""
    sys.stdout.write("\t".join(map(escaped, cells)) + "\n")


def complain(message: str) -> int:
    """Write an error, and give its exit code."""
    sys.stderr.write(f"bnfreeze: {escaped(message)}\n")
    return 2


def complain_of_defect() -> int:
    """Show the traceback of an unforeseen error; exit code 1 would say that something differs."""
    import traceback

    for line in traceback.format_exc().splitlines():
        sys.stderr.write(f"{escaped(line)}\n")
    return complain("This is a defect of bnfreeze: please report it with the lines above.")


@contextmanager
def progress_line(path: str) -> Iterator[Callable[[int, int], None]]:
    """A line on stderr while reading a file takes longer than a second; on a terminal only.

    Gives a function that takes how many tensors are done, and of how many.
    """
    name = escaped(os.path.basename(path) or path)[:40]
    count = ""
    over = threading.Event()

    def tell(done: int, total: int) -> None:
        nonlocal count
        count = f", tensor {done:,} of {total:,}"

    def show() -> None:
        seconds = 0
        while not over.wait(_SECOND):
            seconds += 1
            sys.stderr.write(f"\r{name}: {seconds} s{count}\x1b[K")
            sys.stderr.flush()
        if seconds:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    thread = threading.Thread(target=show)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield tell
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
