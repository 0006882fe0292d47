"""Progress on a terminal."""

from __future__ import annotations

import os
import sys
import threading
from typing import Final

from bnfreeze.text import escaped

__all__ = ["Progress"]

_SECOND: Final = 1.0


class Progress:
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

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            self._over.set()
            self._thread.join()
