"""A model, or a checkpoint, at one instant: facts and values. Needs no torch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.verification.facts import Facts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["Identity", "State"]


class Identity(NamedTuple):
    """Which object had a name, and its memory: known only in the process that saw it.

    Attributes:
        tensor: the tensor itself. It is kept alive, because an id could be given to another
            object, and torch.utils.swap_tensors refuses a tensor that is weakly referenced.
        pointer: the address of its storage.
        version: how often autograd saw it written in place; None for an inference tensor.
    """

    tensor: Tensor
    pointer: int
    version: int | None


@dataclass(frozen=True, eq=False)
class State:
    """A model, or a checkpoint, at one instant.

    Attributes:
        facts: what there is, besides values.
        values: the values of each readable tensor, by its first name.
        digests: their SHA-256 instead, by every name, if only these are kept.
        identities: by name, which object it was; empty for a state read from a file.
        optimizers: weak references to the optimizers that were given.
    """

    facts: Facts
    values: Mapping[str, StoredTensor] = field(repr=False)
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    identities: Mapping[str, Identity] = field(default_factory=dict, repr=False)
    optimizers: tuple[weakref.ref[Optimizer], ...] = field(default=(), repr=False)

    def live_optimizers(self) -> list[Optimizer]:
        """The optimizers that still exist."""
        return [one for ref in self.optimizers if (one := ref()) is not None]

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the values and not the objects, like a state from a file.
        return {**self.__dict__, "identities": {}, "optimizers": ()}
