"""What is known of a model besides its values: plain data, written to a file as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["LISTED", "Facts", "OwnerFacts", "TensorFacts"]

# The selection of a snapshot of a checkpoint: exactly the tensors listed in it.
LISTED = "listed"


class TensorFacts(NamedTuple):
    """One tensor under one name.

    Attributes:
        kind: ``"parameter"``, ``"buffer"``, ``"non-persistent buffer"`` or ``"attribute"``
            (a tensor that the module keeps as a plain attribute); empty where it is not known.
        dtype: such as ``"float32"``.
        shape: the sizes; of a DTensor the global ones.
        device: such as ``"cuda:0"``.
        requires_grad: its flag; None where it is not known.
        has_grad: whether a ``.grad`` is there.
        optimized: whether it stands in an optimizer, by identity; None where none is known.
        owner: the dotted name of the module that has it.
        first: the first name of this very tensor; another than its own for an alias.
        placement: of a DTensor, how it is sharded; empty otherwise.
        unreadable: why its bits cannot be read; empty if they can.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    requires_grad: bool | None
    has_grad: bool
    optimized: bool | None
    owner: str
    first: str
    placement: str = ""
    unreadable: str = ""


class OwnerFacts(NamedTuple):
    """A module that has some of the tensors.

    Attributes:
        kind: its class, with the module that defines it: ``torch.nn.modules.conv.Conv2d``; empty
            where it is not known.
        policy: its policy, ``"frozen"`` for another library's frozen batch norm, ``"none"``;
            empty where it is not known.
        mode: ``"train"`` or ``"eval"`` if that decides about the statistics; empty if the mode
            is free to change, as under the policies ``stats`` and ``affine``.
        training: its training flag; None where it is not known.
        counts: whether it counts batches in training mode; an instance norm does not.
        momentum: its momentum, if it has one.
        parametrized: whether torch.nn.utils.parametrize has changed it.
    """

    kind: str
    policy: str
    mode: str
    training: bool | None = None
    counts: bool = True
    momentum: float | None = None
    parametrized: bool = False

    @property
    def short_kind(self) -> str:
        """The class's own name."""
        return self.kind.rpartition(".")[2]


@dataclass(frozen=True)
class Facts:
    """All that is known of a model besides its values.

    Attributes:
        selection: which tensors were asked for: ``"frozen"``, ``"norm"``, ``"all"`` or a pattern.
        tensors: by dotted name, in the model's order, every alias under its own name.
        owners: by dotted name, the modules that have these tensors.
        groups: the names that share storage, where there are several.
    """

    selection: str
    tensors: Mapping[str, TensorFacts]
    owners: Mapping[str, OwnerFacts]
    groups: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data."""
        return {
            "selection": self.selection,
            "tensors": {name: facts._asdict() for name, facts in self.tensors.items()},
            "owners": {name: facts._asdict() for name, facts in self.owners.items()},
            "groups": self.groups,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Facts:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, OverflowError, AttributeError: it is something else.
        """
        tensors = {
            name: TensorFacts(**{**fields, "shape": tuple(map(int, fields["shape"]))})
            for name, fields in data["tensors"].items()
        }
        owners = {name: OwnerFacts(**fields) for name, fields in data["owners"].items()}
        texts = [text for facts in owners.values() for text in facts[:3]]
        for facts in tensors.values():
            texts += [facts.kind, facts.dtype, facts.device, facts.owner, facts.first]
            texts += [facts.placement, facts.unreadable]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name in it is not text")
        groups = tuple(tuple(map(str, group)) for group in data["groups"])
        known = all(f.first in tensors and f.owner in owners for f in tensors.values())
        if not (tensors and known and all(name in tensors for group in groups for name in group)):
            raise ValueError("the names in it do not fit together")
        return cls(str(data["selection"]), tensors, owners, groups)
