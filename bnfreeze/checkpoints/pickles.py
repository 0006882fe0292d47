"""Pickles, read as data: what they would build is described, and nothing of it is built.

A pickle is a program that names functions and has them called. Here its opcodes are walked one by
one on a stack of our own. A name stays a `Global`, and a call of it an `Opaque`: no module is
imported, no name is looked up, no function is called. There is no second reader after this one
that could understand the file differently.
"""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from bnfreeze.checkpoints.code_names import would_call
from bnfreeze.checkpoints.limits import MAX_NAME_LENGTH, MAX_OPCODES, check_limit
from bnfreeze.checkpoints.opcodes import CODES, Opcodes
from bnfreeze.checkpoints.pickled import Global, Opaque, Pairs, Stateful, check_nesting
from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import CheckpointError, CorruptCheckpointError

__all__ = ["Described", "check_new", "read_pickle"]


@dataclass(frozen=True)
class Described:
    """What a pickle would build.

    Attributes:
        root: `Pairs`, lists, tuples, strings, numbers, `Global`, `Opaque`, parts of the file for
            long byte strings, and what the builders gave.
        end: the position after it.
        made: the objects that it would make by calls, without those that builders interpreted.
    """

    root: Any
    end: int
    made: tuple[Opaque, ...]


# What puts its own argument on the stack.
_VALUES: Final = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)

_NAMES: Final = {code: name for name, code in CODES.items()}


def read_pickle(
    source: Source,
    *,
    start: int = 0,
    call: Callable[[Opaque], object] = lambda call: call,
    persistent: Callable[[object], object] | None = None,
) -> Described:
    """Describe what the pickle at `start` of `source` would build.

    Args:
        source: the bytes; what follows the pickle is not looked at.
        start: where it begins.
        call: is given each call, and gives back what to put in its place.
        persistent: is given each persistent id, and gives back what it stands for.

    Raises:
        UnsafeCheckpointError: it goes beyond the limits.
        CorruptCheckpointError: it is no well-formed pickle, or changes what it made before.
    """
    machine = _Machine(call, persistent)
    opcodes = Opcodes(source, start)
    steps = machine.steps
    count = 0
    try:
        for code, argument in opcodes:
            count += 1
            if count > MAX_OPCODES:
                check_limit(count, MAX_OPCODES, "opcodes of a pickle and more")
            step = steps.get(code)
            if step is None:
                name = _NAMES.get(code, f"the byte {code:#04x}")
                raise CorruptCheckpointError(f"Its pickle uses {name}, which is not read here.")
            step(argument)
    # With python -W error a warning is an error, such as one about a bad escape in a string.
    except (ValueError, IndexError, OverflowError, Warning) as error:
        raise CorruptCheckpointError(
            f"Damaged: its pickle ends or breaks off ({error}).{would_call(machine.made)}"
        ) from None
    except CheckpointError as error:
        raise type(error)(f"{error}{would_call(machine.made)}") from None
    finally:
        # The steps refer to the machine and it to them: let go of both at once.
        machine.steps = {}
    check_nesting(machine.root)
    return Described(machine.root, opcodes.position, tuple(machine.made))


class _Machine:
    """The stack on which opcodes are walked; `steps` has what each of them does."""

    def __init__(
        self,
        call: Callable[[Opaque], object],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.call = call
        self.persistent = persistent
        self.made: list[Opaque] = []
        # A dict, so that a claimed index is no claim on memory.
        self.memo: dict[int, object] = {}
        self.marks: list[int] = []
        self.root: object = None
        self.stack: list[Any] = []
        push = self.stack.append
        steps: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(_VALUES, push),
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), self.put),
            **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), self.get),
            "MEMOIZE": lambda _: self.put(len(self.memo)),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "POP": self.pop,
            "POP_MARK": lambda _: self.marked(),
            "DUP": lambda _: push(self.stack[-1]),
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
            "APPEND": lambda _: self.extend(self.popped(1), "append"),
            "APPENDS": lambda _: self.extend(self.marked(), "extend"),
            "ADDITEMS": lambda _: self.extend(self.marked(), "update"),
            "SETITEM": lambda _: self.set_items(self.popped(2)),
            "SETITEMS": lambda _: self.set_items(self.marked()),
            "GLOBAL": lambda argument: push(self.name(*argument)),
            "STACK_GLOBAL": lambda _: push(self.name(*self.popped(2))),
            "REDUCE": lambda _: self.make(*self.popped(2)),
            "NEWOBJ": lambda _: self.make_new(*self.popped(2)),
            "NEWOBJ_EX": self.make_with_keywords,
            "INST": self.make_by_name,
            "OBJ": self.make_of_marked,
            "BUILD": self.build,
            "BINPERSID": self.refer,
            "STOP": self.stop,
        }
        self.steps = {CODES[name]: step for name, step in steps.items()}

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CorruptCheckpointError("Damaged: its pickle refers to what it does not hold.")
        self.stack.append(self.memo[index])

    def pop(self, _: object) -> None:
        # A mark counts as an item.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.popped(1)

    def extend(self, items: list[Any], method: str) -> None:
        holder = self.stack[-1]
        if type(holder) is list:
            holder.extend(items)
        elif isinstance(holder, Opaque):
            _check_changeable(holder)
            holder.items.extend(items)
        else:
            self.call_of(holder, method, tuple(items))

    def set_items(self, items: list[Any]) -> None:
        holder = self.stack[-1]
        pairs = _paired(items)
        if isinstance(holder, (Pairs, Opaque)):
            _check_changeable(holder)
            holder.pairs.extend(pairs)
        else:
            self.call_of(holder, "__setitem__", tuple(items))

    def call_of(self, holder: object, method: str, arguments: tuple[Any, ...]) -> None:
        """What would change something that was there before the pickle: a call of its method."""
        if not isinstance(holder, Global):
            _refuse_change(holder)
        self.made.append(Opaque(f"{holder.name}.{method}", arguments))

    def make_new(self, kind: object, arguments: object) -> None:
        if isinstance(kind, Global) and type(arguments) is tuple:
            check_new(kind.name, arguments)
        self.make(kind, arguments)

    def make(self, function: object, arguments: object) -> None:
        if type(arguments) is not tuple:
            raise CorruptCheckpointError("Damaged: its pickle calls what is no function.")
        if isinstance(function, Global):
            described = Opaque(function.name, arguments)
            made = self.call(described)
        elif isinstance(function, Opaque):
            name = function.name if function.at_run_time else f"{function.name}(…)"
            made = described = Opaque(name, (function, arguments), at_run_time=True)
        else:
            raise CorruptCheckpointError("Damaged: its pickle calls what is no function.")
        if isinstance(made, Opaque):
            self.made.append(made)
        self.stack.append(made)

    def make_with_keywords(self, _: object) -> None:
        kind, arguments, keywords = self.popped(3)
        if type(arguments) is not tuple or not isinstance(keywords, Pairs):
            raise CorruptCheckpointError("Damaged: its pickle calls what is no function.")
        self.make_new(kind, (arguments, keywords) if keywords.pairs else arguments)

    def make_by_name(self, names: tuple[str, str]) -> None:
        self.make(self.name(*names), tuple(self.marked()))

    def make_of_marked(self, _: object) -> None:
        kind, *arguments = self.marked()
        self.make(kind, tuple(arguments))

    def build(self, _: object) -> None:
        (state,) = self.popped(1)
        made = self.stack[-1]
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, Pairs):
                part.given = True
        if isinstance(made, Stateful):
            made.set_state(state)
        elif isinstance(made, Opaque):
            _check_changeable(made)
            if made.state is not None:
                _refuse_change(made)
            made.state = state
        elif isinstance(made, Global):
            self.call_of(made, "__setstate__", (state,))
        # An OrderedDict gets attributes alone. A tensor would get other values.
        elif type(made) is not Pairs:
            _refuse_change(made)

    def refer(self, _: object) -> None:
        (key,) = self.popped(1)
        if self.persistent is None:
            raise CorruptCheckpointError("Damaged: its pickle refers to storages out of place.")
        self.stack.append(self.persistent(key))

    def stop(self, _: object) -> None:
        (self.root,) = self.popped(1)

    def name(self, module: object, name: object) -> Global:
        if type(module) is not str or type(name) is not str:
            raise CorruptCheckpointError("Damaged: its pickle names something that is no text.")
        # Few opcodes can put the same long texts together again and again.
        check_limit(len(module) + len(name), MAX_NAME_LENGTH, "characters of a name")
        # Python 2's names, which protocols 0 to 2 use to this day.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Global(f"{module}.{name}")

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


def _check_changeable(holder: Pairs | Opaque) -> None:
    if holder.given:
        _refuse_change(holder)


def _refuse_change(holder: object) -> NoReturn:
    raise CorruptCheckpointError(
        "Ambiguous: its pickle changes something after it was made, which no library writes."
        if isinstance(holder, (Pairs, Opaque)) or hasattr(holder, "dtype")
        else "Damaged: its pickle puts items into what holds none."
    )


def _paired(items: list[Any]) -> list[tuple[object, object]]:
    if len(items) % 2:
        raise CorruptCheckpointError("Damaged: its pickle has a key without a value.")
    return list(zip(items[::2], items[1::2], strict=True))
