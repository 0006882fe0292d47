"""What a generated forward rests on, as it was: names outside of modules, attributes of modules."""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

__all__ = ["ABSENT", "Name", "Read", "content_of", "find"]

# What a name stands for that nothing has.
ABSENT = object()


@dataclass(frozen=True)
class Name:
    """A name outside of all modules, and what it stood for."""

    owner: Any  # a module's or a class's attributes, a dict's entries, a cell's content
    name: str
    value: Any

    @classmethod
    def of(cls, owner: Any, name: str) -> Name:
        """What the name stands for now."""
        value = cls(owner, name, ABSENT).now()
        if getattr(value, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace":
            # While torch.fx traces, it has others stand in for the functions of math.
            value = value.__wrapped__
        return cls(owner, name, value)

    def now(self) -> Any:
        """What the name stands for at present, or ABSENT."""
        if type(self.owner) is dict:
            return self.owner.get(self.name, ABSENT)
        return getattr(self.owner, self.name, ABSENT)

    def holds(self, block: nn.Module) -> bool:
        """Whether it still stands for the same."""
        return self.now() is self.value

    def within(self, block: nn.Module) -> Name:
        """The same: it belongs to no block."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Name:
        return self


@dataclass(frozen=True)
class Read:
    """An attribute that was read, as it was: a module's own, or one of its class; or ABSENT.

    Of a parameter or a buffer only whether it is None, for the graph reads it anew.
    """

    module: nn.Module | None  # None stands for the block
    name: str
    value: Any
    # All the way down what it held then, for that may be changed without being replaced.
    content: Any

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Read:
        """The attribute as it is now."""
        value = find(module, name)
        return cls(module, name, value, content_of(value))

    def within(self, block: nn.Module) -> Read:
        """The same without a reference to the block."""
        return replace(self, module=None) if self.module is block else self

    def holds(self, block: nn.Module) -> bool:
        """Whether reading it would still give the same."""
        value = find(block if self.module is None else self.module, self.name)
        if value is self.value and isinstance(value, _UNCHANGING):
            return True
        return bool(content_of(value) == self.content)

    def __deepcopy__(self, memo: dict[int, Any]) -> Read:
        return Read(copy.deepcopy(self.module, memo), self.name, self.value, self.content)


def find(module: nn.Module, name: str) -> Any:
    """A module's attribute; of a parameter, buffer or submodule whether it is None."""
    own = module.__dict__
    if name in own:
        return own[name]
    for table in ("_parameters", "_buffers", "_modules"):
        if name in own[table]:
            return own[table][name] is None
    return getattr(type(module), name, ABSENT)


_UNCHANGING = (type(None), bool, int, float, str, types.FunctionType, type)


def content_of(value: Any) -> Any:
    """What compares equal as long as a plain value is the same, all the way down."""
    if isinstance(value, dict):
        return (type(value), [(content_of(k), content_of(v)) for k, v in value.items()])
    if isinstance(value, list | tuple | set | frozenset):
        # Of a set the order too: one may loop over it.
        return (type(value), [content_of(each) for each in value])
    if isinstance(value, float | complex):
        return (type(value), repr(value))  # 0.0 == -0.0, and nan != nan
    return (type(value), value)
