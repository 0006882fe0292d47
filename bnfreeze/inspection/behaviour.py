"""What one live norm layer will do in the next training step, and why."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

import torch
from torch import nn
from torch.optim import Optimizer

from bnfreeze.norm_layers import (
    AFFINE,
    NamedModule,
    affine_parameters,
    computed_affine,
    eps_of,
    has_known_forward,
    has_replaced_forward,
    is_foreign,
    is_lazy,
    is_lookalike,
    is_norm,
    keeps_statistics,
    statistics_in,
)
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, policies_by_parameter, policy_name, record_of
from bnfreeze.torch_private import _InstanceNorm

_NEITHER = "it has neither"
# The end of the reason why a layer's statistics update that does not update them itself.
SHARES: Final = "has the same statistics, and updates them"
# Why weight and bias train, or do not, that are no tensors of the layer's own.
OUTSIDE: Final = "set from outside the layer"

FrozenBy = Literal["bnfreeze", "class", "requires_grad"]
NormalizesWith = Literal["batch", "running", "unknown"]


@dataclass(frozen=True)
class LiveLayer:
    """One norm layer, and what it will do in the next training step.

    Attributes:
        name: the dotted name; of a shared layer the first.
        kind: the class, as it was before freezing.
        policy: its policy, ``"none"``, or ``"frozen"`` for another library's frozen layer.
        normalizes_with: ``"running"`` (the running statistics), ``"batch"`` (the input's own) or
            ``"unknown"``.
        updates_statistics: whether running_mean and running_var, or the count, will change.
        trains_affine: whether an optimizer step can move weight or bias.
        frozen_by: ``"bnfreeze"`` (by a policy, its own or that of a layer which shares its weight),
            ``"class"`` (another library's frozen layer, or a `FrozenBatchNorm1d/2d/3d` built
            directly), ``"requires_grad"`` (by hand, weight and bias alone) or None.
        num_features: the number of channels C; of a foreign norm layer that does not say so, the
            elements of one statistic.
        eps: what is added to the variance; None if it is not known.
        why: for each of the three answers, the reason.
        aliases: the other names under which the very same layer is registered.
    """

    name: str
    kind: str
    policy: str
    normalizes_with: NormalizesWith
    updates_statistics: bool
    trains_affine: bool
    frozen_by: FrozenBy | None
    num_features: int
    eps: float | None
    why: dict[str, str]
    aliases: tuple[str, ...] = ()


def fate(layer: LiveLayer) -> tuple[str, str]:
    """What becomes of the statistics, and of weight and bias, in a word or two for a table.

    ``"update"`` or ``"train"``; ``"frozen"``; ``"fixed"``: they stay, and nobody promises it; or
    ``"none"``: the layer has neither weight nor bias.
    """
    frozen = layer.policy == "frozen"
    policy = Policy.NONE if frozen else Policy.parse(layer.policy)
    statistics = "frozen" if frozen or Policy.STATS in policy else "fixed"
    affine = "frozen" if frozen or Policy.AFFINE in policy else "fixed"
    affine = {_NEITHER: "none", OUTSIDE: "fixed"}.get(layer.why["affine"], affine)
    return (
        "update" if layer.updates_statistics else statistics,
        "train" if layer.trains_affine else affine,
    )


def fate_legend(rows: Iterable[Sequence[str]]) -> str:
    """What `fate` means by its word that says least by itself, if a table has it."""
    used = any("fixed" in row for row in rows)
    return "fixed: does not change, but nothing keeps it so" if used else ""


def updated_by_another(layer: LiveLayer) -> str:
    """Why the statistics update, if another layer that has them too updates them; else empty."""
    why = layer.why["statistics"]
    return why if why.endswith(SHARES) else ""


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper, whose steps count; without a wrapper, the optimizer itself.

    Accelerate's and Opacus' wrappers are Optimizers by class, but their base was never
    initialised. SAM's own step() may never be called. A ZeroRedundancyOptimizer is initialised,
    and its own step is the one to wait for.
    """
    whole = hasattr(optimizer, "_optimizer_step_post_hooks")
    named = getattr(optimizer, "optimizer", getattr(optimizer, "base_optimizer", None))
    inside = [*(() if whole else vars(optimizer).values()), named]
    return [optimizer, *(one for one in inside if isinstance(one, Optimizer))][-1]


def optimizers_by_id(
    optimizer: Optimizer | Iterable[Optimizer] | None,
) -> Mapping[int, str] | None:
    """By parameter identity, the full name of its optimizer's class; None without an optimizer.

    Raises:
        TypeError: something in it is no `torch.optim.Optimizer`.
    """
    if optimizer is None:
        return None
    # Duck-typed: wrappers of trainers (Accelerate, Lightning) keep param_groups and no base class.
    several = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
    owners: dict[int, str] = {}
    try:
        for one in cast("Iterable[Optimizer]", several):
            kind = type(inner_optimizer(one))
            for group in one.param_groups:
                name = f"{kind.__module__}.{kind.__qualname__}"
                owners.update(dict.fromkeys(map(id, group["params"]), name))
    except (TypeError, AttributeError):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer or several, "
            f"not {type(optimizer).__name__}."
        ) from None
    return owners


def live_layers(
    modules: Sequence[NamedModule], optimized: Mapping[int, str] | None
) -> list[LiveLayer]:
    """Say what the norm layers of a model will do in the next training step.

    Args:
        modules: all of the model's, as `bnfreeze.inspection.modes.in_training` leaves them.
        optimized: what `optimizers_by_id` gave; None where no optimizer is known.
    """
    by_policy = policies_by_parameter(entry.module for entry in modules)
    norms = [entry for entry in modules if is_norm(entry.module)]
    layers = [_live_layer(entry, optimized, by_policy) for entry in norms]
    # A layer whose statistics another one updates, updates them.
    kept = [[id(d[name]) for d, name in statistics_in(entry.module)] for entry in norms]
    writers = {
        tensor: layer.name or "the model"
        for layer, own in zip(layers, kept, strict=True)
        if layer.updates_statistics
        for tensor in own
    }
    for index, (layer, own) in enumerate(zip(layers, kept, strict=True)):
        others = [writers[tensor] for tensor in own if tensor in writers]
        if others and not layer.updates_statistics:
            why = {**layer.why, "statistics": f"{others[0]} {SHARES}"}
            layers[index] = replace(layer, updates_statistics=True, why=why)
    return layers


def _live_layer(
    entry: NamedModule, optimized: Mapping[int, str] | None, by_policy: Mapping[int, str]
) -> LiveLayer:
    layer = entry.module
    normalizes, why_normalizes = _normalizes_with(layer)
    updates, why_updates = _updates_statistics(layer)
    trains, why_trains = _trains_affine(layer, optimized, by_policy)
    return LiveLayer(
        name=entry.name,
        kind=layer_class(layer).__name__,
        policy=policy_name(layer),
        normalizes_with=normalizes,
        updates_statistics=updates,
        trains_affine=trains,
        frozen_by=_frozen_by(layer, by_policy),
        num_features=_num_features(layer),
        eps=eps_of(layer),
        why={"normalizes_with": why_normalizes, "statistics": why_updates, "affine": why_trains},
        aliases=entry.names[1:],
    )


def _frozen_by(layer: nn.Module, by_policy: Mapping[int, str]) -> FrozenBy | None:
    if record_of(layer) is not None:
        return "bnfreeze"
    if is_lookalike(layer):
        return "class"
    parameters = affine_parameters(layer).values()
    if not parameters or any(parameter.requires_grad for parameter in parameters):
        return None
    # A parameter may be frozen through another layer that has it too.
    return "bnfreeze" if any(id(p) in by_policy for p in parameters) else "requires_grad"


def _num_features(layer: nn.Module) -> int:
    known = getattr(layer, "num_features", None)
    if isinstance(known, int) or is_lazy(layer):
        return known or 0
    return max((holder[name].numel() for holder, name in statistics_in(layer)), default=0)


def _why_unknown(layer: nn.Module) -> str:
    """Why it is not known what the layer's forward does; empty if it is."""
    kind = layer_class(layer)
    if is_foreign(layer):
        return f"{kind.__name__} keeps running statistics in a way of its own"
    if "forward" in layer.__dict__:
        return "its forward is set on the instance"
    return "" if has_known_forward(layer, kind) else f"{kind.__name__} has a forward of its own"


def _normalizes_with(layer: nn.Module) -> tuple[NormalizesWith, str]:
    if is_lookalike(layer) and not has_replaced_forward(layer):
        return "running", _why_eval(layer)
    if unknown := _why_unknown(layer):
        return "unknown", unknown
    if not keeps_statistics(layer) and not is_lazy(layer):
        return "batch", "it keeps no running statistics"
    if isinstance(layer, _InstanceNorm) and not layer.track_running_stats:
        return "batch", "track_running_stats is False: an instance norm ignores its statistics then"
    return ("batch", "train mode") if layer.training else ("running", _why_eval(layer))


def _updates_statistics(layer: nn.Module) -> tuple[bool, str]:
    record, training = record_of(layer), layer.training
    if not keeps_statistics(layer) and not is_lazy(layer):
        return False, "there are none"
    if has_replaced_forward(layer):
        # It may write to them whatever the class and the mode are: the careful answer.
        return True, _why_unknown(layer)
    if is_lookalike(layer):
        return False, _why_eval(layer)
    kind = layer_class(layer)
    if record and record.policy.freezes_statistics:
        if type(layer).forward is kind.forward and not has_known_forward(layer, kind):
            # Freezing found a forward that it knows; the class was given another one since.
            return True, _why_unknown(layer)
        return False, f"frozen by policy {record.policy}"
    if unknown := _why_unknown(layer):
        # The careful answer, in eval mode too.
        return True, "train mode" if training and not is_foreign(layer) else unknown
    if isinstance(layer, _InstanceNorm):
        # F.instance_norm writes to the statistics that it is given whenever it normalises with
        # the input's own.
        if training or not layer.track_running_stats:
            return True, "train mode" if training else "track_running_stats is False"
        if _instance_norm_writes_in_eval():
            return True, "this torch writes an instance norm's statistics back rounded, in eval too"
    elif training and not layer.track_running_stats:
        return False, "track_running_stats is False, as Lightning's BaseFinetuning sets it"
    elif training:
        zero = layer.momentum == 0
        return True, "momentum is 0, and the count still rises" if zero else "train mode"
    return False, _why_eval(layer)


@functools.cache
def _instance_norm_writes_in_eval() -> bool:
    """Whether this torch repeats the statistics for each sample and writes back the mean of these.

    torch 2.10 does, 2.15 does not: the mean of three equal numbers may round.
    """
    mean = torch.linspace(0.1, 1.3, 64)
    var = mean + 1
    before = var.clone()
    nn.functional.instance_norm(torch.zeros(3, 64, 2), mean, var, use_input_stats=False)
    return not torch.equal(var, before)


def _why_eval(layer: nn.Module) -> str:
    record = record_of(layer)
    if record and record.policy.forces_eval:
        return f"frozen by policy {record.policy}"
    if is_lookalike(layer):
        return "a frozen batch norm"
    return "eval mode, also after model.train(), which the model overrides"


def _trains_affine(
    layer: nn.Module, optimized: Mapping[int, str] | None, by_policy: Mapping[int, str]
) -> tuple[bool, str]:
    own = policies_by_parameter([layer])
    reasons: dict[str, tuple[bool, str]] = {}
    for name, parameter in affine_parameters(layer).items():
        if optimized is not None and id(parameter) not in optimized:
            reasons[name] = False, "in no optimizer"
        elif parameter.requires_grad:
            reasons[name] = True, "requires_grad" + (", in the optimizer" if optimized else "")
        elif parameter.grad is not None:
            # Without an optimizer at hand, the careful answer: a step would move it.
            why = "requires_grad is False, but a leftover .grad is applied by the next step"
            reasons[name] = True, why
        elif policy := own.get(id(parameter)) or by_policy.get(id(parameter)):
            reasons[name] = False, f"frozen by policy {policy}"
        else:
            reasons[name] = False, "requires_grad is False"
    if not reasons and (outside := computed_affine(layer)):
        # As in an adaptive norm. The values may have a gradient that goes to other parameters.
        return any(getattr(layer, name).requires_grad for name in outside), OUTSIDE
    if not reasons:
        buffers = any(layer._buffers.get(name) is not None for name in AFFINE)
        return False, "buffers: no optimizer trains them" if buffers else _NEITHER
    trains = any(moves for moves, _ in reasons.values())
    shown = {name: why for name, (moves, why) in reasons.items() if moves is trains}
    if len(shown) == len(reasons) and len(set(shown.values())) == 1:
        return trains, next(iter(shown.values()))
    return trains, "; ".join(f"{name}: {why}" for name, why in shown.items())
