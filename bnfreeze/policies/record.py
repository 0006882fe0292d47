"""What freezing writes down about a module: its policy, and what was there before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from bnfreeze.norm_layers import AFFINE, STATISTICS, computed_affine, is_lookalike, is_norm
from bnfreeze.policies.policy import Policy

__all__ = [
    "FreezeRecord",
    "class_changed_since",
    "frozen_by",
    "frozen_names",
    "frozen_parameters",
    "is_left_alone",
    "layer_class",
    "mark_left_alone",
    "policy_name",
    "record_of",
    "set_record",
    "was_lookalike",
]

_RECORD = "_bnfreeze"
_LEFT_ALONE = "_bnfreeze_left_alone"


@dataclass(frozen=True)
class FreezeRecord:
    """A module's policy, and what was there before.

    Attributes:
        policy: the policy that the module is frozen by.
        training: the mode last asked for by ``train()`` or ``eval()``.
        requires_grad: the flag that each frozen parameter had, by its name in the module.
        traceable: full names of classes and packages that may be traced besides known ones.
    """

    policy: Policy
    training: bool
    requires_grad: dict[str, bool]
    traceable: tuple[str, ...] = ()


def record_of(module: nn.Module) -> FreezeRecord | None:
    """The module's record, or None if it is not frozen."""
    return cast("FreezeRecord | None", module.__dict__.get(_RECORD))


def set_record(module: nn.Module, record: FreezeRecord | None) -> None:
    """Put a record on the module, or take it off."""
    if record is None:
        module.__dict__.pop(_RECORD, None)
    else:
        module.__dict__[_RECORD] = record


def is_left_alone(module: nn.Module) -> bool:
    """Whether the last rule for the module was ``none``: it is not frozen on purpose."""
    return _LEFT_ALONE in module.__dict__


def mark_left_alone(module: nn.Module, alone: bool) -> None:
    """Note whether the rule for the module was ``none``."""
    if alone:
        module.__dict__[_LEFT_ALONE] = True
    else:
        module.__dict__.pop(_LEFT_ALONE, None)


def layer_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was frozen."""
    kind = type(module)
    # Its own dict: a class that something else derived from ours is not ours.
    return cast("type[nn.Module]", kind.__dict__.get("_bnfreeze_base", kind))


def frozen_names(module: nn.Module) -> tuple[str, ...]:
    """The module's own tensors that are promised not to change, by their names in it.

    For a module that bnfreeze froze: the tensors that its policy freezes. For another library's
    frozen batch norm: its statistics, and its weight and bias if they are buffers.
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
    """The module's own parameters that freezing froze: they required a gradient before."""
    record = record_of(module)
    return [
        parameter
        for name, flag in (record.requires_grad.items() if record else ())
        if flag and (parameter := module._parameters.get(name)) is not None
    ]


def policy_name(module: nn.Module) -> str:
    """The module's policy; ``"frozen"`` for another library's frozen layer, else ``"none"``."""
    record = record_of(module)
    if record is not None:
        return str(record.policy)
    return "frozen" if is_lookalike(module) else "none"


def frozen_by(module: nn.Module) -> Literal["bnfreeze", "class", "requires_grad"] | None:
    """Who froze the module, or a part of it.

    Returns:
        ``"bnfreeze"`` if `bnfreeze.freeze` did; ``"class"`` for a frozen batch norm of another
        library, or a `FrozenBatchNorm1d/2d/3d` built directly; ``"requires_grad"`` for a norm
        layer whose weight and bias have ``requires_grad=False``, set by hand (its statistics are
        not frozen by that); None if nothing of it is frozen.
    """
    if record_of(module) is not None:
        return "bnfreeze"
    if is_lookalike(module):
        return "class"
    if not is_norm(module):
        return None
    own = [p for name in AFFINE if (p := module._parameters.get(name)) is not None]
    parameters = list(module.parameters()) if computed_affine(module) else own
    by_hand = bool(parameters) and not any(p.requires_grad for p in parameters)
    return "requires_grad" if by_hand else None


def was_lookalike(module: nn.Module) -> bool:
    """Whether the module is, or was before freezing, another library's frozen batch norm."""
    return is_lookalike(module, layer_class(module))


def class_changed_since(module: nn.Module) -> bool:
    """Whether something else changed the class of a frozen layer (a parametrization does)."""
    if record_of(module) is None or layer_class(module) is not type(module):
        return False
    # Either a class derived from one that freezing made, or a live class in its place.
    derived = any("_bnfreeze_base" in kind.__dict__ for kind in type(module).__mro__)
    return derived or (is_norm(module) and not is_lookalike(module))
