"""The names of one checkpoint matched with those of another that has a prefix more, or another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from bnfreeze.errors import PolicyError
from bnfreeze.patterns import nearest

__all__ = ["PrefixMatch", "check_prefixes", "mapped", "prefix_matches"]

Shapes = Mapping[str, tuple[int, ...]]

# Prefixes of more segments are not looked for.
_DEEPEST: Final = 8
# An ending that more names have, such as `0.conv1.weight`, says nothing about the prefix.
_COMMONEST: Final = 16
# So many of the likeliest prefixes are counted exactly.
_COUNTED: Final = 12
# A suggestion is looked for among the first.
_SUGGESTED_FROM: Final = 20_000


@dataclass(frozen=True)
class PrefixMatch:
    """Names that are alike when one prefix is put in the place of another.

    Attributes:
        old: the prefix in the first; empty, or with a dot at its end.
        new: the prefix in the second, likewise.
        matched: how many tensors then have the same name and shape.
    """

    old: str
    new: str
    matched: int


def prefix_matches(first: Shapes, second: Shapes) -> tuple[PrefixMatch, ...]:
    """Find the prefixes that make the names of two models alike.

    Args:
        first: the shape of each tensor, by name.
        second: the same of the other model.

    Returns:
        the match that fits best, and all that fit half as well; none if nothing fits. If the
        names fit as they are, that alone.
    """
    # Less than a quarter in common is chance: many models have a `conv1.weight`.
    enough = max(min(len(first), len(second)) / 4, 1)
    as_they_are = _matched("", "", first, second)
    votes = Counter() if 2 * as_they_are >= min(len(first), len(second)) else _votes(first, second)
    counted = [
        PrefixMatch(old, new, _matched(old, new, first, second))
        for (old, new), _ in votes.most_common(_COUNTED)
    ]
    counted.sort(key=lambda one: -one.matched)
    best = counted[0].matched if counted else 0
    if as_they_are >= enough and 2 * as_they_are >= best:
        return (PrefixMatch("", "", as_they_are),)
    return tuple(one for one in counted if one.matched >= max(enough, best / 2))


def _matched(old: str, new: str, first: Shapes, second: Shapes) -> int:
    return sum(
        second.get(new + name[len(old) :]) == shape
        for name, shape in first.items()
        if name.startswith(old)
    )


def _votes(first: Shapes, second: Shapes) -> Counter[tuple[str, str]]:
    """How many names have the same ending after two prefixes, for each two prefixes."""
    prefixes: dict[str, list[str]] = {}
    for name in second:
        for prefix, ending in _splits(name):
            prefixes.setdefault(ending, []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name in first:
        for old, ending in _splits(name):
            found = prefixes.get(ending, ())
            if len(found) > _COMMONEST:
                break
            for new in found:
                # Prefixes that end alike belong to a longer ending.
                if old.split(".")[-2:-1] != new.split(".")[-2:-1]:
                    votes[old, new] += 1
    return votes


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Each way to divide a name into a prefix and an ending, the longest ending first.

    An ending has two segments: `weight` alone is no likeness.
    """
    last, position = name.rfind("."), 0
    for _ in range(_DEEPEST):
        if position > last:
            return
        yield name[:position], name[position:]
        position = name.find(".", position) + 1


def check_prefixes(
    prefixes: Mapping[str, str], first: Iterable[str], second: Iterable[str]
) -> None:
    """Refuse prefixes that no name has.

    Raises:
        PolicyError: names the nearest modules.
    """
    for wanted, names in ((prefixes, list(first)), (prefixes.values(), list(second))):
        for prefix in map(_dotted, wanted):
            if not any(name.startswith(prefix) for name in names):
                begins = (prefix for name in names[:_SUGGESTED_FROM] for prefix, _ in _splits(name))
                close = nearest(prefix[:-1], {begin[:-1]: None for begin in begins})
                hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise PolicyError(f"No name begins with {prefix[:-1]!r}.{hint}")


def mapped(names: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """The name that each name of the first has in the second.

    Args:
        names: those of the first.
        prefixes: the old and the new prefixes, with a dot at the end or without. The longest old
            one decides; names without any stay.

    Raises:
        PolicyError: two names would become one.
    """
    whole = {_dotted(old): _dotted(new) for old, new in prefixes.items()}
    longest = sorted(whole, key=len, reverse=True)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        old = next((old for old in longest if name.startswith(old)), None)
        found[name] = name if old is None else whole[old] + name[len(old) :]
        if taken.setdefault(found[name], name) != name:
            raise PolicyError(f"{taken[found[name]]} and {name} would both become {found[name]}.")
    return found


def _dotted(prefix: str) -> str:
    return f"{prefix}." if prefix and not prefix.endswith(".") else prefix
