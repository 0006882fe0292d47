"""What DistributedDataParallel does not allow to change once it wraps a model.

When it is built, it decides by requires_grad which gradients it averages over the ranks. If one of
these never comes, it waits for it; a gradient that is new stays different on each rank.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bnfreeze.errors import PolicyError
from bnfreeze.norm_layers import NamedModule
from bnfreeze.torch_private import averaged_parameters

__all__ = ["Owned", "refuse_freezing", "refuse_thawing", "wrappers_around", "wrappers_in"]

# A module, and some of its own parameters.
Owned: TypeAlias = tuple[NamedModule, list[nn.Parameter]]


def wrappers_in(modules: Sequence[NamedModule]) -> list[DistributedDataParallel]:
    """The wrappers among a model's own modules."""
    return [e.module for e in modules if isinstance(e.module, DistributedDataParallel)]


def wrappers_around(modules: Sequence[NamedModule]) -> list[DistributedDataParallel]:
    """The wrappers among a model's own modules; if there is none, those that wrap it from outside.

    A wrapped module does not know its wrapper: nothing on the module or on its parameters says so.
    So all objects of the process are searched (about 0.1 s for a million objects), and only in a
    process that takes part in a process group.
    """
    found = wrappers_in(modules)
    if not found and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a wrapper that the user has dropped may still wait for the collector
        inside = {id(entry.module) for entry in modules}
        found = [
            thing
            for thing in gc.get_objects()
            # By its type: isinstance would run code of objects that only pretend to have a class.
            if DistributedDataParallel in type(thing).__mro__
            and any(id(module) in inside for module in thing.modules())
        ]
    return found


def refuse_freezing(wrappers: Iterable[DistributedDataParallel], frozen: Sequence[Owned]) -> None:
    """Refuse to freeze parameters whose gradients a wrapper would wait for.

    Raises:
        PolicyError: names the module.
    """
    for ddp in wrappers:
        if ddp.find_unused_parameters:
            continue
        averaged = averaged_parameters(ddp)
        for entry, parameters in _inside(ddp, frozen):
            if any(p.requires_grad and id(p) in averaged for p in parameters):
                raise PolicyError(
                    f"{entry.name}: its weight and bias cannot be frozen any more, because "
                    f"DistributedDataParallel wraps the model already and would wait for their "
                    f"gradients. Freeze first, then wrap; or wrap with find_unused_parameters=True."
                )


def refuse_thawing(wrappers: Iterable[DistributedDataParallel], back: Sequence[Owned]) -> None:
    """Refuse to let parameters train again whose gradients a wrapper would not average.

    Raises:
        PolicyError: names the module.
    """
    for ddp in wrappers:
        ignored = ddp.parameters_to_ignore  # which the user told the wrapper
        known = averaged_parameters(ddp)
        known |= {id(p) for name, p in ddp.module.named_parameters() if name in ignored}
        for entry, parameters in _inside(ddp, back):
            if any(id(p) not in known for p in parameters if not p.requires_grad):
                raise PolicyError(
                    f"{entry.name}: its weight and bias cannot train again, because "
                    f"DistributedDataParallel wraps the model already and would not average their "
                    f"gradients over the ranks. Call unfreeze(ddp.module), then wrap it again."
                )


def _inside(ddp: DistributedDataParallel, owned: Sequence[Owned]) -> Iterator[Owned]:
    modules = {id(module) for module in ddp.modules()}
    return (pair for pair in owned if id(pair[0].module) in modules)
