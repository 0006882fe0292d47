"""Pickles, read as data: what they would build is described, and nothing of it is built.

A pickle is a program that names functions and has them called. Here its opcodes are walked one by
one on a stack of our own. A name stays a `Global`, and a call of it an `Opaque`: no module is
imported, no name is looked up, no function is called. There is no second reader after this one
that could understand the file differently.
"""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, Final, NoReturn

from bnfreeze.checkpoints.limits import MAX_NAME_LENGTH, MAX_OPCODES, check_limit
from bnfreeze.checkpoints.opcodes import CODES, Opcodes
from bnfreeze.checkpoints.pickled import Content, Global, Opaque, Pairs, check_nesting, check_new
from bnfreeze.checkpoints.placeholders import naming_calls
from bnfreeze.checkpoints.source import Source
from bnfreeze.errors import CorruptCheckpointError, damaged

# What puts its own argument on the stack.
_VALUES: Final = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)

_NAMES: Final = {code: name for name, code in CODES.items()}


class PickleReader:
    """The stack on which opcodes are walked; `_steps` has what each of them does.

    A subclass says what `called`, `filled` and `referred` make of the objects of a library.

    Attributes:
        made: the objects that it would make by calls, without those that are interpreted.
    """

    def __init__(self) -> None:
        """Begin with an empty stack."""
        self.made: list[Opaque] = []
        # A dict, so that a claimed index is no claim on memory.
        self._memo: dict[int, object] = {}
        self._marks: list[int] = []
        self._stack: list[Any] = []

    def called(self, call: Opaque) -> object:
        """What to put in the place of a call."""
        return call

    def filled(self, made: Opaque) -> None:
        """Take the state that an object was given."""

    def referred(self, key: object) -> object:
        """What a persistent id stands for."""
        raise damaged("its pickle refers to storages out of place.")

    def read(self, source: Source, start: int = 0) -> Content:
        """Describe what the pickle at `start` of `source` would build; once only.

        What follows the pickle is not looked at.

        Raises:
            UnsafeCheckpointError: it goes beyond the limits.
            CorruptCheckpointError: it is no well-formed pickle, or changes what it made before.
        """
        opcodes = Opcodes(source, start)
        with naming_calls(self.made):
            try:
                self._walk(opcodes)
                (root,) = self._popped(1)
            # With python -W error a warning is an error, as about a bad escape in a string.
            except (ValueError, IndexError, OverflowError, Warning) as error:
                raise damaged(f"its pickle ends or breaks off ({error}).") from None
        check_nesting(root)
        return Content(root, tuple(self.made), end=opcodes.position)

    def _walk(self, opcodes: Opcodes) -> None:
        steps = self._steps()
        for count, (code, argument) in enumerate(opcodes, 1):
            if count > MAX_OPCODES:
                check_limit(count, MAX_OPCODES, "opcodes of a pickle and more")
            step = steps.get(code)
            if step is None:
                name = _NAMES.get(code, f"the byte {code:#04x}")
                raise CorruptCheckpointError(f"Its pickle uses {name}, which is not read here.")
            step(argument)

    def _steps(self) -> dict[int, Callable[[Any], object]]:
        push = self._stack.append
        steps: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(_VALUES, push),
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), self._get),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "MARK": lambda _: self._marks.append(len(self._stack)),
            "POP": self._pop,
            "POP_MARK": lambda _: self._marked(),
            "DUP": lambda _: push(self._stack[-1]),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_TUPLE": lambda _: push(()),
            **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda _: push([])),
            "EMPTY_DICT": lambda _: push(Pairs()),
            "TUPLE1": lambda _: push((*self._popped(1),)),
            "TUPLE2": lambda _: push((*self._popped(2),)),
            "TUPLE3": lambda _: push((*self._popped(3),)),
            "TUPLE": lambda _: push(tuple(self._marked())),
            **dict.fromkeys(("LIST", "FROZENSET"), lambda _: push(self._marked())),
            "DICT": lambda _: push(Pairs(_paired(self._marked()))),
            "APPEND": lambda _: self._extend(self._popped(1), "append"),
            "APPENDS": lambda _: self._extend(self._marked(), "extend"),
            "ADDITEMS": lambda _: self._extend(self._marked(), "update"),
            "SETITEM": lambda _: self._set_items(self._popped(2)),
            "SETITEMS": lambda _: self._set_items(self._marked()),
            "GLOBAL": lambda argument: push(self._name(*argument)),
            "STACK_GLOBAL": lambda _: push(self._name(*self._popped(2))),
            "REDUCE": lambda _: self._make(*self._popped(2)),
            "NEWOBJ": lambda _: self._make_new(*self._popped(2)),
            "NEWOBJ_EX": self._make_with_keywords,
            "INST": lambda names: self._make(self._name(*names), tuple(self._marked())),
            "OBJ": self._make_of_marked,
            "BUILD": self._build,
            "BINPERSID": lambda _: push(self.referred(*self._popped(1))),
        }
        return {CODES[name]: step for name, step in steps.items()}

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise damaged("its pickle refers to what it does not hold.")
        self._stack.append(self._memo[index])

    def _pop(self, _: object) -> None:
        # A mark counts as an item.
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._popped(1)

    def _extend(self, items: list[Any], method: str) -> None:
        holder = self._stack[-1]
        if type(holder) is list:
            holder.extend(items)
        elif isinstance(holder, Opaque):
            if holder.given:
                _refuse_change(holder)
            holder.items.extend(items)
        else:
            self._call_of(holder, method, tuple(items))

    def _set_items(self, items: list[Any]) -> None:
        holder = self._stack[-1]
        pairs = _paired(items)
        if isinstance(holder, (Pairs, Opaque)):
            if holder.given:
                _refuse_change(holder)
            holder.pairs.extend(pairs)
        else:
            self._call_of(holder, "__setitem__", tuple(items))

    def _call_of(self, holder: object, method: str, arguments: tuple[Any, ...]) -> None:
        """What would change something that was there before the pickle: a call of its method."""
        if not isinstance(holder, Global):
            _refuse_change(holder)
        self.made.append(Opaque(f"{holder.name}.{method}", arguments))

    def _make_new(self, kind: object, arguments: object) -> None:
        if isinstance(kind, Global) and type(arguments) is tuple:
            check_new(kind.name, arguments)
        self._make(kind, arguments)

    def _make(self, function: object, arguments: object) -> None:
        if type(arguments) is not tuple or not isinstance(function, (Global, Opaque)):
            raise damaged("its pickle calls what is no function.")
        if isinstance(function, Global):
            made = self.called(Opaque(function.name, arguments))
        else:
            name = function.name if function.at_run_time else f"{function.name}(…)"
            made = Opaque(name, (function, arguments), at_run_time=True)
        if isinstance(made, Opaque):
            self.made.append(made)
        self._stack.append(made)

    def _make_with_keywords(self, _: object) -> None:
        kind, arguments, keywords = self._popped(3)
        if type(arguments) is not tuple or not isinstance(keywords, Pairs):
            raise damaged("its pickle calls what is no function.")
        self._make_new(kind, (arguments, keywords) if keywords.pairs else arguments)

    def _make_of_marked(self, _: object) -> None:
        kind, *arguments = self._marked()
        self._make(kind, tuple(arguments))

    def _build(self, _: object) -> None:
        (state,) = self._popped(1)
        made = self._stack[-1]
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, Pairs):
                part.given = True
        if isinstance(made, Opaque):
            if made.given or made.state is not None:
                _refuse_change(made)
            made.state = state
            self.filled(made)
        elif isinstance(made, Global):
            self._call_of(made, "__setstate__", (state,))
        # An OrderedDict gets attributes alone. A tensor would get other values.
        elif type(made) is not Pairs:
            _refuse_change(made)

    def _name(self, module: object, name: object) -> Global:
        if type(module) is not str or type(name) is not str:
            raise damaged("its pickle names something that is no text.")
        # Few opcodes can put the same long texts together again and again.
        check_limit(len(module) + len(name), MAX_NAME_LENGTH, "characters of a name")
        # Python 2's names, which protocols 0 to 2 use to this day.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Global(f"{module}.{name}")

    def _popped(self, count: int) -> list[Any]:
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise damaged("its pickle takes more than it put.")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _marked(self) -> list[Any]:
        if not self._marks:
            raise damaged("its pickle closes what it did not open.")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items


def _refuse_change(holder: object) -> NoReturn:
    raise CorruptCheckpointError(
        "Ambiguous: its pickle changes something after it was made, which no library writes."
        if isinstance(holder, (Pairs, Opaque)) or hasattr(holder, "dtype")
        else "Damaged: its pickle puts items into what holds none."
    )


def _paired(items: list[Any]) -> list[tuple[object, object]]:
    if len(items) % 2:
        raise damaged("its pickle has a key without a value.")
    return list(zip(items[::2], items[1::2], strict=True))
