"""What DistributedDataParallel, where it wraps a model already, does not let be changed.

It settles which gradients it averages over the ranks when it is made, by requires_grad. For one of
these that no longer comes it waits; one that comes later it leaves as it is on each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfreeze.errors import PolicyError
from bnfreeze.norm_layers import NamedModule
from bnfreeze.torch_private import averaged_parameters

__all__ = ["Owned", "refuse_freezing", "refuse_thawing"]

# A module, and some of its own parameters.
Owned: TypeAlias = tuple[NamedModule, list[nn.Parameter]]


def refuse_freezing(modules: Sequence[NamedModule], held: Iterable[Owned]) -> None:
    """Refuse to hold parameters for whose gradients a wrapper would wait.

    Raises:
        PolicyError: which module's.
    """
    for ddp, entry, parameters in _wrapped(modules, held):
        if not ddp.find_unused_parameters and any(p.requires_grad for p in parameters):
            raise PolicyError(
                f"{entry.name}: its weights cannot be held any more, because "
                f"DistributedDataParallel, which wraps it already, would wait for their "
                f"gradients. Freeze first and wrap then, or wrap with "
                f"find_unused_parameters=True."
            )


def refuse_thawing(modules: Sequence[NamedModule], back: Iterable[Owned]) -> None:
    """Refuse to let parameters train again whose gradients a wrapper would not average.

    Raises:
        PolicyError: which module's.
    """
    averaged: dict[int, set[int]] = {}
    for ddp, entry, parameters in _wrapped(modules, back):
        averaged.setdefault(id(ddp), _averaged(ddp))
        if any(id(p) not in averaged[id(ddp)] for p in parameters if not p.requires_grad):
            raise PolicyError(
                f"{entry.name}: its weights cannot train again, because "
                f"DistributedDataParallel, which wraps it already, would not average their "
                f"gradients over the ranks. Unfreeze its .module and wrap that anew."
            )


def _wrapped(
    modules: Sequence[NamedModule], owned: Iterable[Owned]
) -> Iterator[tuple[DistributedDataParallel, NamedModule, list[nn.Parameter]]]:
    """Each wrapper among the modules, with each of those inside it."""
    wrappers = [e.module for e in modules if isinstance(e.module, DistributedDataParallel)]
    chosen = list(owned) if wrappers else []
    for ddp in wrappers:
        inside = {id(module) for module in ddp.modules()}
        yield from ((ddp, entry, own) for entry, own in chosen if id(entry.module) in inside)


def _averaged(ddp: DistributedDataParallel) -> set[int]:
    """By identity, the parameters whose gradients it averages, and those it was told to leave."""
    left = ddp.parameters_to_ignore
    return averaged_parameters(ddp) | {
        id(p) for name, p in ddp.module.named_parameters() if name in left
    }
