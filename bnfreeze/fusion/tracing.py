"""Trace the forward of a block with torch.fx, or say why that cannot be done.

Only forwards of known libraries are traced, and those that the user names: a trace shows what a
forward did once, and can miss what else it may do. The block's children are kept whole. What the
forward reads on the way, such as ``self.training`` or a flag, becomes fixed in the graph, so the
caller traces once for each mode and checks the flags later (`bnfreeze.fusion.generated`).
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from bnfreeze.norm_layers import KNOWN, forward_owner
from bnfreeze.policies.record import layer_class
from bnfreeze.torch_private import TorchDispatchMode, _len_torch_function_stack

_ONE_AT_A_TIME = threading.Lock()


class UntraceableError(Exception):
    """A graph cannot stand for the forward; the message says why."""


def names_of(traceable: str | type | Sequence[str | type]) -> tuple[str, ...]:
    """Return classes and packages by their full names, which survive a pickle.

    Raises:
        TypeError: one of them is neither a class of modules nor a name.
    """
    names = []
    for each in [traceable] if isinstance(traceable, str | type) else traceable:
        if isinstance(each, type) and issubclass(each, nn.Module):
            names.append(_full_name(each))
        elif isinstance(each, str):
            names.append(each)
        else:
            raise TypeError(
                f"traceable takes classes of modules and names of packages; {each!r} is neither."
            )
    return tuple(dict.fromkeys(names))


def why_not_traced(module: nn.Module, traceable: Iterable[str]) -> str:
    """Return why the module's forward is not to be traced; empty if it may be.

    Args:
        module: any module.
        traceable: full names of classes and packages that the user has named.
    """
    kind = layer_class(module)
    if isinstance(module, fx.GraphModule):
        return "a GraphModule of torch.fx keeps its forward"
    owner = forward_owner(kind)
    if owner.__module__.partition(".")[0] in KNOWN:
        return ""
    for name in {_full_name(kind), _full_name(owner)}:
        if any(name == each or name.startswith(f"{each}.") for each in traceable):
            return ""
    return f"{kind.__name__} keeps its forward; to trace it, pass traceable=({kind.__name__},)"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def trace(
    block: nn.Module, inlined: Collection[nn.Module], training: bool
) -> tuple[fx.Graph, list[tuple[type, ...]]]:
    """Trace the forward of a block in one mode. Nothing of the block is changed.

    Args:
        block: any module.
        inlined: the modules below it whose forward becomes part of the graph.
        training: the mode.

    Returns:
        What it computes from its required arguments, where targets are names below the block; and
        the types that the arguments may have together: a list is used like a tensor, unless the
        forward has asked.

    Raises:
        UntraceableError: a graph cannot stand for its forward.
    """
    inside = {id(block), *map(id, inlined)}
    clones: dict[int, nn.Module] = {}
    root = _clone(block, inside, training, clones)
    copies = [clones[key] for key in inside]
    before = [_contents(each) for each in copies]
    count = _required_arguments(layer_class(block))
    try:
        # Activation checkpointing works through these hooks and would be lost.
        with (
            _ONE_AT_A_TIME,
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.disable_saved_tensors_hooks("not traced"),
            _NoTensors(),  # type: ignore[no-untyped-call]
        ):
            tracer = _Tracer(copies, count)
            graph = tracer.trace(root)
    except UntraceableError:
        raise
    except Exception as error:
        # Whatever a forward does when it is given no real tensor.
        words = str(error).partition("\n")[0]
        raise UntraceableError(f"{type(error).__name__}: {words}"[:120]) from error
    if any(name.startswith("_tensor_constant") for name in vars(root)):
        raise UntraceableError("it computes with a tensor that is not registered in it")
    if [_contents(each) for each in copies] != before:
        raise UntraceableError("it changes its own attributes")
    types = [
        (Tensor,) if index in tracer.asked else (Tensor, list) for index in range(tracer.count)
    ]
    return graph, [*itertools.product(*types)]


def _clone(
    module: nn.Module, inside: set[int], training: bool, clones: dict[int, nn.Module]
) -> nn.Module:
    """A shallow copy of a module and of all modules below it, in the mode to be traced."""
    if id(module) in clones or isinstance(module, torch.jit.ScriptModule):
        return clones.setdefault(id(module), module)
    twin = object.__new__(layer_class(module) if id(module) in inside else type(module))
    clones[id(module)] = twin
    for key, value in module.__dict__.items():
        own = type(value) in (dict, OrderedDict, list, set)
        twin.__dict__[key] = value.copy() if own else value
    twin.__dict__["training"] = training
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _clone(child, inside, training, clones)
    return twin


def _contents(module: nn.Module) -> dict[str, Any]:
    """What a module has: by identity, and containers by what is in them."""
    return {
        key: [*map(id, value.values() if isinstance(value, dict) else value)]
        if type(value) in (dict, OrderedDict, list, set)
        else id(value)
        for key, value in module.__dict__.items()
    }


def _required_arguments(base: type[nn.Module]) -> int:
    """How many arguments the forward needs; those with a default keep it."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY) for p in parameters):
        raise UntraceableError("its forward takes *args or keywords only")
    count = sum(p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD)
    if not count:
        raise UntraceableError("its forward takes no argument")
    return count


class _Value(fx.Proxy):
    """A value of the graph, more exact than torch.fx's where that says something wrong."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):  # torch.fx says yes to every hasattr
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance comes here. torch.fx may ask whether this is a proxy.
        asking = str(sys._getframe(1).f_globals.get("__name__"))
        if asking.startswith("torch.fx.") or asking == __name__:
            return _Value
        return cast("_Tracer", self.tracer).type_of(self.node)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    # A function of ours: torch.fx would write ``x += y``, which changes x if that is a number.
    operation = getattr(operator, name)

    def in_place(value: Any, other: Any) -> Any:
        return operation(value, other)

    # torch.fx would trace ``x += y`` as ``x = x + y``, and x would not change.
    setattr(
        _Value,
        f"__{name}__",
        lambda self, other: self.tracer.create_proxy("call_function", in_place, (self, other), {}),
    )
    return in_place


IN_PLACE_ADD = _in_place("iadd")
for _name in (
    *("isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
):
    _in_place(_name)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inside: list[nn.Module], count: int) -> None:
        super().__init__()
        self.inside = {id(module) for module in inside}
        self.count = count
        # The positions of the arguments whose type the forward asks for.
        self.asked: set[int] = set()
        self.modes = _modes()
        self.thread = threading.get_ident()

    def create_args_for_root(self, root_fn: Any, *_: Any) -> tuple[Any, list[Any]]:
        names = [f"argument_{index}" for index in range(self.count)]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return lambda *args: _checked(self, root_fn(*args)), [self.root, *proxies]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # torch.fx replaces nn.Module.__call__ and __getattr__ for all threads.
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.inside

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Value else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise UntraceableError("it computes in an autograd or autocast mode of its own")
        return super().create_node(*args, **kwargs)

    def type_of(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            raise UntraceableError("it asks for the type of an intermediate value")
        self.asked.add(list(self.graph.nodes).index(node))
        return Tensor

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise UntraceableError("what it does depends on the values or shapes of tensors")

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        raise UntraceableError("it loops over a value of unknown length")


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets no real tensor be computed: it would become a constant of the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError("it computes tensors that do not depend on its input")


def _checked(tracer: fx.Tracer, out: Any) -> Any:
    """Return the output of a forward, if it comes out of a graph as it went in."""
    if type(out) is OrderedDict:
        # torch.fx would return a dict.
        return tracer.create_proxy("call_function", OrderedDict, (list(out.items()),), {})
    todo = [out]
    while todo:
        each = todo.pop()
        if type(each) in (tuple, list, dict):
            todo += each.values() if type(each) is dict else each
        elif not (each is None or isinstance(each, fx.Proxy | bool | int | float | str)):
            raise UntraceableError(f"it returns a {type(each).__name__}")
    return out


def _modes() -> tuple[object, ...]:
    """The modes that change what an operation does and do not appear in a graph."""
    torch.autocast_increment_nesting()  # to enter a context that changes nothing counts as well
    return (
        torch.autocast_decrement_nesting(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        _len_torch_function_stack(),
    )
