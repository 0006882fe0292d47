"""A generated forward of a block, and all that it was made for."""

from __future__ import annotations

import copy
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bnfreeze.fusion.bytecode import Untraceable
from bnfreeze.fusion.matching import Call
from bnfreeze.fusion.tracing import Kind, Trace
from bnfreeze.fusion.watched import Name, Read
from bnfreeze.policies.fused import has_hooks
from bnfreeze.policies.record import layer_class

__all__ = ["Program", "Programs", "program"]


@dataclass(frozen=True)
class Program:
    """A generated forward, and what it was made for.

    It is kept by its block, and does not refer to that, or only the garbage collector could free
    the two: None stands for the block.

    Attributes:
        run: the forward; the block and its arguments go in.
        arguments: how many of them there must be.
        asked: which of them must be of the kind `kind`.
        kind: tensors or lists.
        reads: the attributes and names that must still be what they were.
        children: the modules that must still have the very submodules that they had.
        passed: the modules that must still be of their class, with no hooks on them.
    """

    run: Callable[..., Any]
    arguments: int
    asked: frozenset[int]
    kind: Kind
    reads: tuple[Read | Name, ...]
    children: tuple[tuple[nn.Module | None, list[tuple[str, nn.Module | None]]], ...]
    passed: tuple[tuple[nn.Module, type[nn.Module]], ...]

    def holds(self, block: nn.Module) -> bool:
        """Whether its block still is what it was when this was made."""
        for module, kind in self.passed:
            if type(module) is not kind or has_hooks(module):
                return False
        for holder, children in self.children:
            # Their order matters too, in a loop over them.
            if [*(block if holder is None else holder)._modules.items()] != children:
                return False
        return all(read.holds(block) for read in self.reads)

    def takes(self, args: tuple[Any, ...]) -> bool:
        """Whether it was made for such arguments."""
        if len(args) != self.arguments:
            return False
        for index, arg in enumerate(args):
            # The very class: a subclass may be told from it, and do other things.
            if index in self.asked and self.kind == "list":
                if type(arg) is not list or any(type(each) is not Tensor for each in arg):
                    return False
            elif type(arg) is not Tensor:
                return False
        return True


class Programs(tuple[Program, ...]):
    """A block's generated forwards, one for each kind of argument.

    A deepcopy of them belongs to the copied block. They are not pickled: whoever reads the file
    makes them anew, with the versions that are there then.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Programs:
        return Programs(copy.deepcopy(tuple(self), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_nothing, ())


def _nothing() -> None:
    return None


# torch.fx quotes a segment that is no identifier, and takes a keyword for one.
_SEGMENT = rf"(?!(?:{'|'.join(keyword.kwlist)})(?:\.|$))[ -!#-\-/-\[\]-~]+"
_WRITABLE = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*")


def program(block: nn.Module, traced: Trace, kind: Kind, calls: Sequence[Call]) -> Program:
    """Make a forward of a graph in which norm layers absorb what follows them."""
    for node in traced.graph.nodes:
        if node.op in ("call_module", "get_attr") and not _WRITABLE.fullmatch(node.target):
            raise Untraceable(f"{node.target} is a name that cannot be written in code")
    code = traced.graph.python_code("self")
    namespace = dict(code.globals)
    where = f"<generated forward of {layer_class(block).__name__}>"
    try:
        exec(compile(code.src, where, "exec"), namespace)
    except SyntaxError as error:
        raise Untraceable("torch.fx cannot write down what it does") from error
    # The layers that absorb, what they absorb, and what was inlined.
    absorbing = [module for call in calls if call.absorbs for module in call.passed]
    bounds = [
        Read.of(module, name)
        for module in absorbing
        if isinstance(module, nn.ReLU6)
        for name in ("min_val", "max_val")
    ]
    passed = {id(module): module for module in (*absorbing, *traced.inside[1:])}
    holders = (*traced.touched, *(module for module in passed.values() if module._modules))
    holding = {id(module): module for module in holders}
    return Program(
        namespace["forward"],
        traced.arguments,
        traced.asked,
        kind,
        tuple(read.within(block) for read in (*traced.reads, *bounds)),
        tuple(
            (None if module is block else module, [*module._modules.items()])
            for module in holding.values()
        ),
        tuple((module, type(module)) for module in passed.values()),
    )
