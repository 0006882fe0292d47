"""What can go wrong, as classes. A message says where, what, and how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfreeze.proof.report import DriftReport

__all__ = [
    "BnfreezeError",
    "BnfreezeWarning",
    "CheckpointError",
    "CorruptCheckpoint",
    "DriftError",
    "PolicyError",
    "UnsafeCheckpoint",
    "UnsupportedFormat",
]


class BnfreezeError(Exception):
    """The base of every error that bnfreeze raises of its own."""


class PolicyError(BnfreezeError, ValueError):
    """A policy or a pattern that cannot be kept: unknown, matching nothing, or impossible here."""


class CheckpointError(BnfreezeError):
    """A checkpoint that was not read."""


class UnsafeCheckpoint(CheckpointError):  # noqa: N818 - the name is part of the public contract
    """Reading it would need to run or import something that the file names."""


class CorruptCheckpoint(CheckpointError):  # noqa: N818 - the name is part of the public contract
    """The file's parts contradict each other, or some are missing."""


class UnsupportedFormat(CheckpointError):  # noqa: N818 - the name is part of the public contract
    """Not a checkpoint of a kind that bnfreeze reads."""


class DriftError(BnfreezeError, AssertionError):
    """Something held has changed.

    Attributes:
        report: the `DriftReport`; None where there is none.
    """

    def __init__(self, message: str = "", report: DriftReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[DriftError], tuple[str, DriftReport | None]]:
        # The way that pickle rebuilds an exception by itself would lose the report.
        return (type(self), (str(self), self.report))


class BnfreezeWarning(UserWarning):
    """Something that works, though not in the way that was probably meant."""
