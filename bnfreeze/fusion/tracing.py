"""What a block's forward does, as a torch.fx graph that may stand in for it, or why it may not.

A graph is worth more than a guess only if it says all that the forward does. torch.fx by itself
bakes in what a forward reads on the way (a flag, ``self.training``, the type of its input) and
passes over what it does besides (an attribute set, a context entered, a random number drawn). So a
shadow of the block is traced: modules that share the block's tensors and children, whose attributes
are watched. What is read becomes a condition under which the graph holds (`Trace.reads`),
``training`` a value of the graph, and what a graph cannot say is refused; what no trace could show
is refused before, by the look of the code (`bnfreeze.fusion.vouching`).
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import itertools
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfreeze.fusion.bytecode import Untraceable
from bnfreeze.fusion.shadows import Shadows
from bnfreeze.fusion.watched import Name, Read
from bnfreeze.policies.record import layer_class

__all__ = ["IN_PLACE_ADD", "Kind", "Trace", "trace"]

# What a forward that asks for the type of its input is told.
Kind = Literal["tensor", "list"]
_TYPES: dict[Kind, type] = {"tensor": Tensor, "list": list}


@dataclass(frozen=True)
class Trace:
    """A block's forward.

    Attributes:
        graph: what it computes from its required arguments; targets are names from the block on.
        arguments: how many there are.
        asked: which of them were asked for their type, and so are taken to be of the kind asked
            for in `trace`.
        reads: what else the graph rests on: attributes of modules, names outside of them.
        inside: the modules whose forward is part of the graph: the block, and what was inlined.
        touched: those of which it matters which submodules they have.
    """

    graph: fx.Graph
    arguments: int
    asked: frozenset[int]
    reads: tuple[Read | Name, ...]
    inside: tuple[nn.Module, ...]
    touched: tuple[nn.Module, ...]


def trace(block: nn.Module, inlined: Collection[nn.Module] = (), kind: Kind = "tensor") -> Trace:
    """Trace the forward of a block, its children kept whole.

    Args:
        block: any module. Nothing of it is changed.
        inlined: those of the modules below it whose forward becomes part of the graph.
        kind: what an argument is said to be if the forward asks for its type.

    Raises:
        Untraceable: its forward cannot be told by a graph.
    """
    if isinstance(block, fx.GraphModule):
        raise Untraceable("it is a GraphModule of torch.fx, which sets its forward on its class")
    tracer = _Tracer([block, *inlined], kind)
    chance, modes = _chance(), _modes()
    try:
        arguments = _required_arguments(layer_class(block))
        root = tracer.shadow_root(block, arguments)
        with _Nothing():  # type: ignore[no-untyped-call]
            graph = tracer.trace(root)
    except Untraceable:
        raise
    except Exception as error:
        # Whatever else a forward meets that is given no tensor.
        words = str(error).partition("\n")[0]
        raise Untraceable(f"{type(error).__name__}: {words}"[:120]) from error
    if _chance() != chance:
        raise Untraceable("it draws random numbers outside of torch")
    if _modes() != modes:
        raise Untraceable("it leaves another autograd or autocast mode behind")
    shadows = tracer.shadows
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            shadows.touch(node.target)
    shadows.check()
    return Trace(
        graph,
        arguments,
        frozenset(tracer.asked),
        (*shadows.reads.values(), *shadows.voucher.names.values()),
        tuple({id(m): m for m in [block, *inlined]}.values()),
        tuple(shadows.touched.values()),
    )


def _required_arguments(base: type[nn.Module]) -> int:
    """How many arguments the forward must be given; those with a default keep it."""
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY) for p in parameters):
        raise Untraceable("its forward takes *args or keywords only")
    count = sum(p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD)
    if not 1 <= count <= len(_SIGNATURES):
        raise Untraceable(f"its forward takes {count} arguments")
    return count


class _Value(fx.Proxy):
    """A value in the making, which notices that somebody asks for its type or writes to it."""

    def __getattr__(self, name: str) -> Any:
        # torch.fx says yes to whatever hasattr asks for, and reads it only once it is used.
        attribute = getattr(Tensor, name, None)
        if attribute is None or name.startswith("_") or name in _OF_AUTOGRAD:
            raise Untraceable(f"it looks for the attribute {name} of a value")
        if callable(attribute):
            return _Method(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise Untraceable(f"it sets the attribute {name} of a value")
        super().__setattr__(name, value)

    def __iter__(self) -> Any:
        # An assignment says how many values it wants.
        frame = sys._getframe(1)
        steps = dis.get_instructions(frame.f_code)
        step = next((s for s in steps if s.offset == frame.f_lasti), None)
        if step is None or step.opname != "UNPACK_SEQUENCE":
            raise Untraceable("it loops over a value of which nothing is known")
        values = self.tracer.create_proxy("call_function", _unpack, (self, step.argval), {})
        return iter([values[index] for index in range(step.argval)])  # type: ignore[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", _set_item, (self, key, value), {})

    def __repr__(self, *args: Any) -> str:
        raise Untraceable("it makes a string of a value")

    __str__ = __bytes__ = __format__ = __repr__

    def __hash__(self) -> int:
        raise Untraceable("it looks a value up")

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance comes here. torch.fx may ask whether this is a proxy.
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith("torch.fx.") or asking == __name__:
            return _Value
        return cast("_Tracer", self.tracer).type_of(self.node)


class _Method(_Value, fx.proxy.Attribute):
    """What is a method of tensors: called, or else (``x.device.type``) read."""


# Of these it would be seen what became of the block, or they may be None.
_OF_AUTOGRAD = frozenset({"grad", "grad_fn", "is_leaf", "name", "names", "output_nr"})


def _unpack(values: Any, count: int) -> list[Any]:
    found = list(itertools.islice(iter(values), count + 1))
    if len(found) != count:
        words = "too many" if len(found) > count else "not enough"
        raise ValueError(f"{words} values to unpack (expected {count})")
    return found


def _set_item(values: Any, key: Any, value: Any) -> None:
    values[key] = value


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # A function of ours, for torch.fx writes operator.iadd as ``x += y``, which would give a new
    # meaning to the name x where x is a number.
    def in_place(value: Any, other: Any) -> Any:
        return operation(value, other)

    return in_place


_IN_PLACE = {
    name: _in_place(getattr(operator, name))
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
}
IN_PLACE_ADD = _IN_PLACE["iadd"]


def _method(target: Callable[[Any, Any], Any]) -> Callable[[_Value, Any], fx.Proxy]:
    # torch.fx would make ``x += y`` an addition, and leave x as it was.
    return lambda value, other: value.tracer.create_proxy(
        "call_function", target, (value, other), {}
    )


for _name, _function in _IN_PLACE.items():
    setattr(_Value, f"__{_name}__", _method(_function))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inside: list[nn.Module], kind: Kind) -> None:
        super().__init__()
        self.shadows = Shadows(inside, self.training_of)
        self.kind = kind
        self.asked: set[int] = set()
        self.modes = _modes()

    def shadow_root(self, block: nn.Module, arguments: int) -> nn.Module:
        own = layer_class(block).forward
        forward = _SIGNATURES[arguments - 1](functools.partial(_told, self, own))
        return self.shadows.make(block, forward)

    def training_of(self, shadow: nn.Module) -> fx.Proxy:
        path = self.path_of_module(shadow) if shadow is not self.root else ""
        return self.create_proxy("get_attr", f"{path}.training".lstrip("."), (), {})

    def type_of(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            raise Untraceable("it asks for the type of an intermediate value")
        self.asked.add(list(self.graph.nodes).index(node))
        return _TYPES[self.kind]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.shadows.is_inside(m):
            return False
        self.shadows.call(m)
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Nothing from the cache: a module that is called in between may set another tensor.
        return super().getattr(attr, attr_val, {})

    def path_of_module(self, mod: nn.Module) -> str:
        if mod not in self.shadows:
            raise Untraceable(f"it calls a {type(mod).__name__} that is not registered in it")
        return super().path_of_module(mod)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        # What torch.fx cannot write down.
        if isinstance(a, dict) and not all(type(key) in (str, int) for key in a):
            raise Untraceable("it makes a dict whose keys are neither strings nor integers")
        if isinstance(a, enum.Enum) and a.name not in type(a).__members__:
            raise Untraceable("it combines the members of an enumeration")
        return a.node if type(a) in (_Value, _Method) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise Untraceable("it computes in an autograd or autocast mode of its own")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        target = obj.node.target
        if obj.node.op == "get_attr" and str(target).rpartition(".")[2] == "training":
            raise Untraceable("what it does depends on self.training")
        raise Untraceable("what it does depends on the values or shapes of tensors")


class _Nothing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets no real tensor be computed: it would be baked in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable("it computes tensors that do not depend on its input")


def _told(tracer: _Tracer, own: Callable[..., Any], *args: Any) -> Any:
    """Run the forward; what it returns must come out of the graph as it is."""
    tracer.shadows.watching = True
    out = own(*args)
    tracer.shadows.watching = False
    if type(out) is OrderedDict:
        # torch.fx would return a dict.
        return tracer.create_proxy("call_function", OrderedDict, (list(out.items()),), {})
    _check_output(out)
    return out


def _check_output(out: Any) -> None:
    if type(out) is dict:
        out = list(out.values())
    if type(out) in (tuple, list):
        for each in out:
            _check_output(each)
    elif not (out is None or isinstance(out, fx.Proxy | bool | int | float | str)):
        raise Untraceable(f"it returns a {type(out).__name__}")


# The number of placeholders follows from the signature.
_SIGNATURES: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    lambda told: lambda self, a: told(self, a),
    lambda told: lambda self, a, b: told(self, a, b),
    lambda told: lambda self, a, b, c: told(self, a, b, c),
)


def _modes() -> tuple[object, ...]:
    """The modes that change what an operation does without standing in a graph."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        _autocast_nesting(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
    )


def _autocast_nesting() -> int:
    # To enter a context that changes nothing counts as well.
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _chance() -> object:
    numpy = sys.modules.get("numpy.random")
    state = numpy.get_state()[1:3] if numpy is not None else ()
    return random.getstate(), [s.tobytes() if hasattr(s, "tobytes") else s for s in state]
