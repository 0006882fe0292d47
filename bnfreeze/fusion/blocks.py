"""The blocks of a model whose forward is generated, so that norm layers absorb what follows them.

A block stays the very object it was; as with a norm layer its class is swapped, here for one that
chooses anew at each call: the generated forward while all holds that it was made for, else the
block's own. Both compute the same, for in the block's own forward a frozen layer is no more than
that. So the block's own forward is what torch.compile, export and tracing see, and what runs once
a hook is put on a module that the generated one passes by, a submodule is replaced or an attribute
is set.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from bnfreeze.fusion.program import Programs
from bnfreeze.fusion.survey import Absorption, survey
from bnfreeze.norm_layers import NamedModule
from bnfreeze.policies.class_swap import Swapped, make_class
from bnfreeze.policies.record import layer_class

__all__ = ["PROGRAMS", "absorb_in", "release"]

# Where a block keeps its generated forwards.
PROGRAMS = "_bnfreeze_programs"


class _FusedBlock(Swapped):
    """Runs the block's generated forward wherever it may."""

    prefix: ClassVar[str] = "Fused"

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)  # tools look at its signature
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not kwargs and not torch.compiler.is_compiling():
                run = _choose(self, args)
                if run is not None:
                    return run(self, *args)
            # As it is now: it may be set on the class.
            return base.forward(self, *args, **kwargs)

        return {"forward": forward}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if PROGRAMS in self.__dict__ and self.__dict__[PROGRAMS] is None:
            # It comes out of a file. Where that goes wrong (of modules that refer to each other,
            # one is read first), the block's own forward will do.
            self.__dict__[PROGRAMS] = Programs()
            with contextlib.suppress(Exception):
                found = {id(block): programs for block, programs in survey(self).programs}
                self.__dict__[PROGRAMS] = found[id(self)]


def _choose(block: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The generated forward that may run on these arguments, here and now."""
    if torch._C._get_tracing_state() is not None or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    for program in block.__dict__.get(PROGRAMS) or ():
        if program.takes(args):
            return program.run if program.holds(block) else None
    return None


def absorb_in(modules: Sequence[NamedModule]) -> dict[int, Absorption]:
    """Generate the forward of every block of a model in which a norm layer can absorb something.

    Args:
        modules: all of the model's, the first one being the model; none has such a forward yet.

    Returns:
        By identity of each norm layer under the policy ``fused-act`` what it absorbs.
    """
    found = survey(modules[0].module)
    for block, programs in found.programs:
        block.__class__ = make_class(layer_class(block), _FusedBlock)
        block.__dict__[PROGRAMS] = programs
    return found.layers


def release(modules: Sequence[NamedModule]) -> None:
    """Give every block its own forward back."""
    for entry in modules:
        if issubclass(type(entry.module), _FusedBlock):
            entry.module.__dict__.pop(PROGRAMS, None)
            # Where something else has derived a class from ours, it has no more to choose from.
            entry.module.__class__ = layer_class(entry.module)
