"""Decides what each selected layer becomes, and checks them all before any is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bnfreeze.errors import PolicyError
from bnfreeze.freezing.ddp import refuse_freezing, refuse_thawing, wrappers_around
from bnfreeze.freezing.rules import Selected
from bnfreeze.norm_layers import (
    AFFINE,
    NamedModule,
    computed_affine,
    is_lazy,
    is_norm,
    keeps_statistics,
)
from bnfreeze.policies.choice import frozen_class
from bnfreeze.policies.fused import fused_class
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import (
    FreezeRecord,
    class_changed_since,
    frozen_parameters,
    layer_class,
    record_of,
    was_lookalike,
)

__all__ = ["Change", "check_class", "plan"]


@dataclass(frozen=True)
class Change:
    """What one module becomes.

    Attributes:
        entry: the module and its names.
        kind: the class that it gets.
        record: what is stored on it; None if it is only restored.
        frozen: its own parameters that are frozen, by their names in it.
        note: what a person should know about it.
    """

    entry: NamedModule
    kind: type[nn.Module]
    record: FreezeRecord | None
    frozen: dict[str, nn.Parameter]
    note: str

    @property
    def module(self) -> nn.Module:
        """The module to change."""
        return self.entry.module


def plan(modules: Sequence[NamedModule], selected: Sequence[Selected]) -> list[Change]:
    """Check every selected layer.

    Raises:
        PolicyError: names all layers that cannot be frozen so.
    """
    flags = _original_flags(modules)
    changes: list[Change] = []
    problems: list[str] = []
    for choice in selected:
        try:
            changes.append(_plan_one(choice, flags))
        except PolicyError as error:
            problems.append(str(error))
    if problems:
        more = f"\n… and {len(problems) - 5} more layers." if len(problems) > 5 else ""
        raise PolicyError("\n".join(problems[:5]) + more)
    frozen = [(change.entry, list(change.frozen.values())) for change in changes]
    thawed = [(change.entry, _thawed(change)) for change in changes]
    stops = any(p.requires_grad for _, parameters in frozen for p in parameters)
    starts = any(not p.requires_grad for _, parameters in thawed for p in parameters)
    if stops or starts:
        wrappers = wrappers_around(modules)
        refuse_freezing(wrappers, frozen)
        refuse_thawing(wrappers, thawed)
    return changes


def _thawed(change: Change) -> list[nn.Parameter]:
    """The parameters that were frozen, and will train again."""
    frozen = {id(parameter) for parameter in change.frozen.values()}
    return [p for p in frozen_parameters(change.module) if id(p) not in frozen]


def _original_flags(modules: Sequence[NamedModule]) -> dict[int, bool]:
    """By identity of each frozen parameter, the requires_grad that it had before any freezing.

    A tied parameter is in several modules; the first record that names it counts.
    """
    flags: dict[int, bool] = {}
    for entry in modules:
        record = record_of(entry.module)
        for name, flag in record.requires_grad.items() if record else ():
            parameter = entry.module._parameters.get(name)
            if parameter is not None:
                flags.setdefault(id(parameter), flag)
    return flags


def _plan_one(choice: Selected, flags: Mapping[int, bool]) -> Change:
    entry, policy = choice.entry, choice.policy
    module, name = entry.module, entry.name or "The model"
    check_class(entry)
    norm, base = is_norm(module), layer_class(module)
    if not policy:
        return Change(entry, base, None, {}, "")
    notes = ["also " + ", ".join(entry.names[1:])] if len(entry.names) > 1 else []
    if not norm:
        policy = Policy.WEIGHTS
    _check_promise(entry, policy)
    kind = base
    if norm:
        kind, policy, note = _kind(name, module, policy)
        notes.append(note)
    frozen = {
        key: parameter
        for key, parameter in module._parameters.items()
        if parameter is not None
        and (Policy.WEIGHTS in policy or (norm and policy.freezes_affine and key in AFFINE))
    }
    if norm and not frozen and policy.freezes_affine and not was_lookalike(module):
        notes.append("has no weight or bias")
    if norm and not keeps_statistics(module):
        notes.append("keeps no running statistics")
    old = record_of(module)
    record = FreezeRecord(
        policy=policy,
        training=old.training if old and old.policy.forces_eval else module.training,
        requires_grad={key: flags.get(id(p), p.requires_grad) for key, p in frozen.items()},
    )
    return Change(entry, kind, record, frozen, "; ".join(filter(None, notes)))


def check_class(entry: NamedModule) -> None:
    """Refuse a frozen layer whose class was changed by something else.

    Raises:
        PolicyError: names the layer and its new class.
    """
    if class_changed_since(entry.module):
        raise PolicyError(
            f"{entry.name or 'The model'} was frozen, and then something else changed its class "
            f"to {type(entry.module).__name__} (a parametrization does that). Undo that first."
        )


def _check_promise(entry: NamedModule, policy: Policy) -> None:
    module, name = entry.module, entry.name or "The model"
    if is_lazy(module):
        raise PolicyError(
            f"{name} is a {type(module).__name__} that has not seen an input yet, so there is "
            f"nothing to freeze: run one forward pass first."
        )
    if policy.forces_eval and is_norm(module) and not keeps_statistics(module):
        raise PolicyError(
            f"{name} was built with track_running_stats=False: it has no running statistics to "
            f"normalise with, so policy '{policy}' cannot be kept. Leave it out"
            + (f" with the rule {{{entry.name!r}: 'none'}}" if entry.name else "")
            + ", or build it with track_running_stats=True."
        )
    computed = computed_affine(module) if is_norm(module) else []
    if computed and policy.freezes_affine and Policy.WEIGHTS not in policy:
        raise PolicyError(
            f"{name}: its {' and '.join(computed)} is computed from other parameters (by a "
            f"parametrization or by pruning), which policy '{policy}' does not freeze. Undo that "
            f"first, or freeze them too: '{policy}+weights'."
        )


def _kind(name: str, module: nn.Module, policy: Policy) -> tuple[type[nn.Module], Policy, str]:
    """The class that the layer gets, the policy that it then follows, and a note."""
    base, note = layer_class(module), ""
    if Policy.FUSED in policy:
        kind, why = fused_class(module, activations=Policy.FUSED_ACT in policy)
        if kind is not None:
            return kind, policy, ""
        if not was_lookalike(module):
            # The strongest policy that does not change what the layer computes.
            policy = policy & Policy.WEIGHTS | Policy.EVAL | Policy.AFFINE
            note = f"not fused: {why}"
    if was_lookalike(module):
        return base, policy, "frozen already, by its own class"
    try:
        return frozen_class(base, policy), policy, note
    except Exception as error:
        # A metaclass or an __init_subclass__ of the user's own may refuse a subclass.
        raise PolicyError(
            f"{name}: its class {base.__name__} cannot be subclassed "
            f"({type(error).__name__}: {error})."
        ) from error
