"""Generated forwards of a block, and the guard that says whether they may run."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bnfreeze.fusion.sums import is_drop
from bnfreeze.fusion.tracing import UntraceableError
from bnfreeze.policies.fused import has_hooks
from bnfreeze.policies.record import layer_class

__all__ = ["Generated", "compiled", "generate"]

Forward = Callable[..., Any]
# The mode, and the types of the arguments.
Key = tuple[bool, tuple[type, ...]]

# Values that can be compared. A function that a module has decides as much as a flag.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype),
    *(types.FunctionType, types.BuiltinFunctionType),
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MISSING = object()


@dataclass(frozen=True)
class _Holder:
    """What a module had when the block was traced.

    Attributes:
        module: the module; None for the block, which must not refer to itself.
        in_mode: whether its mode must be the block's.
        forward: of its class.
        children: names and submodules, in their order.
        own: its attributes that are plain values.
    """

    module: nn.Module | None
    in_mode: bool
    forward: Any
    children: list[tuple[str, nn.Module | None]]
    own: list[tuple[str, Any]]

    def has_changed(self, block: nn.Module) -> bool:
        module = block if self.module is None else self.module
        if module is not block and has_hooks(module):
            return True
        if self.in_mode and module.training is not block.training:
            return True
        if layer_class(module).forward is not self.forward:
            return True
        if [*module._modules.items()] != self.children:
            return True
        now = module.__dict__
        for name, value in self.own:
            found = now.get(name, _MISSING)
            if found is not value and not (type(found) is type(value) and found == value):
                return True
        return False


@dataclass(frozen=True)
class Generated:
    """The generated forwards of one block.

    Attributes:
        forwards: by the mode and the types of the arguments.
        holders: the modules of which it matters what they have.
        passed: the modules that are not called any more or are called in another way, and their
            classes.
        drops: those of them that must be in eval mode when the block is.
    """

    forwards: dict[Key, Forward]
    holders: tuple[_Holder, ...]
    passed: tuple[tuple[nn.Module, type[nn.Module]], ...]
    drops: tuple[nn.Module, ...]

    def choose(self, block: nn.Module, args: tuple[Any, ...]) -> Forward | None:
        """Return the forward for these arguments; None if something has changed since the trace."""
        mode = block.training
        run = self.forwards.get((mode, tuple(map(type, args))))
        if run is None:
            return None
        for module, kind in self.passed:
            # One that is a block itself may have got its generated forward since.
            if type(module) is not kind and layer_class(module) is not kind:
                return None
            if has_hooks(module):
                return None
        if any(holder.has_changed(block) for holder in self.holders):
            return None
        if not mode and any(module.training for module in self.drops):
            return None
        return run

    def __deepcopy__(self, memo: dict[int, Any]) -> Generated:
        return Generated(
            self.forwards,
            *copy.deepcopy((self.holders, self.passed, self.drops), memo),
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Who reads the file generates them again, with the versions that are installed there.
        return (type(None), ())


def compiled(graph: fx.Graph, name: str) -> Forward:
    """Make a function of a graph; the block and its arguments go in."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    try:
        exec(compile(code.src, f"<generated forward of {name}>", "exec"), namespace)
    except SyntaxError as error:
        raise UntraceableError("torch.fx cannot write its forward as code") from error
    return namespace["forward"]  # type: ignore[no-any-return]


def generate(
    block: nn.Module,
    forwards: dict[Key, Forward],
    looked_into: Collection[nn.Module],
    passed: Collection[nn.Module],
) -> Generated:
    """Put the guard around forwards.

    Args:
        block: the block.
        forwards: by the mode and the types of the arguments.
        looked_into: the modules that the forwards look into, the block among them.
        passed: the modules that are not called any more, or in another way.
    """
    unique = {id(module): module for module in passed}.values()
    # Of these it matters which children they have, and what a ReLU6's bounds are.
    more = [m for m in unique if m._modules or isinstance(m, nn.ReLU6)]
    holders = [(module, True) for module in looked_into] + [(module, False) for module in more]
    return Generated(
        forwards,
        tuple(
            _Holder(
                None if module is block else module,
                in_mode,
                layer_class(module).forward,
                [*module._modules.items()],
                [item for item in vars(module).items() if _is_setting(*item)],
            )
            for module, in_mode in holders
        ),
        tuple((module, type(module)) for module in unique),
        tuple(filter(is_drop, unique)),
    )


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of a module is a plain value that its forward may read."""
    if type(value) is tuple:
        return all(isinstance(each, _PLAIN) for each in value)
    mine = name in _OF_EVERY_MODULE or name.startswith("_bnfreeze")
    return not mine and isinstance(value, _PLAIN)
