"""Generated forwards of a block, and the guard that says whether they may run."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from bnfreeze.fusion.sums import is_drop
from bnfreeze.fusion.tracing import UntraceableError
from bnfreeze.nn.activations import settings_of
from bnfreeze.nn.eager import observer
from bnfreeze.norm_layers import is_norm
from bnfreeze.policies.fused import has_hooks
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of
from bnfreeze.torch_private import _has_any_global_hook

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


class _Watched(NamedTuple):
    """What a module had when the block was traced.

    Attributes:
        module: the module; None for the block, which must not refer to itself.
        kind: its class; of a frozen layer that of freezing, of others that without it.
        forward: of the class.
        policy: by which it is frozen.
        children: names and submodules, in their order.
        in_mode: whether its mode must be the block's.
        own: its attributes that are plain values.
    """

    module: nn.Module | None
    kind: type[nn.Module]
    forward: Any
    policy: Policy | None
    children: list[tuple[str, nn.Module | None]]
    in_mode: bool
    own: list[tuple[str, Any]]


@dataclass(frozen=True)
class Generated:
    """The generated forwards of one block.

    Attributes:
        forwards: by the mode and the types of the arguments.
        watched: what the modules in the block were like, the block among them.
    """

    forwards: dict[Key, Forward]
    watched: list[_Watched]

    def choose(self, block: nn.Module, args: tuple[Any, ...]) -> Forward | None:
        """Return the forward that may run on these arguments, here and now; None if there is none.

        There is none if anything has changed since the trace.
        """
        mode = block.training
        run = self.forwards.get((mode, tuple(map(type, args))))
        if run is None or _has_any_global_hook() or observer():  # type: ignore[no-untyped-call]
            return None
        for module, kind, forward, policy, children, in_mode, own in self.watched:
            if module is None:
                module = block
            elif has_hooks(module):
                return None
            # One that is a block itself may have got its generated forward since.
            if type(module) is not kind and layer_class(module) is not kind:
                return None
            if policy is not None and getattr(record_of(module), "policy", None) is not policy:
                return None
            if kind.forward is not forward or [*module._modules.items()] != children:
                return None
            if in_mode and module.training is not mode:
                return None
            now = module.__dict__
            for name, value in own:
                found = now.get(name, _MISSING)
                if found is not value and not (type(found) is type(value) and found == value):
                    return None
        return run

    def __deepcopy__(self, memo: dict[int, Any]) -> Generated:
        return Generated(self.forwards, copy.deepcopy(self.watched, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Who reads the file generates them again, with the versions that are installed there. An
        # empty dict is what loading a file may make without any warning.
        return (dict, ())


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
    block: nn.Module, forwards: Mapping[Key, Forward], called: set[nn.Module]
) -> Generated:
    """Put the guard around forwards.

    Args:
        block: the block.
        forwards: by the mode and the types of the arguments.
        called: the modules that the forwards call whole, or would call if nothing were fused.
    """
    watched: dict[nn.Module, _Watched] = {}

    def watch(module: nn.Module, looked_into: bool) -> None:
        record = record_of(module)
        frozen = record is not None and is_norm(module)
        looked_into = looked_into and not frozen and module not in called
        # One that two paths lead to is looked into if one of them is.
        seen = module in watched and (watched[module].in_mode or not looked_into)
        if seen or isinstance(module, torch.jit.ScriptModule):
            return
        kind = layer_class(module) if record is None else type(module)
        read = looked_into or settings_of(module)
        own = [item for item in vars(module).items() if _is_setting(*item)] if read else []
        watched[module] = _Watched(
            None if module is block else module,
            kind,
            kind.forward,
            None if record is None else record.policy,
            [*module._modules.items()],
            looked_into or is_drop(module),
            own,
        )
        for child in module.children():
            watch(child, looked_into)

    watch(block, looked_into=True)
    return Generated(dict(forwards), list(watched.values()))


def _is_setting(name: str, value: Any) -> bool:
    """Whether an attribute of a module is a plain value that its forward may read."""
    if type(value) is tuple:
        return all(isinstance(each, _PLAIN) for each in value)
    mine = name in _OF_EVERY_MODULE or name.startswith("_bnfreeze")
    return not mine and isinstance(value, _PLAIN)
