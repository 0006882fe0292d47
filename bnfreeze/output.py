"""What the command writes: results to stdout and to files, progress and errors to stderr."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from bnfreeze.errors import BnfreezeError
from bnfreeze.text import escaped

__all__ = [
    "ProgressLine",
    "check_outputs",
    "complain",
    "complain_of_defect",
    "exit_code",
    "print_json",
    "print_line",
    "show",
]

_SECOND: Final = 1.0


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse to write over anything but an earlier picture: it may be the checkpoint itself."""
    for output in filter(None, (options.html, options.svg)):
        if os.path.isfile(output):
            with open(output, "rb") as file:
                head = file.read(16)
            if head and not head.lower().startswith((b"<svg", b"<!doctype html")):
                raise BnfreezeError(f"{output}: is there already, and is no picture.")


def exit_code(result: Any) -> int:
    """0 if the result is clean; 2 if a model was not read, which may hold anything; else 1."""
    return 2 if getattr(result, "unread", ()) else 0 if result.ok else 1


def show(
    options: argparse.Namespace,
    sheets: Sequence[Any],
    data: Callable[[], dict[str, Any]],
    lines: Callable[[], Sequence[tuple[str, ...]]],
) -> None:
    """Print the results in the form that was asked for, and save their pictures."""
    if options.json:
        print_json(data())
    elif options.plain:
        for line in lines():
            print_line(*line)
    else:
        _print_sheets(sheets)
    if options.html or options.svg:
        from bnfreeze.files import write_whole
        from bnfreeze.tables import html_of, svg_of

        for path, draw in ((options.html, html_of), (options.svg, svg_of)):
            if path:
                write_whole(path, draw(sheets))


def _print_sheets(sheets: Sequence[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    # Not written by rich, which handles a closed pipe in its own way.
    with console.capture() as captured:
        for number, sheet in enumerate(sheets):
            if number:
                console.print()
            console.print(sheet)
    sys.stdout.write(captured.get())


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


class ProgressLine:
    """A line on stderr while reading a file takes longer than a second; on a terminal only."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._count = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __call__(self, done: int, total: int) -> None:
        """Show how many tensors are done, and of how many."""
        self._count = f", tensor {done:,} of {total:,}"

    def _run(self) -> None:
        name = escaped(os.path.basename(self._path) or self._path)[:40]
        seconds = 0
        while not self._over.wait(_SECOND):
            seconds += 1
            sys.stderr.write(f"\r{name}: {seconds} s{self._count}\x1b[K")
            sys.stderr.flush()
        if seconds:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._over.set()
            self._thread.join()
