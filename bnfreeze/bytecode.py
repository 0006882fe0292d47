"""What a function's bytecode does: whether it is no more than to compute with local values."""

from __future__ import annotations

import dis
import functools
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["LOOKUPS", "Code", "Untraceable"]


class Untraceable(Exception):  # noqa: N818 - an answer, not a failure
    """Why no graph can stand in for a block's forward: a sentence's end."""


# By the beginnings of their names, which stay the same from one version of Python to the next.
_HARMLESS = re.compile(
    r"BINARY_|BUILD_|CACHE|CALL|COMPARE_OP|CONTAINS_OP|CONVERT_VALUE|COPY|DELETE_FAST|DICT_|DUP_|"
    r"END_FOR|EXTENDED_ARG|FORMAT_|FOR_ITER|GET_ITER|GET_LEN|INPLACE_|IS_OP|JUMP_|KW_NAMES|LIST_|"
    r"LOAD_(ASSERTION|ATTR|CLASSDEREF|CLOSURE|COMMON|CONST|DEREF|FAST|GLOBAL|METHOD|SMALL|SUPER)|"
    r"MAKE_|MAP_ADD|NOP|NOT_TAKEN|POP_(ITER|JUMP|TOP)|PRECALL|PUSH_NULL|RAISE_|RERAISE|RESUME|"
    r"RETURN_(CONST|VALUE)|ROT_|SET_(ADD|FUNCTION|UPDATE)|STORE_(DEREF|FAST|SLICE|SUBSCR)|SWAP|"
    r"TO_BOOL|UNARY_|UNPACK_"
)
_OF_A_GENERATOR = re.compile(r"GEN_START|PUSH_EXC_INFO|RETURN_GENERATOR|YIELD_VALUE")
_DOES = {
    "STORE_ATTR": "sets the attribute {}",
    "DELETE_ATTR": "deletes the attribute {}",
    "STORE_GLOBAL": "sets the global name {}",
    "IMPORT_NAME": "imports {}",
    **dict.fromkeys(("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"), "enters a context"),
    **dict.fromkeys(("SETUP_FINALLY", "PUSH_EXC_INFO"), "catches exceptions"),
    **dict.fromkeys(("GEN_START", "RETURN_GENERATOR"), "is a generator"),
}
LOOKUPS = ("LOAD_ATTR", "LOAD_METHOD")
# They lead to tensors without a trace.
_HIDDEN = frozenset(
    {"parameters", "named_parameters", "_parameters", "buffers", "named_buffers", "_buffers"}
    | {"state_dict"}
)


@dataclass(frozen=True)
class Code:
    """A function's code, and where its names from outside stand.

    Attributes:
        code: the code.
        names: the global names.
        cells: the variables of the functions around it.
        kind: the class of the module that it is a method of.
        whole: whether its arguments are those of the whole trace, and so tensors.
    """

    code: types.CodeType
    names: dict[str, Any]
    cells: dict[str, types.CellType]
    kind: type | None
    whole: bool

    @functools.cached_property
    def steps(self) -> list[dis.Instruction]:
        """Its instructions, without those that do nothing."""
        skipped = ("EXTENDED_ARG", "CACHE", "NOT_TAKEN", "NOP")
        return [s for s in dis.get_instructions(self.code) if s.opname not in skipped]

    def inner(self) -> Iterator[Code]:
        """Lambdas and comprehensions."""
        for constant in self.code.co_consts:
            if isinstance(constant, types.CodeType):
                yield Code(constant, self.names, self.cells, self.kind, False)

    def check(self, place: int) -> None:
        """Refuse what does more than compute."""
        step = self.steps[place]
        name, argument = step.opname, step.argval
        if not _HARMLESS.match(name):
            if self.code.co_name == "<genexpr>" and _OF_A_GENERATOR.match(name):
                return
            does = _DOES.get(name, f"uses {name}, of which nothing is known").format(argument)
            raise Untraceable(f"it {does}")
        if self.code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise Untraceable("it is a coroutine")
        if name == "STORE_DEREF" and argument in self.cells:
            raise Untraceable(f"it sets {argument}, a variable of the function around it")
        if name in LOOKUPS and (argument in _HIDDEN or str(argument).startswith("__")):
            raise Untraceable(f"it looks at {argument}")
        if name == "IS_OP":
            if not self._is_from_outside(place - 1):
                self._check_none_test(place - 2, self.steps[place - 1].argval)
        elif name.startswith("POP_JUMP") and name.endswith("NONE"):
            self._check_none_test(place - 1)

    def _is_from_outside(self, place: int) -> bool:
        while self.steps[place].opname in LOOKUPS:
            place -= 1
        return self.steps[place].opname == "LOAD_GLOBAL"

    def _check_none_test(self, place: int, other: Any = None) -> None:
        # A proxy is not None, though what it stands for may be; nor is it the same as another.
        source = self.steps[place]
        given = source.opname.startswith("LOAD_FAST") and self._is_given(_names(source.argval)[-1])
        if other is not None or not (given or source.opname in LOOKUPS):
            raise Untraceable("it asks whether an intermediate value is None, or another one")

    def _is_given(self, name: str) -> bool:
        stored = any(
            step.opname.startswith("STORE_FAST") and name in _names(step.argval)
            for step in self.steps
        )
        return self.whole and name in inspect.getargs(self.code).args and not stored


def _names(argument: Any) -> tuple[Any, ...]:
    return argument if isinstance(argument, tuple) else (argument,)
