"""What DistributedDataParallel does not allow to change once it wraps a model.

When it is built, it decides by requires_grad which gradients it averages over the ranks. If one of
these never comes, it waits for it; a gradient that is new stays different on each rank.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bnfreeze.errors import PolicyError
from bnfreeze.norm_layers import NamedModule
from bnfreeze.torch_private import averaged_parameters


def _wrappers(modules: Sequence[NamedModule], around: bool) -> list[DistributedDataParallel]:
    """The wrappers among a model's own modules; if there is none, those that wrap it from outside.

    A wrapped module does not know its wrapper: nothing on the module or on its parameters says so.
    So all objects of the process are searched (about 0.1 s for a million objects), and only in a
    process that takes part in a process group.
    """
    found = [e.module for e in modules if isinstance(e.module, DistributedDataParallel)]
    if around and not found and distributed.is_available() and distributed.is_initialized():
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


def refuse_wrapped(modules: Sequence[NamedModule], trained: Collection[int], around: bool) -> None:
    """Refuse to stop gradients that a wrapper waits for, and to start those it does not average.

    Args:
        modules: all of the model's, changed already.
        trained: the ``id`` of each parameter that required a gradient before.
        around: whether wrappers count that are not among the modules, but wrap the model.

    Raises:
        PolicyError: names the module.
    """
    flipped = [
        (entry.name, parameter)
        for entry in modules
        for parameter in entry.module._parameters.values()
        if parameter is not None and parameter.requires_grad is not (id(parameter) in trained)
    ]
    for ddp in _wrappers(modules, around) if flipped else ():
        averaged = averaged_parameters(ddp)
        ignored = ddp.parameters_to_ignore  # which the user told the wrapper
        others = {id(p) for n, p in ddp.module.named_parameters() if n not in ignored} - averaged
        for name, parameter in flipped:
            if parameter.requires_grad and id(parameter) in others:
                raise PolicyError(
                    f"{name}: its weight and bias cannot train again, because "
                    f"DistributedDataParallel wraps the model already and would not average their "
                    f"gradients over the ranks. Call unfreeze(ddp.module), then wrap it again."
                )
            waits = id(parameter) in averaged and not ddp.find_unused_parameters
            if waits and not parameter.requires_grad:
                raise PolicyError(
                    f"{name}: its weight and bias cannot be frozen any more, because "
                    f"DistributedDataParallel wraps the model already and would wait for their "
                    f"gradients. Freeze first, then wrap; or wrap with find_unused_parameters=True."
                )
