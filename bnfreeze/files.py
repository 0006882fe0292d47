"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacement", "write_whole"]


@contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new, empty file beside `path`, which takes its place after the block.

    Raises:
        OSError: it cannot be written; what was there before is still there, and so it is after any
            error in the block.
    """
    path = Path(os.path.realpath(path))
    name = ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".bnfreeze.")
        os.close(handle)
        yield Path(name)
        # As open() would have made it, which mkstemp does not.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException as error:
        if name:
            os.unlink(name)
        if isinstance(error, OSError) and error.errno:
            error.filename = os.fspath(path)  # nobody has asked for the other
        raise


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` beside `path` and rename it there, so that no half of it is ever seen.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        # A pipe or /dev/stdout is written to, and not put something else in its place.
        path.write_text(text, encoding="utf-8")
        return
    with replacement(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
