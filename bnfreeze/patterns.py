"""Patterns over dotted module names. Knows nothing of torch."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bnfreeze.errors import PolicyError

# The name of a running mean or variance, of torch's layers and of others. Keras and tutorials say
# moving_variance, batch renormalisation running_avg_std, bias-free denoisers running_sd. A
# recurrent batch norm has running_mean_0, running_mean_1, … for its time steps.
MEAN_OR_VARIANCE = r"(?:running|moving)_(?:\w+_)?(?:mean|var(?:iance)?|std|sd)(?:_?\d+)?"


@dataclass(frozen=True)
class Pattern:
    """A pattern over dotted names: ``*`` and ``?`` stay inside a segment, ``**`` spans any number.

    A name that matches stands for itself and all below it. The empty pattern is the root: the
    whole model.
    """

    text: str
    # One for each segment; None for ``**``.
    _segments: tuple[re.Pattern[str] | None, ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern such as ``"backbone.layer?.**.bn1"``.

        Raises:
            PolicyError: not a string, an empty segment, or ``**`` beside other characters.
        """
        if not isinstance(text, str):
            raise PolicyError(
                f"A pattern is a string of dotted names such as 'backbone.layer4', "
                f"not {type(text).__name__}."
            )
        segments = text.split(".") if text else []
        return cls(text, tuple(_segment(segment, text) for segment in segments))

    def matches(self, *names: str) -> bool:
        """Whether the pattern matches any of the names, or a module above one."""
        return any(map(self._matches, names))

    def _matches(self, name: str) -> bool:
        segments = list(enumerate(name.split("."), 1)) if name else []
        # How many segments of the name the pattern so far can stand for. A single regex would take
        # forever for several ``**`` and a long name that does not match.
        counts = {0}
        for pattern in self._segments:
            if pattern is not None:
                counts = {n for n, seg in segments if n - 1 in counts and pattern.fullmatch(seg)}
                continue
            for n, segment in segments:
                if segment and n - 1 in counts:
                    counts.add(n)
        return bool(counts)


def _segment(segment: str, whole: str) -> re.Pattern[str] | None:
    if segment == "**":
        return None
    if not segment:
        raise PolicyError(
            f"Pattern {whole!r} has an empty segment; write dotted names such as 'backbone.layer4'."
        )
    if "**" in segment:
        raise PolicyError(
            f"Pattern {whole!r}: '**' spans whole segments and stands alone between dots, "
            f"as in 'head.**.bn1'; inside {segment!r} use a single '*'."
        )
    # Brackets are special to fnmatch, but not in our patterns.
    return re.compile(fnmatch.translate(segment.replace("[", "[[]")))


def hint(text: str, names: Iterable[str]) -> str:
    """``" Did you mean …?"`` with the names that a mistyped pattern most likely meant, best first.

    Compared whole, and by the last segment: ``layer4`` finds ``backbone.layer4``. Empty if no name
    is near.
    """
    names = [name for name in names if name]
    by_leaf: dict[str, list[str]] = {}
    for name in names:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    near: list[str] = []
    for name in difflib.get_close_matches(text, names, n=3, cutoff=0.7):
        if not any(name.startswith(f"{other}.") for other in near):
            near.append(name)
    if not near:
        leaves = difflib.get_close_matches(text.rpartition(".")[2], by_leaf, n=3, cutoff=0.6)
        near = [name for leaf in leaves for name in by_leaf[leaf]][:3]
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def with_parents(names: Iterable[str], most: int = 20_000) -> dict[str, None]:
    """The names and those above them, in order; of very many, the first."""
    found: dict[str, None] = {}
    for name in names:
        while name and name not in found and len(found) < most:
            found[name] = None
            name = name.rpartition(".")[0]
    return found
