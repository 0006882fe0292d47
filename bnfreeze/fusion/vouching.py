"""Whether a function does nothing that a trace does not show: its code is read before it runs.

A trace shows what a forward did with the values that it was given, and not all that it may do. So
each function that a forward is made of is vouched for first. Its bytecode must consist of what
computes with local values; each name that it takes from outside must stand for a module, a
constant, a harmless builtin, a torch function that takes part in ``__torch_function__`` (and so is
seen by the trace) or a function that can be vouched for in turn. What these names stand for is
noted, so that it can be watched (`Name`). Everything else is refused: an exception that is caught,
a context, a global list, a random generator, the grad mode, C code that knows no proxies.

The functions of `KNOWN_PACKAGES` are taken to be harmless where a module of theirs calls them.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.overrides import get_testing_overrides

from bnfreeze.fusion.bytecode import LOOKUPS, Code, Untraceable
from bnfreeze.fusion.watched import ABSENT, Name

__all__ = ["KNOWN_PACKAGES", "Voucher", "is_known"]

KNOWN_PACKAGES = frozenset({"torch", "torchvision", "timm", "transformers", "bnfreeze"})

# Of these very classes: a subclass may do anything.
_CONSTANTS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(...)}
    | {torch.dtype, torch.device, torch.memory_format, torch.Size}
)
_TYPES = frozenset(
    {int, float, complex, bool, str, bytes, tuple, list, dict, set, frozenset, slice, range}
    | {enumerate, zip, reversed, super, OrderedDict, Tensor, nn.Parameter, torch.Size}
)
_BUILTINS = frozenset({abs, all, any, getattr, hasattr, isinstance, len, max, min, round, sum})
# What takes part in __torch_function__, though it is not listed.
_UNLISTED = frozenset({F.hardswish, F.hardsigmoid, F.relu_, torch.relu_})
# A proxy is neither.
_IDENTITY = frozenset({"is_", "is_not", "is_none", "is_not_none"})


@functools.cache
def _torch_functions() -> frozenset[Any]:
    return _UNLISTED | frozenset(get_testing_overrides())


def _is_mere_enum(value: Any) -> bool:
    """Whether it is a member of an enumeration without methods of its own."""
    own = (m for base in type(value).__mro__ for m in vars(base).values() if not is_known(base))
    functions = (m for m in own if isinstance(m, types.FunctionType | property))
    return isinstance(value, enum.Enum) and all(
        getattr(f, "__module__", None) == "enum" for f in functions
    )


def is_known(owner: type | types.FunctionType) -> bool:
    """Whether a class or function stands in one of the known libraries."""
    # A function's __module__ is what its decorator says.
    if isinstance(owner, types.FunctionType):
        where = owner.__globals__.get("__name__")
    else:
        where = owner.__module__
    return str(where).partition(".")[0] in KNOWN_PACKAGES


class Voucher:
    """Vouches for functions, and notes which names they rest on.

    Every method raises `Untraceable` for what it cannot vouch for.
    """

    def __init__(self) -> None:
        self.names: dict[tuple[int, str], Name] = {}
        self._seen: set[tuple[types.FunctionType, type | None, bool, bool]] = set()

    def member(self, value: Any, kind: type[nn.Module]) -> None:
        """Vouch for an attribute of a class; of a method or property, for its function.

        Args:
            value: what stands in the class's dict, or in a base's.
            kind: the class of the module.
        """
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, staticmethod):
            return self.value(value.__func__, "a static method", trusted=True)
        elif isinstance(value, classmethod):
            value = value.__func__
            if not is_known(value):
                raise Untraceable("it calls a method of its class, of which no trace sees anything")
        if isinstance(value, types.FunctionType):
            self.function(value, kind, trusted=True)
        else:
            self.value(value, "an attribute of its class")

    def function(
        self,
        function: types.FunctionType,
        kind: type[nn.Module] | None = None,
        *,
        trusted: bool = False,
        whole: bool = False,
    ) -> None:
        """Vouch for a function.

        Args:
            function: any.
            kind: the class of the module that it is a method of.
            trusted: whether those of the known libraries are taken to be harmless.
            whole: whether its arguments are those of the whole trace, and so tensors.
        """
        if (function, kind, trusted, whole) in self._seen:
            return
        self._seen.add((function, kind, trusted, whole))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if trusted and is_known(function):
            # A decorator's, around a function that is not.
            for cell in cells.values():
                inner = Name.of(cell, "cell_contents").value
                if isinstance(inner, types.FunctionType):
                    self._enters_nothing(function)
                    self.function(inner, kind, trusted=True)
            return
        # Tools that reload code put it into the functions that are there.
        for name in ("__code__", "__defaults__"):
            self.note(function, name)
        for value in vars(function).values():
            self.value(value, "an attribute of a function")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.value(value, "a default")
        self._code(Code(function.__code__, function.__globals__, cells, kind, whole))

    def value(self, value: Any, called: str, *, trusted: bool = False) -> None:
        """Vouch for something that a function takes from outside."""
        if type(value) is tuple:
            for each in value:
                self.value(each, called, trusted=trusted)
        elif isinstance(value, types.FunctionType):
            if value not in _torch_functions():
                self.function(value, trusted=trusted)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType):
            free = getattr(value, "__module__", None) in ("math", "_operator")
            free = free and value.__name__ not in _IDENTITY
            if not free and value not in _torch_functions() and value not in _BUILTINS:
                raise Untraceable(f"it uses {called}, which no trace sees")
        elif isinstance(value, type):
            known = is_known(value) or value.__module__ == "builtins"
            if value not in _TYPES and not (known and issubclass(value, nn.Module | Exception)):
                raise Untraceable(f"it uses {called}, a class that may do anything")
        elif type(value) not in _CONSTANTS and not _is_mere_enum(value):
            raise Untraceable(f"it uses {called}, of the type {type(value).__name__}")

    def note(self, owner: Any, name: str) -> Any:
        """Note what a name of a `Name.owner` stands for, and give it back."""
        return self.names.setdefault((id(owner), name), Name.of(owner, name)).value

    def _enters_nothing(self, decorator: types.FunctionType) -> None:
        # The trace does not show it if the mode is the one that is on anyway.
        names = {step.opname for step in dis.get_instructions(decorator)}
        if names & {"SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"}:
            raise Untraceable("its decorator enters a context")

    def _code(self, code: Code) -> None:
        for place, step in enumerate(code.steps):
            code.check(place)
            if "SUPER" in step.opname or step.argval == "super":
                self._members_named(code)
            if step.opname == "LOAD_GLOBAL":
                self._follow(code, place, self._global(code, step.argval))
            elif "DEREF" in step.opname and step.argval in code.cells:
                cell = code.cells[step.argval]
                self._follow(code, place, self.note(cell, "cell_contents"))
        for inner in code.inner():
            self._code(inner)

    def _members_named(self, code: Code) -> None:
        # super() looks a name up where no shadow sees it.
        if code.kind is None:
            raise Untraceable("it uses super() outside of a method")
        for name in set(code.code.co_names) - {"super"}:
            for base in code.kind.__mro__:
                if name in base.__dict__ and base not in (nn.Module, object):
                    self.member(base.__dict__[name], code.kind)
                    self.note(base, name)

    def _global(self, code: Code, name: str) -> Any:
        value = self.note(code.names, name)
        return getattr(builtins, name, ABSENT) if value is ABSENT else value

    def _follow(self, code: Code, place: int, value: Any) -> None:
        """Vouch for what a name from outside stands for, with the attributes that follow it."""
        called, end = [str(code.steps[place].argval)], place + 1
        while end < len(code.steps) and code.steps[end].opname in LOOKUPS:
            name = code.steps[end].argval
            if isinstance(value, types.FunctionType):
                raise Untraceable(f"it looks at {'.'.join([*called, name])}")
            if not isinstance(value, types.ModuleType | type):
                break
            called.append(name)
            value = self.note(value, name)
            end += 1
        if not (isinstance(value, type) and self._is_only_named(code, place, end)):
            self.value(value, ".".join(called))

    def _is_only_named(self, code: Code, place: int, end: int) -> bool:
        """Whether a class is no more than an argument of isinstance or super."""
        if place and code.steps[place - 1].argval == "super":
            return True
        for step in code.steps[end:]:
            if step.opname == "LOAD_GLOBAL":
                if not isinstance(self._global(code, step.argval), types.ModuleType | type):
                    return False
            elif step.opname not in (*LOOKUPS, "BUILD_TUPLE", "PRECALL"):
                # The last of two, so not what getattr looks at.
                return step.opname.startswith("CALL") and step.argval == 2
        return False
