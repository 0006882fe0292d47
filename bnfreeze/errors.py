"""What can go wrong, as classes. A message says where, what, and how to mend it."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress


class BnfreezeError(Exception):
    """The base of every error that bnfreeze raises of its own."""


class PolicyError(BnfreezeError, ValueError):
    """A policy or a pattern that cannot be kept: unknown, matching nothing, or impossible here."""


class NotFrozenError(BnfreezeError, AssertionError):
    """Layers that should be frozen are not.

    Attributes:
        layers: the dotted name of each such layer, and why it is not frozen.
    """

    def __init__(self, message: str = "", layers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.layers = layers


class CheckpointError(BnfreezeError):
    """A checkpoint that was not read."""


class UnsafeCheckpointError(CheckpointError):
    """Reading it would need to run or import something that the file names."""


class CorruptCheckpointError(CheckpointError):
    """The file's parts contradict each other, or some are missing."""


def damaged(what: str) -> CorruptCheckpointError:
    """The error of a file that is not as it was written; `what` is a sentence."""
    return CorruptCheckpointError(f"Damaged: {what}")


class UnsupportedFormatError(CheckpointError):
    """Not a checkpoint of a kind that bnfreeze reads."""


class BnfreezeWarning(UserWarning):
    """Something that works, though not in the way that was probably meant."""


def add_note(error: BaseException, text: str) -> None:
    """Add a line to an error that somebody else raised; before Python 3.11, warn beside it."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        # If warnings are errors, the error itself is still the one that counts.
        with suppress(BnfreezeWarning):
            warnings.warn(text, BnfreezeWarning, stacklevel=4)
