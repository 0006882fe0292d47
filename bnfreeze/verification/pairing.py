"""Which models of two checkpoints belong together, and which of their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Final

from bnfreeze.checkpoints import StateDict, StoredTensor
from bnfreeze.errors import CheckpointError, PolicyError
from bnfreeze.inspection.origin import Found
from bnfreeze.patterns import hint, with_parents
from bnfreeze.text import listed

Tensors = Mapping[str, StoredTensor]

# Prefixes of more segments are not looked for.
_DEEPEST: Final = 8
# An ending that more names have, such as `0.conv1.weight`, says nothing about the prefix.
_COMMONEST: Final = 16
# So many of the likeliest prefixes are counted exactly.
_COUNTED: Final = 12
# Names beyond these are not looked at for a prefix, nor more pairs of models than these: a hostile
# file could have any number.
_MOST_NAMES: Final = 20_000
_MOST_PAIRS: Final = 64


def paired(first: Found, second: Found) -> list[tuple[StateDict | None, StateDict | None]]:
    """Which model is compared with which.

    Those with the same key are; one that is left on a side, with the one on the other that fits.

    Raises:
        CheckpointError: none or several fit, so that no model has a partner.
    """
    left = {part.key: part for part in second.parts.all}
    pairs: list[tuple[StateDict | None, StateDict | None]] = [
        (part, left.pop(part.key, None)) for part in first.parts.all
    ]
    ours = _models([one for one, other in pairs if one and not other])
    theirs = _models([*left.values()])
    is_clear = any(one and other and one.has_norm_layers for one, other in pairs)
    if ours and theirs:
        alone = len(ours) == len(theirs) == 1 and not is_clear
        fitting = [
            (one, other)
            for one in ours
            for other in theirs
            if len(ours) * len(theirs) <= _MOST_PAIRS
            and (alone or _prefixes(one.tensors, other.tensors))
        ]
        if len(fitting) == 1:
            [(one, other)] = fitting
            pairs[pairs.index((one, None))] = (one, left.pop(other.key))
        elif not is_clear:
            there = "; ".join(
                f"{side.checkpoint.path or side.checkpoint.kind} has "
                + listed([repr(part.key) if part.key else "one without a key" for part in parts], 8)
                for side, parts in ((first, ours), (second, theirs))
            )
            several = {"--key-a": ours, "--key-b": theirs}
            options = [option for option, parts in several.items() if len(parts) > 1]
            keys = tuple(parts[0].key if len(parts) > 1 else None for parts in several.values())
            raise CheckpointError(
                f"It is not clear which models to compare: {there}. Choose with "
                f"{' and '.join(options)} (in Python, for example: key={keys!r})."
            )
    return [*pairs, *((None, part) for part in left.values())]


def _models(parts: list[StateDict]) -> list[StateDict]:
    return [part for part in parts if part.has_norm_layers] or parts


def common_prefix(first: Tensors, second: Tensors) -> dict[str, str]:
    """The prefix of the first's names that stands for another in the second's.

    Returns:
        the old and the new prefix; nothing if the names are alike, or nothing makes them so.

    Raises:
        CheckpointError: several fit, as those of a student and a teacher do.
    """
    found = _prefixes(first, second)
    if len(found) > 1:
        ways = ", ".join(f"{a!r} → {b!r} ({count} tensors)" for (a, b), count in found.items())
        old, new = next(iter(found))
        raise CheckpointError(
            f"The names fit in several ways: {ways}. Choose one with --map {old[:-1]}={new[:-1]} "
            f"(in Python: prefixes={{{old!r}: {new!r}}})."
        )
    return {old: new for old, new in found if old != new}


def _prefixes(first: Tensors, second: Tensors) -> dict[tuple[str, str], int]:
    """The prefixes that fit best, and all that fit half as well; that of names that are alike.

    Returns:
        the old and the new prefix, each empty or with a dot at its end, and how many tensors are
        then alike; the most first.
    """
    smaller = min(len(first), len(second))
    # Less than a quarter in common is chance: many models have a `conv1.weight`.
    enough = max(smaller / 4, 1)
    alike = _matched("", "", first, second)
    votes = Counter() if 2 * alike >= smaller else _votes(first, second)
    found = Counter(
        {pair: _matched(*pair, first, second) for pair, _ in votes.most_common(_COUNTED)}
    )
    best = max(found.values(), default=0)
    if alike >= enough and 2 * alike >= best:
        return {("", ""): alike}
    return {p: count for p, count in found.most_common() if count >= max(enough, best / 2)}


def _matched(old: str, new: str, first: Tensors, second: Tensors) -> int:
    """How many tensors have the same name and shape."""
    return sum(
        other.shape == tensor.shape
        for name, tensor in first.items()
        if name.startswith(old) and (other := second.get(new + name[len(old) :]))
    )


def _votes(first: Iterable[str], second: Iterable[str]) -> Counter[tuple[str, str]]:
    """How many names end alike after two prefixes, for each two prefixes."""
    prefixes: dict[str, list[str]] = {}
    for name in islice(second, _MOST_NAMES):
        for prefix, ending in _splits(name):
            prefixes.setdefault(ending, []).append(prefix)
    return Counter(
        (old, new)
        for name in islice(first, _MOST_NAMES)
        for old, ending in _splits(name)
        if len(found := prefixes.get(ending, ())) <= _COMMONEST
        for new in found
        # Prefixes that end alike belong to a longer ending.
        if old.split(".")[-2:-1] != new.split(".")[-2:-1]
    )


def _splits(name: str) -> list[tuple[str, str]]:
    """Each way to divide a name into a prefix and an ending, the longest ending first.

    An ending has two segments: to share `weight` alone is no likeness.
    """
    dots = islice(re.finditer(r"\.", name), _DEEPEST)
    starts = [0, *(dot.end() for dot in dots)][:-1]
    return [(name[:start], name[start:]) for start in starts]


def checked_prefixes(
    prefixes: Mapping[str, str], first: Sequence[str], second: Sequence[str]
) -> dict[str, str]:
    """The prefixes, each empty or with a dot at its end.

    Raises:
        PolicyError: no name of the first has an old one, or none of the second has a new one;
            names the nearest.
    """
    dotted = [
        [f"{prefix}." if prefix and not prefix.endswith(".") else prefix for prefix in side]
        for side in (prefixes, prefixes.values())
    ]
    for wanted, names in zip(dotted, (first, second), strict=True):
        for prefix in wanted:
            if not any(name.startswith(prefix) for name in names):
                near = hint(prefix[:-1], with_parents(names))
                raise PolicyError(f"No name begins with {prefix[:-1]!r}.{near}")
    return dict(zip(*dotted, strict=True))


def mapped(names: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """The name that each name of the first has in the second.

    Args:
        names: those of the first.
        prefixes: the old and the new ones. The longest old one decides; names without any stay.

    Raises:
        PolicyError: two names would become one.
    """
    longest = sorted(prefixes, key=len, reverse=True)
    taken: dict[str, str] = {}
    for name in names:
        old = next((old for old in longest if name.startswith(old)), None)
        other = name if old is None else prefixes[old] + name[len(old) :]
        if taken.setdefault(other, name) != name:
            raise PolicyError(f"{taken[other]} and {name} would both become {other}.")
    return {name: other for other, name in taken.items()}
