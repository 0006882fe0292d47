"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacement(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a new, empty file beside `path`, which replaces it after the block.

    After any error in the block, what was at `path` before is still there.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    fresh = path.parent / f".bnfreeze.{secrets.token_hex(8)}"
    try:
        fresh.touch(exist_ok=False)
        yield fresh
        os.replace(fresh, path)
    except BaseException as error:
        with suppress(OSError):
            fresh.unlink()
        if isinstance(error, OSError) and error.errno:
            error.filename = os.fspath(path)  # not the temporary name
        raise


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to a new file and rename it to `path`, so that nobody sees half of it.

    Raises:
        OSError: it cannot be written; what was at `path` before is still there.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        # A pipe or /dev/stdout must be written to, not replaced.
        path.write_text(text, encoding="utf-8")
        return
    with replacement(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
