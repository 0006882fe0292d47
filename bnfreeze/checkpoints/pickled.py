"""What a pickle describes, as data: names, dicts as pairs, and objects that are not interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_NESTING, check_limit

__all__ = ["Global", "Opaque", "Pairs", "check_nesting", "parts_of"]


class Global:
    """The name of something that the pickle would import."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Opaque:
    """An object that the pickle would make by a call: a placeholder with a name.

    Attributes:
        name: what would be called, such as ``"argparse.Namespace"``.
        arguments: with what.
        state: what its attributes would be set from; None where there is nothing.
        items: what would be appended to it.
        pairs: what would be set in it by key.
        at_run_time: whether what is called is itself the result of a call, so that its name says
            nothing about it.
        given: whether something else was made from it, so that a later change would be missed.
    """

    __slots__ = ("arguments", "at_run_time", "given", "items", "name", "pairs", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...], at_run_time: bool = False) -> None:
        self.name = name
        self.arguments = arguments
        self.at_run_time = at_run_time
        self.state: Any = None
        self.items: list[Any] = []
        self.pairs: list[tuple[object, object]] = []
        self.given = False

    def attributes(self) -> dict[str, Any]:
        """The attributes that its state would set, by name."""
        # With slots, the state is a pair: the attributes, and those in slots.
        parts = self.state if type(self.state) is tuple else (self.state,)
        found: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, Pairs):
                found |= part.named()
        return found


class Pairs:
    """A dict as its pairs, in order. Keys are not hashed: that could take for ever.

    Attributes:
        given: whether an object has taken its state from it, so that a later change would be
            missed.
    """

    __slots__ = ("given", "pairs")

    def __init__(self, pairs: list[tuple[object, object]] | None = None) -> None:
        self.pairs = pairs or []
        self.given = False

    def named(self) -> dict[str, object]:
        """The pairs whose keys are strings; the last of a name counts, as in Python."""
        return {key: value for key, value in self.pairs if type(key) is str}


def check_nesting(root: object) -> None:
    """Refuse what is nested too deep, level by level and each object once.

    Raises:
        UnsafeCheckpointError: deeper than the limit.
    """
    level, depth, seen = [root], 0, {id(root)}
    while level:
        check_limit(depth, MAX_NESTING, "levels of nesting")
        below = []
        for holder in level:
            for item in parts_of(holder):
                if type(item) in _HOLDERS and id(item) not in seen:
                    seen.add(id(item))
                    below.append(item)
        level, depth = below, depth + 1


_HOLDERS: Final = frozenset({list, tuple, Pairs, Opaque})


def parts_of(holder: Any) -> Iterator[Any]:
    """Everything that an object holds directly, dict keys included."""
    if isinstance(holder, (list, tuple)):
        yield from holder
    elif isinstance(holder, Pairs):
        for pair in holder.pairs:
            yield from pair
    elif isinstance(holder, Opaque):
        yield from holder.arguments
        yield holder.state
        yield from holder.items
        for pair in holder.pairs:
            yield from pair
