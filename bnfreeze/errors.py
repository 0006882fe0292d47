"""What can go wrong, as classes. A message says where, what, and how to mend it."""

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
    """Something held has changed."""


class BnfreezeWarning(UserWarning):
    """Something that works, though not in the way that was probably meant."""
