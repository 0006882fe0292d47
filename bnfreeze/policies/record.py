"""What freezing notes on a module: the policy that holds it, and what was there before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from bnfreeze.norm_layers import AFFINE, STATISTICS, is_lookalike, is_norm
from bnfreeze.policies.policy import Policy

__all__ = [
    "Record",
    "class_changed_since",
    "frozen_names",
    "frozen_parameters",
    "layer_class",
    "policy_name",
    "record_of",
    "set_record",
    "was_lookalike",
]

_RECORD = "_bnfreeze"


@dataclass(frozen=True)
class Record:
    """What freezing noted on a module: the policy, and what was there before.

    Attributes:
        policy: the policy that holds the module.
        training: the mode last asked for by ``train()`` or ``eval()``.
        requires_grad: the flag that each held parameter had, by its name in the module.
        traceable: full names of classes and packages that may be traced besides known ones.
    """

    policy: Policy
    training: bool
    requires_grad: dict[str, bool]
    traceable: tuple[str, ...] = ()


def record_of(module: nn.Module) -> Record | None:
    """The module's record, or None if it is not frozen."""
    return cast("Record | None", module.__dict__.get(_RECORD))


def set_record(module: nn.Module, record: Record | None) -> None:
    """Put a record on the module, or take it off."""
    if record is None:
        module.__dict__.pop(_RECORD, None)
    else:
        module.__dict__[_RECORD] = record


def layer_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was frozen."""
    kind = type(module)
    # Its own dict: a class that something else derived from ours is not ours.
    return cast("type[nn.Module]", kind.__dict__.get("_bnfreeze_base", kind))


def frozen_names(module: nn.Module) -> tuple[str, ...]:
    """The module's own tensors that are promised not to change, by their names in it.

    Of a frozen module those that its policy holds; of another library's frozen batch norm its
    statistics, and its weight and bias where these cannot train either.
    """
    record = record_of(module)
    policy = record.policy if record else Policy.NONE
    names: list[str] = []
    if is_norm(module) and (policy.freezes_statistics or was_lookalike(module)):
        names += STATISTICS
    if was_lookalike(module):
        names += [name for name in AFFINE if name in module._buffers]
    names += record.requires_grad if record else ()
    return tuple(
        name for name in dict.fromkeys(names) if isinstance(getattr(module, name, None), Tensor)
    )


def frozen_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The module's own parameters that are held, and trained before."""
    record = record_of(module)
    return [
        parameter
        for name, flag in (record.requires_grad.items() if record else ())
        if flag and (parameter := module._parameters.get(name)) is not None
    ]


def policy_name(module: nn.Module) -> str:
    """The policy that holds the module; ``"frozen"`` for another library's frozen layer."""
    record = record_of(module)
    if record is not None:
        return str(record.policy)
    return "frozen" if is_lookalike(module) else "none"


def was_lookalike(module: nn.Module) -> bool:
    """Whether the module is, or was before freezing, another library's frozen batch norm."""
    return is_lookalike(module, layer_class(module))


def class_changed_since(module: nn.Module) -> bool:
    """Whether a frozen norm layer has been given yet another class since (a parametrization)."""
    if record_of(module) is None or layer_class(module) is not type(module):
        return False
    # A class derived from one that freezing had made; or a live one in its place.
    derived = any("_bnfreeze_base" in kind.__dict__ for kind in type(module).__mro__)
    return derived or (is_norm(module) and not is_lookalike(module))
