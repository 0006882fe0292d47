"""What freezing writes down about a module: its policy, and what was there before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from bnfreeze.norm_layers import AFFINE, is_lookalike, is_norm, statistics_in
from bnfreeze.policies.policy import Policy

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
    _put(module, _RECORD, record)


def is_left_alone(module: nn.Module) -> bool:
    """Whether the last rule for the module was ``none``: it is not frozen on purpose."""
    return _LEFT_ALONE in module.__dict__


def mark_left_alone(module: nn.Module, alone: bool) -> None:
    """Note whether the rule for the module was ``none``."""
    _put(module, _LEFT_ALONE, alone or None)


def _put(module: nn.Module, key: str, value: object) -> None:
    if value is None:
        module.__dict__.pop(key, None)
    else:
        module.__dict__[key] = value


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
        names += [name for _, name in statistics_in(module)]
    if was_lookalike(module):
        names += [name for name in AFFINE if name in module._buffers]
    names += record.requires_grad if record else ()
    return tuple(
        name for name in dict.fromkeys(names) if isinstance(getattr(module, name, None), Tensor)
    )


def recorded(module: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """The module's own parameters that its policy freezes, each with the flag that it had."""
    record = record_of(module)
    return [
        (name, parameter, flag)
        for name, flag in (record.requires_grad.items() if record else ())
        if (parameter := module._parameters.get(name)) is not None
    ]


def policies_by_parameter(modules: Iterable[nn.Module]) -> dict[int, str]:
    """By identity of each parameter that a policy freezes, that policy."""
    return {id(p): policy_name(module) for module in modules for _, p, _ in recorded(module)}


def original_flags(modules: Iterable[nn.Module]) -> dict[nn.Parameter, bool]:
    """The requires_grad that each frozen parameter had before any freezing.

    A tied parameter has several records. If its layers were frozen one after another, the later
    record saw it frozen already; so it required a gradient if any record says so.
    """
    flags: dict[nn.Parameter, bool] = {}
    for module in modules:
        for _, parameter, flag in recorded(module):
            flags[parameter] = flag or flags.get(parameter, False)
    return flags


def policy_name(module: nn.Module) -> str:
    """The module's policy; ``"frozen"`` for another library's frozen layer, else ``"none"``."""
    if record := record_of(module):
        return str(record.policy)
    return "frozen" if is_lookalike(module) else "none"


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
