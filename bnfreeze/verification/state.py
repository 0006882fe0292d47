"""A model, or a checkpoint, at one moment: what there is, and the values. Needs no torch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.verification.values import sha256

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# The selection of a snapshot of a checkpoint: exactly the tensors listed in it.
LISTED = "listed"
# The policies under which statistics move.
MOVING = ("none", "affine", "weights", "affine+weights")


class TensorFacts(NamedTuple):
    """One tensor under one name. Empty or None is what is not known, as of a checkpoint.

    Attributes:
        kind: ``"parameter"``, ``"buffer"``, ``"non-persistent buffer"`` or ``"attribute"``
            (a tensor that the module keeps as a plain attribute).
        dtype: such as ``"float32"``.
        shape: the sizes; of a DTensor the global ones.
        owner: the dotted name of the module that has it.
        first: the first name of this very tensor; another than its own for an alias.
        device: such as ``"cuda:0"``.
        requires_grad: its flag.
        has_grad: whether a ``.grad`` is there.
        optimized: whether it stands in an optimizer, by identity; None without an optimizer.
        placement: of a DTensor, how it is sharded; empty otherwise.
        unreadable: why its bits cannot be read; empty if they can.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    owner: str
    first: str
    device: str = "cpu"
    requires_grad: bool | None = None
    has_grad: bool = False
    optimized: bool | None = None
    placement: str = ""
    unreadable: str = ""


class OwnerFacts(NamedTuple):
    """A module that has some of the tensors.

    Attributes:
        kind: its class, with the module that defines it: ``torch.nn.modules.conv.Conv2d``; empty
            where it is not known, as of a checkpoint.
        policy: its policy, ``"frozen"`` for another library's frozen batch norm, ``"none"``.
        training: its training flag.
        mode_matters: whether the flag decides about the statistics. Otherwise it is free to
            change, as under the policies ``stats`` and ``affine``.
        remedy: of a foreign norm layer that is not frozen, what would freeze it.
        eps: of a norm layer, what it adds to the variance: no tensor, but its output depends on it.
    """

    kind: str = ""
    policy: str = ""
    training: bool = False
    mode_matters: bool = False
    remedy: str = ""
    eps: float | None = None

    @property
    def short_kind(self) -> str:
        """The class's own name."""
        return self.kind.rpartition(".")[2]

    @property
    def what_freezes_it(self) -> str:
        """What would freeze its statistics, too; empty if the usual remedy does."""
        keeping = self.policy not in ("none", "frozen")
        if self.remedy or not keeping:
            return self.remedy
        if self.policy in MOVING:
            return f"Use 'eval+{self.policy}' in place of '{self.policy}'."
        return f'Use freeze(model, "{self.policy}").'

    def woken_since(self, was: OwnerFacts) -> bool:
        """Whether it went from eval to train mode, and that matters."""
        matters = was.mode_matters and self.mode_matters
        return matters and self.training and not was.training


class Identity(NamedTuple):
    """Which object had a name, and its memory: known only in the process that saw it.

    Attributes:
        tensor: the tensor itself. It is kept alive, because an id could be given to another
            object, and torch.utils.swap_tensors refuses a tensor that is weakly referenced.
        pointer: the address of its storage.
        version: how often autograd saw it written in place; None for an inference tensor.
    """

    tensor: Tensor
    pointer: int = 0
    version: int | None = None


@dataclass(frozen=True, eq=False)
class State:
    """A model, or a checkpoint, at one moment.

    Attributes:
        selection: which tensors were asked for: ``"frozen"``, ``"norm"``, ``"all"`` or a pattern.
        tensors: by dotted name, in the model's order, every alias under its own name.
        owners: by dotted name, the modules that have these tensors.
        groups: the names that share storage, where there are several.
        values: the values of each readable tensor, by its first name.
        digests: their SHA-256 instead, by every name, if only these are kept.
        identities: by name, which object it was; empty for a state read from a file.
        optimizers: weak references to the optimizers that were given.
        taken: larger for each later state of a live model; 0 for one from a file.
    """

    selection: str
    tensors: Mapping[str, TensorFacts]
    owners: Mapping[str, OwnerFacts]
    groups: tuple[tuple[str, ...], ...] = ()
    values: Mapping[str, StoredTensor] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    identities: Mapping[str, Identity] = field(default_factory=dict)
    optimizers: tuple[weakref.ref[Optimizer], ...] = ()
    taken: int = 0

    def live_optimizers(self) -> list[Optimizer]:
        """The optimizers that still exist."""
        return [one for ref in self.optimizers if (one := ref()) is not None]

    def value(self, name: str) -> StoredTensor:
        """The values of the tensor under any of its names."""
        return self.values[self.tensors[name].first]

    def digest(self, name: str) -> str:
        """The SHA-256 of the tensor under this name; computed if only the values are known."""
        return self.digests.get(name) or sha256(name, self.value(name))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the values and not the objects, like a state from a file.
        return {**self.__dict__, "identities": {}, "optimizers": ()}
