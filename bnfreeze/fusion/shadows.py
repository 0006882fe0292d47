"""Shadows of a model's modules, which share all that these have and tell what is read of them."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import nn

from bnfreeze.fusion.bytecode import Untraceable
from bnfreeze.fusion.vouching import KNOWN_PACKAGES, Voucher, is_known
from bnfreeze.fusion.watched import ABSENT, Read, content_of, find
from bnfreeze.policies.record import layer_class

__all__ = ["Shadows"]


class Shadows:
    """The shadows of a block and of all modules below it.

    Args:
        inside: the modules whose own forward is going to run, the block first.
        training: what the attribute ``training`` of a shadow is to be.

    Attributes:
        watching: whether what is read now is read by a forward.
        reads: what forwards have read of modules.
        touched: the modules that they have read anything of.
        voucher: for what they call.
    """

    def __init__(self, inside: Collection[nn.Module], training: Callable[[nn.Module], Any]) -> None:
        self.watching = False
        self.reads: dict[tuple[int, str], Read] = {}
        self.touched: dict[int, nn.Module] = {id(module): module for module in inside}
        self.voucher = Voucher()
        self._block = next(iter(inside))
        self._inside = {id(module) for module in inside}
        self._training = training
        self._called: set[int] = set()
        # By identity of the module its shadow, and the other way round.
        self._shadows: dict[int, nn.Module] = {}
        self._originals: dict[int, nn.Module] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._originals

    def is_inside(self, shadow: nn.Module) -> bool:
        """Whether the shadow is that of a module whose own forward is going to run."""
        return id(self.original(shadow)) in self._inside

    def call(self, shadow: nn.Module) -> None:
        """Note that a module is called whose own forward does not run now, and may set anything."""
        self._called.update(id(module) for module in self.original(shadow).modules())

    def original(self, shadow: nn.Module) -> nn.Module:
        """The module that it is the shadow of."""
        return self._originals[id(shadow)]

    def make(self, module: nn.Module, forward: Callable[..., Any] | None = None) -> nn.Module:
        """The shadow of a module, with this forward if it is to have another than its own."""
        if id(module) in self._shadows:
            return self._shadows[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            # Its attributes are not Python's; it can be called, and no more.
            self._originals[id(module)] = module
            return module
        base: Any = type(module)
        if id(module) in self._inside:
            base = layer_class(module)
            if "forward" in module.__dict__:
                raise Untraceable("its forward is overridden on the instance")
            self.voucher.function(base.forward, base, trusted=True, whole=forward is not None)
            self.voucher.note(base, "forward")
        kind = _shadow_class(base)
        if forward is not None:
            body = {"forward": forward}
            made = types.new_class(base.__name__, (kind,), exec_body=lambda ns: ns.update(body))
            kind = cast("type[nn.Module]", made)
        shadow = object.__new__(kind)
        shadow.__dict__.update(module.__dict__, _bnfreeze_shadows=self)
        for name in _TABLES & set(module.__dict__):
            shadow.__dict__[name] = copy.copy(module.__dict__[name])
        self._shadows[id(module)], self._originals[id(shadow)] = shadow, module
        shadow.__dict__["_modules"] = {
            name: None if child is None else self.make(child)
            for name, child in module._modules.items()
        }
        return shadow

    def look(self, shadow: nn.Module, name: str, internal: bool) -> None:
        """Note that a forward reads an attribute, and vouch for what that gives or runs.

        Args:
            shadow: of a module.
            name: the attribute's.
            internal: whether it is nn.Module's own code that reads it.
        """
        if not self.watching:
            return
        module = self.original(shadow)
        # Which submodules it has matters, too: one of them, or how many.
        self.touched[id(module)] = module
        if name == "_modules":
            return
        if (id(module), name) in self.reads or name in module._modules:
            return
        tensors = {**module._parameters, **module._buffers}
        if name in tensors:
            self._check_untied(tensors[name], name)
        elif self._may_have_set(module, name):
            raise Untraceable(f"it reads {name} of a {type(module).__name__} that it has called")
        elif name in shadow.__dict__:
            value = shadow.__dict__[name]
            self._vouch(value, f"self.{name}")
            if isinstance(value, _CONTAINERS):
                # What is done to it is not done to the module's own.
                shadow.__dict__[name] = copy.deepcopy(value)
        else:
            inside = self.is_inside(shadow)
            kind = layer_class(module) if inside else type(module)
            if name.startswith("__") or (name == "forward" and inside):
                return  # the forward of a module inside has been vouched for
            if getattr(kind, name, ABSENT) is getattr(nn.Module, name, None):
                if not internal and name not in _HARMLESS:
                    raise Untraceable(f"it looks at {name}")
                return
            for base in kind.__mro__:
                if name in base.__dict__:
                    self.voucher.member(base.__dict__[name], kind)
                    break
        self.reads[id(module), name] = Read.of(module, name)

    def touch(self, path: str) -> None:
        """Note that a graph goes by the name of something below the block, and so by this path."""
        module = self._block
        for segment in path.split(".")[:-1]:
            module = cast("nn.Module", module._modules[segment])
            self.touched[id(module)] = module

    def check(self) -> None:
        """Refuse a forward that has changed something."""
        for module in self.touched.values():
            own = self._shadows[id(module)].__dict__
            # An empty Sequential is falsy.
            children = {n: None if m is None else self.make(m) for n, m in module._modules.items()}
            for table in _TABLES & set(module.__dict__):
                if own[table] != module.__dict__[table]:
                    raise Untraceable("it registers something")
            if own["_modules"] != children:
                raise Untraceable("it changes its submodules")
        for (key, name), read in self.reads.items():
            # A class's attributes are not copied.
            shadow = self._shadows[key]
            value = shadow.__dict__.get(name, find(self.original(shadow), name))
            if content_of(value) != read.content:
                raise Untraceable(f"it changes self.{name}")

    def training(self, shadow: nn.Module) -> Any:
        """What the attribute ``training`` of a shadow is."""
        return self._training(shadow)

    def _may_have_set(self, module: nn.Module, name: str) -> bool:
        called = id(module) in self._called and not is_known(type(module))
        return called and not callable(getattr(type(module), name, None))

    def _check_untied(self, tensor: torch.Tensor | None, name: str) -> None:
        # The graph knows it by one name, and would not notice another being given away.
        tables = (table for m in self._originals.values() for table in (m._parameters, m._buffers))
        if tensor is not None and sum(t is tensor for ts in tables for t in ts.values()) > 1:
            raise Untraceable(f"it uses self.{name}, a tensor that is registered twice")

    def _vouch(self, value: Any, called: str) -> None:
        if type(value) in (dict, OrderedDict):
            value = [*value.keys(), *value.values()]
        if type(value) in (tuple, list, set, frozenset):
            if not value and type(value) in (list, set):
                # A hook may fill it between the block's beginning and here.
                raise Untraceable(f"it uses {called}, which is empty")
            for each in value:
                self._vouch(each, called)
        else:
            self.voucher.value(value, called, trusted=True)


class _Shadow:
    """Tells which attributes are read, and lets none be set."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # The original's own is for the classes of its library.
        pass

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name == "training" and name in own:
            return own["_bnfreeze_shadows"].training(self)
        # torch.fx looks at each module that it calls.
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if name in _HIDDEN and caller.partition(".")[0] not in KNOWN_PACKAGES:
            raise Untraceable(f"it looks at {name}")
        if name not in _MACHINERY and not caller.startswith("torch.fx."):
            own["_bnfreeze_shadows"].look(self, name, caller == nn.Module.__module__)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_tensor_constant"):
            raise Untraceable("it computes with a tensor that is not registered in it")
        raise Untraceable(f"it sets self.{name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"it deletes self.{name}")


@functools.cache
def _shadow_class(base: Any) -> type[nn.Module]:
    body = {}
    for kind in base.__mro__:
        for name in _IMPLICIT & set(kind.__dict__):
            if not is_known(kind) and kind is not object:
                body[name] = functools.partialmethod(_refuse, name)
    if "__getattribute__" in body:
        raise Untraceable(f"a {base.__name__} has a __getattribute__ of its own")
    return cast(
        "type[nn.Module]",
        types.new_class(base.__name__, (_Shadow, base), exec_body=lambda ns: ns.update(body)),
    )


# What the language calls without looking the name up on the instance.
_IMPLICIT = frozenset(
    {"__bool__", "__call__", "__contains__", "__enter__", "__eq__", "__exit__", "__getattr__"}
    | {"__getattribute__", "__getitem__", "__hash__", "__iter__", "__len__", "__setitem__"}
    | {"__add__", "__mul__", "__radd__", "__rmul__"}
)


def _refuse(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    raise Untraceable(f"it uses the {name} of a {type(self).__name__}")


_CONTAINERS = (tuple, list, dict, set)
# What every module can do, and that does no more than find modules: not requires_grad_ or half.
_HARMLESS = frozenset({"children", "named_children", "modules", "named_modules", "get_submodule"})
# They lead to tensors and flags without a trace.
_HIDDEN = frozenset({"_parameters", "_buffers", "__dict__"})
# Where a module registers parameters, buffers and hooks; its submodules are shadows of their own.
_TABLES = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, dict)) - {"_modules"}
# What every module has in its dict.
_MACHINERY = frozenset(nn.Module().__dict__) - {"_modules"} | {
    *("__dict__", "__class__", "_bnfreeze_shadows", "_bnfreeze")
}
