"""What is to become of each selected layer; checked for all of them before any is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bnfreeze.errors import PolicyError
from bnfreeze.freezing.ddp import refuse_freezing, refuse_thawing
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
    Record,
    class_changed_since,
    frozen_parameters,
    layer_class,
    record_of,
    was_lookalike,
)

__all__ = ["Change", "check_class", "plan"]


@dataclass(frozen=True)
class Change:
    """What is to become of one module.

    Attributes:
        entry: the module and its names.
        kind: the class that it gets.
        record: what is noted on it; None if it is only given back.
        held: its own parameters that are held, by their names in it.
        note: what a person should know about it.
    """

    entry: NamedModule
    kind: type[nn.Module]
    record: Record | None
    held: dict[str, nn.Parameter]
    note: str

    @property
    def module(self) -> nn.Module:
        """The module to change."""
        return self.entry.module


def plan(modules: Sequence[NamedModule], selected: Sequence[Selected]) -> list[Change]:
    """Check every selected layer; raise one PolicyError that names all which cannot be frozen."""
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
    refuse_freezing(modules, [(change.entry, list(change.held.values())) for change in changes])
    refuse_thawing(modules, [(change.entry, _given_back(change)) for change in changes])
    return changes


def _given_back(change: Change) -> list[nn.Parameter]:
    """What was held, and is not to be any more."""
    held = {id(parameter) for parameter in change.held.values()}
    return [p for p in frozen_parameters(change.module) if id(p) not in held]


def _original_flags(modules: Sequence[NamedModule]) -> dict[int, bool]:
    """By parameter identity, the requires_grad that it had before any freezing.

    A tied parameter stands in several modules; the first record that names it knows.
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
    held = {
        key: parameter
        for key, parameter in module._parameters.items()
        if parameter is not None
        and (Policy.WEIGHTS in policy or (norm and policy.freezes_affine and key in AFFINE))
    }
    if norm and not held and policy.freezes_affine and not was_lookalike(module):
        notes.append("has no weight or bias")
    if norm and not keeps_statistics(module):
        notes.append("keeps no running statistics")
    old = record_of(module)
    record = Record(
        policy=policy,
        training=old.training if old and old.policy.forces_eval else module.training,
        requires_grad={key: flags.get(id(p), p.requires_grad) for key, p in held.items()},
    )
    return Change(entry, kind, record, held, "; ".join(filter(None, notes)))


def check_class(entry: NamedModule) -> None:
    """Refuse a frozen layer whose class something else has changed since.

    Raises:
        PolicyError: which layer, and what it has become.
    """
    if class_changed_since(entry.module):
        raise PolicyError(
            f"{entry.name or 'The model'} was frozen, and something has changed its class to "
            f"{type(entry.module).__name__} since: undo that first (a parametrization, say)."
        )


def _check_promise(entry: NamedModule, policy: Policy) -> None:
    module, name = entry.module, entry.name or "The model"
    if is_lazy(module):
        raise PolicyError(
            f"{name} is a {type(module).__name__} that has not seen an input yet, so there is "
            f"nothing to hold: run one forward pass first."
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
            f"parametrization, say), which policy '{policy}' would not hold. Undo that first, "
            f"or hold them too: '{policy}+weights'."
        )


def _kind(name: str, module: nn.Module, policy: Policy) -> tuple[type[nn.Module], Policy, str]:
    """The class that the layer gets, the policy that this keeps, and what to say of it."""
    base, note = layer_class(module), ""
    if policy & (Policy.FUSED | Policy.FUSED_ACT):
        kind, why = fused_class(module, activations=Policy.FUSED_ACT in policy)
        if kind is not None:
            return kind, policy, ""
        if not was_lookalike(module):
            # The strongest policy that does not change what the layer computes.
            policy = policy & ~(Policy.FUSED | Policy.FUSED_ACT) | Policy.EVAL | Policy.AFFINE
            note = f"not fused: {why}"
    if was_lookalike(module):
        return base, policy, "frozen already, by its own class"
    try:
        return frozen_class(base, policy), policy, note
    except Exception as error:
        # A metaclass or an __init_subclass__ of the user's own may refuse a subclass.
        raise PolicyError(
            f"{name}: its class {base.__name__} does not let itself be subclassed "
            f"({type(error).__name__}: {error})."
        ) from error
