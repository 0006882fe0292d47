"""What a pickle describes, as data: names, dicts as pairs, and objects that are not interpreted."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_NESTING, check_limit, is_size
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.errors import CorruptCheckpointError

# The names of TorchScript's classes, whose code is in the file, begin with this.
SCRIPT: Final = "__torch__."


@dataclass(slots=True, eq=False)
class Global:
    """The name of something that the pickle would import."""

    name: str


@dataclass(slots=True, eq=False)
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
        array: of an array of NumPy, its numbers.
    """

    name: str
    arguments: tuple[Any, ...]
    at_run_time: bool = False
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[object, object]] = field(default_factory=list)
    given: bool = False
    array: StoredTensor | None = None

    def attributes(self) -> Mapping[str, Any]:
        """The attributes that its state would set, by name; nothing is copied."""
        # With slots, the state is a pair: the attributes, and those in slots.
        if type(self.state) is tuple and len(self.state) == 2:
            parts = [part.named() for part in self.state if isinstance(part, Pairs)]
            return ChainMap(*reversed(parts))
        return self.state.named() if isinstance(self.state, Pairs) else {}


@dataclass(slots=True, eq=False)
class Pairs:
    """A dict as its pairs, in order. Keys are not hashed: that could take for ever.

    Attributes:
        given: whether an object has taken its state from it, so that a later change would be
            missed.
    """

    pairs: list[tuple[object, object]] = field(default_factory=list)
    given: bool = False
    _named: tuple[int, dict[str, object]] = field(default_factory=lambda: (0, {}))

    def named(self) -> dict[str, object]:
        """The pairs whose keys are strings; the last of a name counts, as in Python."""
        # Kept, because a few opcodes can give a large dict to many objects. Pairs are only added.
        if self._named[0] != len(self.pairs):
            named = {key: value for key, value in self.pairs if type(key) is str}
            self._named = (len(self.pairs), named)
        return self._named[1]

    # Of an object, where it is the object's `__dict__`.
    attributes = named


@dataclass(frozen=True)
class Content:
    """What was saved in a file, or in a pickle in it.

    Attributes:
        root: dicts, lists, tuples, strings, numbers, `Pairs`, `Global`, `Opaque`, parts of the
            file for long byte strings, and a `StoredTensor` for each tensor.
        made: the objects that loading it would make by calls, without those that are interpreted.
        remarks: sentences about the file that a person should read.
        end: of a pickle, the position after it.
    """

    root: Any
    made: tuple[Opaque, ...] = ()
    remarks: tuple[str, ...] = ()
    end: int = 0


# Their `__new__` makes them empty, whatever it is given; what they are given is for `__init__`.
_MADE_EMPTY: Final = frozenset(
    {f"collections.{name}" for name in ("OrderedDict", "Counter", "defaultdict", "deque")}
    | {f"builtins.{name}" for name in ("list", "set", "dict", "bytearray")}
)


def check_new(name: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a container that is made by its `__new__` out of others.

    Raises:
        CorruptCheckpointError: its content would be read, and not be there after loading.
    """
    if arguments and name in _MADE_EMPTY:
        raise CorruptCheckpointError(
            f"Ambiguous: its pickle makes a {name} of something and leaves it empty."
        )


def tensor_in(value: object) -> StoredTensor | None:
    """The value, if it is a tensor or an array of numbers."""
    if isinstance(value, Opaque):
        return value.array
    return value if isinstance(value, StoredTensor) else None


# Of a key that is shown: what is longer is shown by its end.
_KEY_LENGTH: Final = 400
# What may have tensors in it.
HOLDERS: Final = (dict, list, tuple, Pairs, Opaque)


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
                if isinstance(item, HOLDERS) and id(item) not in seen:
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


def key_text(key: object) -> str:
    """A key of a dict, to be shown. Of what is neither a text nor a number, nothing is shown."""
    if isinstance(key, str):
        return key
    # A number of thousands of digits cannot be written.
    return str(key) if is_size(key) else "…"


def joined_key(key: str, name: str) -> str:
    """The dotted key of what is under a name in another key. Long ones are cut."""
    return f"{key}.{name:.200}"[-_KEY_LENGTH:] if key and name else key or name[:200]
