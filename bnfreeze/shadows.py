"""Shadows of a model's modules, which share all that these have and tell what is read of them."""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from bnfreeze.record import layer_class

__all__ = ["Read", "Shadows", "Untraceable"]


class Untraceable(Exception):  # noqa: N818 - an answer, not a failure
    """Why no graph can stand in for a block's forward: a sentence's end."""


@dataclass(frozen=True)
class Read:
    """An attribute that the forward read, outside of parameters, buffers and submodules."""

    module: nn.Module
    name: str
    value: Any
    # What a list or a dict held then, for it may be changed without being replaced.
    content: Any

    def holds(self) -> bool:
        """Whether reading it would still give the same."""
        value = self.module.__dict__.get(self.name, self)
        if self.content is not None:
            return value is self.value and bool(value == self.content)
        return value is self.value or (type(value) is type(self.value) and value == self.value)


class Shadows:
    """The shadows of a block and of all modules below it.

    Args:
        inside: the modules whose own forward is going to run.
        training: what the attribute ``training`` of a shadow is to be.
    """

    def __init__(self, inside: Collection[nn.Module], training: Callable[[nn.Module], Any]) -> None:
        self.reads: list[Read] = []
        self._inside = {id(module) for module in inside}
        self._training = training
        # By identity of the module its shadow, and the other way round.
        self._shadows: dict[int, nn.Module] = {}
        self._originals: dict[int, nn.Module] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._originals

    def is_inside(self, shadow: nn.Module) -> bool:
        """Whether the shadow is that of a module whose own forward is going to run."""
        return id(self._originals[id(shadow)]) in self._inside

    def make(self, module: nn.Module, forward: Callable[..., Any] | None = None) -> nn.Module:
        """The shadow of a module, with this forward if it is to have another than its own."""
        if id(module) in self._shadows:
            return self._shadows[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            # Its attributes are not Python's; it can be called, and no more.
            self._originals[id(module)] = module
            return module
        if id(module) in self._inside and "forward" in module.__dict__:
            raise Untraceable("its forward is overridden on the instance")
        base: Any = layer_class(module)
        kind = _shadow_class(base)
        if forward is not None:
            body = {"forward": forward}
            made = types.new_class(base.__name__, (kind,), exec_body=lambda ns: ns.update(body))
            kind = cast("type[nn.Module]", made)
        shadow = object.__new__(kind)
        shadow.__dict__.update(module.__dict__, _bnfreeze_shadows=self)
        self._shadows[id(module)], self._originals[id(shadow)] = shadow, module
        shadow.__dict__["_modules"] = {
            name: None if child is None else self.make(child)
            for name, child in module._modules.items()
        }
        return shadow

    def read(self, shadow: nn.Module, name: str, value: Any) -> Any:
        """Note that an attribute is read, and say what it is."""
        if name == "training":
            return self._training(shadow)
        if not _is_plain(value):
            raise Untraceable(f"it reads self.{name}, of the type {type(value).__name__}")
        content = copy.deepcopy(value) if isinstance(value, _CONTAINERS) else None
        self.reads.append(Read(self._originals[id(shadow)], name, value, content))
        return value


class _Shadow:
    """Tells which attributes are read, and lets none be set."""

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name in own and name not in _MACHINERY:
            return own["_bnfreeze_shadows"].read(self, name, own[name])
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_tensor_constant"):
            raise Untraceable("it computes with a tensor that is not registered in it")
        raise Untraceable(f"it sets self.{name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"it deletes self.{name}")


@functools.cache
def _shadow_class(base: Any) -> type[nn.Module]:
    made = types.new_class(base.__name__, (_Shadow, base))
    if base.__call__ is not nn.Module.__call__:
        made.__call__ = _refuse_call  # type: ignore[method-assign]
    return cast("type[nn.Module]", made)


def _refuse_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise Untraceable(f"a {type(self).__name__} is not called as modules are")


# What every module has in its dict.
_MACHINERY = frozenset(nn.Module().__dict__) - {"training"} | {"_bnfreeze_shadows", "_bnfreeze"}


_CONTAINERS = (list, dict, set)
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, type),
    *(torch.dtype, torch.device, torch.memory_format, torch.Size),
    *(types.FunctionType, types.BuiltinFunctionType),
)


def _is_plain(value: Any) -> bool:
    """Whether it is still the same as long as it compares the same."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
