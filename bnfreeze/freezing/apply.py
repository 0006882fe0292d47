"""Changing layers: all that are planned, or none; and taking them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnfreeze.freezing.ddp import refuse_thawing
from bnfreeze.freezing.plan import Change, check_class
from bnfreeze.fusion.blocks import GENERATED, Fusion, fuse_blocks, release
from bnfreeze.norm_layers import STATISTICS, NamedModule, is_norm, keeps_statistics
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import (
    Record,
    frozen_parameters,
    layer_class,
    record_of,
    set_record,
    was_lookalike,
)

__all__ = ["carry_out", "thaw"]

_FUSED = Policy.FUSED | Policy.FUSED_ACT


def carry_out(
    modules: Sequence[NamedModule],
    changes: Sequence[Change],
    traceable: Sequence[type | str] = (),
) -> tuple[list[tuple[str, ...]], dict[int, Fusion]]:
    """Take every layer back to its original state, then hold it; on an error, undo it all.

    Args:
        modules: all of the model's.
        changes: what is to become of some of them.
        traceable: as for `freeze`.

    Returns:
        For each change the actions that were needed, in the words of `LayerRow.actions`; and by
        identity of each norm layer under the policy ``fused-act`` what it fuses.
    """
    before = [_State.of(entry.module) for entry in modules]
    records = [record_of(change.module) for change in changes]
    try:
        release(modules)
        for change in changes:
            _restore(change.module, change.record)
        done = [_hold(change, old) for change, old in zip(changes, records, strict=True)]
        _freeze_tied(modules)
        fusions = fuse_blocks(modules, traceable)
    except BaseException:
        for state in before:
            state.put_back()
        raise
    return done, fusions


def _hold(change: Change, old: Record | None) -> tuple[str, ...]:
    """Hold the layer, and say what is new against the record that it had."""
    module, record = change.module, change.record
    if record is None:
        return ("restore",)
    cleared = []
    for parameter in change.held.values():
        parameter.requires_grad_(False)
        if parameter.grad is not None:
            parameter.grad = None
            cleared.append("clear-grad")
    if change.kind is not layer_class(module):
        module.__class__ = change.kind
        if record.policy.forces_eval:
            # What reads the flag past the property, as torch.jit.script does, must see it too.
            module.__dict__["training"] = False
    elif was_lookalike(module) and not change.held:
        return ()  # nothing of it needs holding
    set_record(module, record)
    if old is not None and old.policy == record.policy:
        return tuple(dict.fromkeys(cleared))
    done = ["restore"] if old is not None else []
    done += ["fuse"] if record.policy & _FUSED else []
    if is_norm(module) and not was_lookalike(module) and keeps_statistics(module):
        done += ["force-eval"] if record.policy.forces_eval else []
        done += ["hold-statistics"] if record.policy.freezes_statistics else []
    done += [f"hold-{name}" for name in change.held]
    return tuple(dict.fromkeys([*done, *cleared]))


def _restore(module: nn.Module, following: Record | None = None) -> None:
    """Take one module back to what its record says; nothing if it has none.

    Args:
        module: the module.
        following: what it is held by from then on, if anything.
    """
    record = record_of(module)
    if record is None:
        return
    for name, flag in record.requires_grad.items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            parameter.requires_grad_(flag)
    base = layer_class(module)
    if type(module) is not base:
        module.__class__ = base
        if record.policy.forces_eval:
            module.__dict__["training"] = record.training
        if record.policy & _FUSED and not (following and following.policy & _FUSED):
            _cast_along(module)
    set_record(module, None)


def _cast_along(module: nn.Module) -> None:
    """Let statistics that a fused layer kept in fp32 follow a cast of the model, as they would."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.dtype.itemsize < 4 and weight.is_floating_point():
        for name in STATISTICS[:2]:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype is torch.float32:
                buffer.data = buffer.data.to(weight.dtype)


def thaw(modules: Sequence[NamedModule], chosen: Sequence[nn.Module]) -> dict[int, Fusion]:
    """Take the chosen among a model's modules back to what they were.

    Returns:
        By identity of each norm layer under the policy ``fused-act`` what it fuses from now on.

    Raises:
        PolicyError: a layer whose class something else has changed since, or one that must not
            train again as it is wrapped; none is changed then.
    """
    wanted = {id(module) for module in chosen}
    thawed = [e for e in modules if id(e.module) in wanted and record_of(e.module) is not None]
    for entry in thawed:
        check_class(entry)
    refuse_thawing(modules, [(entry, frozen_parameters(entry.module)) for entry in thawed])
    release(modules)
    flags = _flags(thawed)
    for entry in thawed:
        _restore(entry.module)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    _freeze_tied(modules)
    return fuse_blocks(modules)


def _flags(thawed: Sequence[NamedModule]) -> list[tuple[nn.Parameter, bool]]:
    """The flag that each parameter gets back.

    A tied one has several records. Where its layers were frozen by themselves, the later of these
    saw it held already; so it required a gradient if any says so.
    """
    found: dict[int, tuple[nn.Parameter, bool]] = {}
    for entry in thawed:
        record = record_of(entry.module)
        for name, flag in record.requires_grad.items() if record else ():
            parameter = entry.module._parameters.get(name)
            if parameter is not None:
                before = found.get(id(parameter), (parameter, False))[1]
                found[id(parameter)] = (parameter, flag or before)
    return list(found.values())


def _freeze_tied(modules: Sequence[NamedModule]) -> None:
    """A tied parameter stays held as long as any module that has it is frozen."""
    for entry in modules:
        record = record_of(entry.module)
        for name in record.requires_grad if record else ():
            parameter = entry.module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(False)


@dataclass
class _State:
    """All that freezing changes on a module, to put it back if it fails half-way."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, object]
    parameters: list[tuple[nn.Parameter, bool, Tensor | None]]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        attributes: dict[str, object] = {
            key: module.__dict__[key]
            for key in ("training", "_bnfreeze", GENERATED)
            if key in module.__dict__
        }
        parameters = [
            (p, p.requires_grad, p.grad) for p in module._parameters.values() if p is not None
        ]
        return cls(module, type(module), attributes, parameters)

    def put_back(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        set_record(self.module, None)
        self.module.__dict__.pop(GENERATED, None)
        self.module.__dict__.update(self.attributes)
        for parameter, flag, grad in self.parameters:
            parameter.requires_grad_(flag)
            parameter.grad = grad
