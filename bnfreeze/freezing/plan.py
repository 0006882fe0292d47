"""Decides what each selected layer becomes, and checks them all before any is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bnfreeze.errors import PolicyError
from bnfreeze.freezing.rules import eligible
from bnfreeze.norm_layers import (
    NamedModule,
    affine_parameters,
    computed_affine,
    has_known_forward,
    has_replaced_forward,
    is_in_graph,
    is_lazy,
    is_norm,
    keeps_statistics,
)
from bnfreeze.policies.class_swap import FrozenLayer, make_class
from bnfreeze.policies.eval import ForceEval, ForceEvalInstance, ForceEvalOnCopies
from bnfreeze.policies.fused import fused_class
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import (
    FreezeRecord,
    class_changed_since,
    layer_class,
    original_flags,
    record_of,
    was_lookalike,
)
from bnfreeze.policies.stats import BatchOnly, OnCopies
from bnfreeze.torch_private import _BatchNorm, _InstanceNorm


@dataclass(frozen=True)
class Change:
    """What one module becomes.

    Attributes:
        entry: the module and its names.
        kind: the class that it gets.
        record: what is stored on it; None if it is only restored.
        note: what a person should know about it.
    """

    entry: NamedModule
    kind: type[nn.Module]
    record: FreezeRecord | None
    note: str = ""


def plan(
    modules: Sequence[NamedModule],
    policies: Sequence[tuple[NamedModule, Policy]],
    traceable: tuple[str, ...] = (),
) -> list[Change]:
    """Check every layer that gets a policy.

    A module whose policy is ``none`` keeps what it has. One that an earlier call froze, and of
    which its new policy freezes nothing, will be restored.

    Args:
        modules: all of the model's.
        policies: of some of them.
        traceable: full names of classes and packages that may be traced besides known ones.

    Raises:
        PolicyError: names all layers that cannot be frozen so.
    """
    flags = original_flags(entry.module for entry in modules)
    changes: list[Change] = []
    problems: list[str] = []
    for entry, policy in policies:
        if not policy:
            continue
        try:
            if eligible(entry.module, policy):
                changes.append(_plan_one(entry, policy, flags, traceable))
            elif record_of(entry.module) is not None:
                changes.append(restoring(entry))
        except PolicyError as error:
            problems.append(str(error))
    if problems:
        more = f"\n… and {len(problems) - 5} more layers." if len(problems) > 5 else ""
        raise PolicyError("\n".join(problems[:5]) + more)
    return changes


def restoring(entry: NamedModule) -> Change:
    """What gives a frozen module its original state back.

    Raises:
        PolicyError: something else has changed its class.
    """
    _check_class(entry)
    return Change(entry, layer_class(entry.module), None)


def _plan_one(
    entry: NamedModule,
    policy: Policy,
    flags: Mapping[nn.Parameter, bool],
    traceable: tuple[str, ...],
) -> Change:
    module, name = entry.module, entry.name or "The model"
    _check_class(entry)
    norm, kind = is_norm(module), layer_class(module)
    notes = ["also " + ", ".join(entry.names[1:])] if len(entry.names) > 1 else []
    if not norm:
        policy = Policy.WEIGHTS
    _check_promise(entry, policy)
    if norm:
        try:
            kind, policy, note = _frozen_class(module, policy)
        except Exception as error:
            # A metaclass or an __init_subclass__ of the user's own may refuse a subclass.
            raise PolicyError(
                f"{name}: its class {kind.__name__} cannot be subclassed "
                f"({type(error).__name__}: {error})."
            ) from error
        notes.append(note)
    wanted: Mapping[str, nn.Parameter | None] = {}
    if Policy.WEIGHTS in policy:
        wanted = module._parameters
    elif policy.freezes_affine:
        wanted = affine_parameters(module)
    frozen = {key: parameter for key, parameter in wanted.items() if parameter is not None}
    lookalike = norm and was_lookalike(module)
    if norm and not frozen and policy.freezes_affine and not lookalike:
        outside = " and ".join(computed_affine(module))
        notes.append(
            f"{outside} are set from outside the layer" if outside else "has no weight or bias"
        )
    if norm and not keeps_statistics(module):
        notes.append("keeps no running statistics")
    old, record = record_of(module), None
    # The class of a look-alike freezes all of it already, unless it has parameters.
    if frozen or not lookalike or kind is not layer_class(module):
        record = FreezeRecord(
            policy=policy,
            training=old.training if old and old.policy.forces_eval else module.training,
            requires_grad={key: flags.get(p, p.requires_grad) for key, p in frozen.items()},
            traceable=traceable if Policy.FUSED_ACT in policy else (),
        )
    return Change(entry, kind, record, "; ".join(filter(None, notes)))


def _frozen_class(module: nn.Module, policy: Policy) -> tuple[type[nn.Module], Policy, str]:
    """The class that a norm layer gets, the policy that it then follows, and a note."""
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
    known = has_known_forward(module, base) and base.train is nn.Module.train
    behaviour: type[FrozenLayer] = FrozenLayer
    if policy.forces_eval and issubclass(base, _InstanceNorm):
        behaviour = ForceEvalInstance
    elif policy.forces_eval:
        behaviour = ForceEval if known else ForceEvalOnCopies
    elif policy.freezes_statistics:
        behaviour = BatchOnly if known and base.forward is _BatchNorm.forward else OnCopies
    return make_class(base, behaviour), policy, note


def _check_class(entry: NamedModule) -> None:
    if class_changed_since(entry.module):
        raise PolicyError(
            f"{entry.name or 'The model'} was frozen, and then something else changed its class "
            f"to {type(entry.module).__name__} (a parametrization does that). Undo that first."
        )


def _check_promise(entry: NamedModule, policy: Policy) -> None:
    module, name = entry.module, entry.name or "The model"
    rule = f" with the rule {{{entry.name!r}: 'none'}}" if entry.name else ""
    if isinstance(module, torch.jit.ScriptModule):
        raise PolicyError(
            f"{name} is a TorchScript module, whose layers are compiled and cannot be "
            f"changed: freeze the original module before you script it, or leave this one out "
            f"with {{{entry.name!r}: 'none'}} as the last rule."
        )
    if is_lazy(module):
        raise PolicyError(
            f"{name} is a {type(module).__name__} that has not seen an input yet, and its first "
            f"forward changes its class: run one forward pass first, in eval mode."
        )
    if policy.forces_eval and is_norm(module) and not keeps_statistics(module):
        raise PolicyError(
            f"{name} has no running statistics to normalise with (track_running_stats=False, or "
            f"they were set to None), so policy '{policy}' cannot be kept. Leave it out{rule}, or "
            f"build it with track_running_stats=True."
        )
    if is_norm(module) and policy.freezes_statistics and not was_lookalike(module):
        if is_in_graph(module):
            raise PolicyError(
                f"{name} belongs to a graph that was exported or traced, and the graph may write "
                f"to its statistics: freeze the original model, then export that."
            )
        if has_replaced_forward(module):
            raise PolicyError(
                f"{name}: its forward is set on the instance and is not that of its class, so "
                f"policy '{policy}' cannot keep it from its statistics. Delete it first (del "
                f"layer.forward), or leave the layer out{rule}."
            )
        known = has_known_forward(module, layer_class(module))
        if "forward" in module.__dict__ and not (known and policy.forces_eval):
            raise PolicyError(
                f"{name}: its forward is set on the instance (Accelerate's hooks do that), where "
                f"policy '{policy}' cannot keep it from its statistics. Freeze first, then set it."
            )
    computed = computed_affine(module) if is_norm(module) else []
    if computed and policy.freezes_affine and Policy.WEIGHTS not in policy:
        if next(module.parameters(), None) is None:
            raise PolicyError(
                f"{name}: its {' and '.join(computed)} come from outside the layer (it is an "
                f"adaptive norm, or FSDP flattened them), where policy '{policy}' does not reach "
                f"them. Freeze its statistics alone: {{{entry.name!r}: 'eval'}}. Under FSDP, "
                f"freeze before you wrap."
            )
        raise PolicyError(
            f"{name}: its {' and '.join(computed)} is computed from other parameters (by a "
            f"parametrization or by pruning), which policy '{policy}' does not freeze. Undo that "
            f"first, or freeze them too: '{policy}+weights'."
        )
