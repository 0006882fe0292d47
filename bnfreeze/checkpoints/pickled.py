"""What a pickle describes, as data: names, dicts as pairs, and objects that are not interpreted."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_NESTING, check_limit, is_size

__all__ = ["Global", "Opaque", "Pairs", "Stateful", "check_nesting", "children_of", "key_text"]


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

    def attributes(self) -> Mapping[str, Any]:
        """The attributes that its state would set, by name; nothing is copied."""
        # With slots, the state is a pair: the attributes, and those in slots.
        if type(self.state) is tuple and len(self.state) == 2:
            parts = [part.named() for part in self.state if isinstance(part, Pairs)]
            return ChainMap(*reversed(parts))
        return self.state.named() if isinstance(self.state, Pairs) else {}


class Pairs:
    """A dict as its pairs, in order. Keys are not hashed: that could take for ever.

    Attributes:
        given: whether an object has taken its state from it, so that a later change would be
            missed.
    """

    __slots__ = ("_named", "given", "pairs")

    def __init__(self, pairs: list[tuple[object, object]] | None = None) -> None:
        self.pairs = pairs or []
        self.given = False
        self._named: tuple[int, dict[str, object]] = (0, {})

    def named(self) -> dict[str, object]:
        """The pairs whose keys are strings; the last of a name counts, as in Python."""
        # Kept, because a few opcodes can give a large dict to many objects. Pairs are only added.
        if self._named[0] != len(self.pairs):
            named = {key: value for key, value in self.pairs if type(key) is str}
            self._named = (len(self.pairs), named)
        return self._named[1]


class Stateful:
    """What a builder gives for an object whose content comes later, as its state.

    Attributes:
        held: the objects in it, of which nothing is known.
    """

    held: tuple[Any, ...] | list[Any] = ()

    def set_state(self, state: object) -> None:
        """Take the content.

        Raises:
            CorruptCheckpointError: it is not of that kind, or the second.
        """
        raise NotImplementedError


_HOLDERS: Final = (list, tuple, Pairs, Opaque, Stateful)


def check_nesting(root: object) -> None:
    """Refuse what is nested too deep, level by level and each object once.

    Raises:
        UnsafeCheckpointError: deeper than the limit.
    """
    level: list[object] = [root]
    depth, seen = 0, {id(root)}
    while level:
        check_limit(depth, MAX_NESTING, "levels of nesting")
        below: list[object] = []
        for holder in level:
            for item in chain.from_iterable(children_of(holder)):
                if isinstance(item, _HOLDERS) and id(item) not in seen:
                    seen.add(id(item))
                    below.append(item)
        level, depth = below, depth + 1


def children_of(holder: object) -> Iterator[tuple[object, Any]]:
    """What an object holds directly, by key; the key is empty for the parts of an object itself."""
    if isinstance(holder, Opaque):
        # Each part as a whole: many objects may have the same.
        yield from (("", part) for part in (holder.arguments, holder.state, holder.items))
    if isinstance(holder, (Pairs, Opaque)):
        yield from holder.pairs
    elif isinstance(holder, dict):
        yield from holder.items()
    elif isinstance(holder, (list, tuple)):
        yield from enumerate(holder)
    elif isinstance(holder, Stateful):
        yield "", holder.held


def key_text(key: object) -> str:
    """A key of a dict, to be shown. Of what is neither a text nor a number, nothing is shown."""
    if isinstance(key, str):
        return key
    # A number of thousands of digits cannot be written.
    return str(key) if is_size(key) else "…"
