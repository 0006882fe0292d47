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

from torch import Tensor

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
# What may be None, or one of a few objects, where it is a tensor's: ``x.dtype``, ``x.grad_fn``.
_OF_TENSORS = frozenset(name for name in dir(Tensor) if not callable(getattr(Tensor, name)))


@dataclass(frozen=True)
class Code:
    """A function's code, and where its names from outside stand.

    Attributes:
        code: the code.
        names: the global names.
        cells: the variables of the functions around it.
        kind: the class of the module that its first argument is, if it is a method.
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
                yield Code(constant, self.names, self.cells, None, False)

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
        if name in LOOKUPS and str(argument).startswith("__"):
            raise Untraceable(f"it looks at {argument}")
        if name == "IS_OP":
            start = self._start(place - 1)
            step = self.steps[start]
            none = step.opname == "LOAD_CONST" and step.argval is None
            self._check_identity(start - 1, none or step.opname == "LOAD_GLOBAL")
        elif name.startswith("POP_JUMP") and name.endswith("NONE"):
            self._check_identity(place - 1, True)

    def _start(self, place: int) -> int:
        """Where what ends in lookups begins."""
        while self.steps[place].opname in LOOKUPS:
            place -= 1
        return place

    def _check_identity(self, place: int, fixed: bool) -> None:
        # A proxy is not None, though what it stands for may be; nor is it the same as another.
        source, owner = self.steps[place], self.steps[place - 1]
        if source.opname in LOOKUPS:
            own = owner.opname.startswith("LOAD_FAST") and (
                _names(owner.argval)[-1] in self.code.co_varnames[: self.kind is not None]
            )
            known = source.argval != "training" and (own or source.argval not in _OF_TENSORS)
        else:
            given = source.opname.startswith("LOAD_FAST")
            known = given and self._is_given(_names(source.argval)[-1])
        if not (known and fixed):
            raise Untraceable("it asks whether an intermediate value is None, or another one")

    def _is_given(self, name: str) -> bool:
        stored = any(
            step.opname.startswith("STORE_FAST") and name in _names(step.argval)
            for step in self.steps
        )
        return self.whole and name in inspect.getargs(self.code).args and not stored


def _names(argument: Any) -> tuple[Any, ...]:
    return argument if isinstance(argument, tuple) else (argument,)
