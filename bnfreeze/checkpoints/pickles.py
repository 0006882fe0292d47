"""Pickles, read as data: what they would build is described, and nothing of it is built.

A pickle is a program that names functions and has them called. Here its opcodes are walked one by
one (`pickletools` takes them apart) on a stack of our own. A name stays a `Global`, a call of it
a `Call`: no module is imported, no name is looked up, no function is called. There is no second
reader after this one that could understand the file differently.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, Final

from bnfreeze.checkpoints.limits import (
    MAX_NAME_LENGTH,
    MAX_NESTING,
    MAX_OPCODES,
    MAX_PICKLE_BYTES,
    check_limit,
)
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["Call", "Global", "Pairs", "Unneeded", "check_nesting", "read_pickle"]


class Global:
    """The name of something that the pickle would import."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Call:
    """A call that the pickle would make: of what, and with what."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: object = None


class Pairs:
    """A dict as its pairs, in order: keys are not hashed, which could run for ever.

    Attributes:
        given: whether an object has taken its state from it, and so knows no later pairs.
    """

    __slots__ = ("given", "pairs")

    def __init__(self, pairs: list[tuple[object, object]] | None = None) -> None:
        self.pairs = pairs or []
        self.given = False

    def named(self) -> dict[str, object]:
        """The pairs whose keys are strings; the last of a name counts, as in Python."""
        return {key: value for key, value in self.pairs if type(key) is str}


class Unneeded(UnsafeCheckpointError):
    """A refusal for the names that a pickle needs.

    Attributes:
        names: all of them, in the order of the file.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> Unneeded:
        """The refusal that names them."""
        names = tuple(names)
        shown = ", ".join(f"`{name:.100}`" for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        refusal = cls(f"Refused: needs {shown}{more}.")
        refusal.names = names
        return refusal


# What puts its own argument on the stack.
_VALUES: Final = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)

# Refused names that are told; more of them tell nothing more.
_ENOUGH: Final = 100

_CHANGED: Final = (
    "Ambiguous: its pickle changes something after it was made, which torch never writes."
)

# Python 2 wrote its own names.
_RENAMED: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def read_pickle(
    data: bytes,
    allowed: Container[str],
    *,
    start: int = 0,
    call: Callable[[Call], object] = lambda call: call,
    persistent: Callable[[object], object] | None = None,
) -> tuple[Any, int]:
    """Describe what the pickle at `start` of `data` would build.

    Args:
        data: the bytes; what follows the pickle is not looked at.
        allowed: the names that may occur.
        start: where it begins.
        call: is given each call, and gives back what to put in its place.
        persistent: is given each persistent id, and gives back what it stands for.

    Returns:
        what it would build (`Pairs`, lists, tuples, strings, numbers, `Global`, `Call`, and what
        `call` and `persistent` gave), and the position after it.

    Raises:
        UnsafeCheckpointError: it needs names that are not allowed, or goes beyond the limits.
        CorruptCheckpointError: it is no well-formed pickle, or uses opcodes that torch never writes.
    """
    machine = _Machine(allowed, call, persistent)
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):
            if count > MAX_OPCODES:
                check_limit(count, MAX_OPCODES, "opcodes of a pickle and more")
            step = machine.steps.get(opcode.name)
            if step is None:
                raise CorruptCheckpointError(
                    f"Its pickle uses {opcode.name}, which torch never writes."
                )
            step(argument)
    # A warning is an error where Python is told so: about a bad escape in a string, say.
    except (ValueError, IndexError, OverflowError, Warning) as error:
        if machine.refused:
            raise Unneeded.of(machine.refused) from None
        if len(data) >= MAX_PICKLE_BYTES:
            check_limit(len(data) + 1, MAX_PICKLE_BYTES, "bytes of a pickle and more")
        raise CorruptCheckpointError(f"Damaged: its pickle ends or breaks off ({error}).") from None
    except CorruptCheckpointError:
        # What a pickle would import tells more than how it ends.
        if machine.refused:
            raise Unneeded.of(machine.refused) from None
        raise
    finally:
        # The steps refer to the machine and it to them: let go of both at once.
        machine.steps.clear()
    if machine.refused:
        raise Unneeded.of(machine.refused)
    return machine.root, stream.tell()


class _Machine:
    """The stack on which opcodes are walked; `steps` has what each of them does."""

    def __init__(
        self,
        allowed: Container[str],
        call: Callable[[Call], object],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.allowed = allowed
        self.call = call
        self.persistent = persistent
        self.refused: dict[str, None] = {}
        # A dict, so that a claimed index is no claim on memory.
        self.memo: dict[int, object] = {}
        self.marks: list[int] = []
        self.root: object = None
        self.stack: list[Any] = []
        push = self.stack.append
        self.steps: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(_VALUES, push),
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), self.put),
            **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), self.get),
            "MEMOIZE": lambda _: self.put(len(self.memo)),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_SET": lambda _: push([]),
            "EMPTY_DICT": lambda _: push(Pairs()),
            "TUPLE1": lambda _: push((*self.popped(1),)),
            "TUPLE2": lambda _: push((*self.popped(2),)),
            "TUPLE3": lambda _: push((*self.popped(3),)),
            "TUPLE": lambda _: push(tuple(self.marked())),
            "LIST": lambda _: push(self.marked()),
            "FROZENSET": lambda _: push(self.marked()),
            "DICT": lambda _: push(Pairs(_paired(self.marked()))),
            "APPEND": lambda _: self.extend(self.popped(1)),
            "APPENDS": lambda _: self.extend(self.marked()),
            "ADDITEMS": lambda _: self.extend(self.marked()),
            "SETITEM": lambda _: self.set_items(self.popped(2)),
            "SETITEMS": lambda _: self.set_items(self.marked()),
            "GLOBAL": lambda argument: self.name(*argument.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self.name(*self.popped(2)),
            "REDUCE": self.reduce,
            "NEWOBJ": self.reduce,
            "BUILD": self.build,
            "BINPERSID": self.refer,
            "STOP": self.stop,
        }

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CorruptCheckpointError("Damaged: its pickle refers to what it does not hold.")
        self.stack.append(self.memo[index])

    def extend(self, items: list[Any]) -> None:
        holder = self.stack[-1]
        if type(holder) is not list:
            raise CorruptCheckpointError("Damaged: its pickle puts items into what holds none.")
        holder.extend(items)

    def set_items(self, items: list[Any]) -> None:
        holder = self.stack[-1]
        if type(holder) is not Pairs:
            raise CorruptCheckpointError("Damaged: its pickle puts items into what holds none.")
        if holder.given:
            raise CorruptCheckpointError(_CHANGED)
        holder.pairs.extend(_paired(items))

    def reduce(self, _: object) -> None:
        function, arguments = self.popped(2)
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise CorruptCheckpointError("Damaged: its pickle calls what is no function.")
        made = Call(function.name, arguments)
        # What leads to a refused name is not interpreted any further.
        self.stack.append(made if self.refused else self.call(made))

    def build(self, _: object) -> None:
        (state,) = self.popped(1)
        made = self.stack[-1]
        if isinstance(state, Pairs):
            state.given = True
        if isinstance(made, Call) and made.state is None:
            made.state = state
        # A tensor would get other values, and an object would mix both states; to an OrderedDict
        # come attributes alone.
        elif type(made) is not Pairs:
            raise CorruptCheckpointError(_CHANGED)

    def refer(self, _: object) -> None:
        (key,) = self.popped(1)
        if self.persistent is None:
            raise CorruptCheckpointError("Damaged: its pickle refers to storages out of place.")
        self.stack.append(None if self.refused else self.persistent(key))

    def stop(self, _: object) -> None:
        (self.root,) = self.popped(1)

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise CorruptCheckpointError("Damaged: its pickle names something that is no text.")
        # Few opcodes can put the same long texts together again and again.
        check_limit(len(module) + len(name), MAX_NAME_LENGTH, "characters of a name")
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full not in self.allowed:
            self.refused[full] = None
            if len(self.refused) > _ENOUGH:
                raise Unneeded.of(self.refused)
        self.stack.append(Global(full))

    def popped(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise CorruptCheckpointError("Damaged: its pickle takes more than it put.")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def marked(self) -> list[Any]:
        if not self.marks:
            raise CorruptCheckpointError("Damaged: its pickle closes what it did not open.")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items


def _paired(items: list[Any]) -> list[tuple[object, object]]:
    if len(items) % 2:
        raise CorruptCheckpointError("Damaged: its pickle has a key without a value.")
    return list(zip(items[::2], items[1::2], strict=True))


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
            for item in _items(holder):
                if type(item) in _HOLDERS and id(item) not in seen:
                    seen.add(id(item))
                    below.append(item)
        level, depth = below, depth + 1


_HOLDERS: Final = frozenset({list, tuple, Pairs, Call})


def _items(holder: Any) -> Iterator[object]:
    if isinstance(holder, (list, tuple)):
        yield from holder
    elif isinstance(holder, Pairs):
        for pair in holder.pairs:
            yield from pair
    elif isinstance(holder, Call):
        yield from holder.arguments
        yield holder.state
