"""Changing layers, and restoring them, as planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bnfreeze.freezing.ddp import refuse_wrapped
from bnfreeze.freezing.plan import Change
from bnfreeze.freezing.report import LayerRow
from bnfreeze.fusion.blocks import fuse_blocks, release
from bnfreeze.fusion.matching import Fusion
from bnfreeze.norm_layers import (
    AFFINE,
    STATISTICS,
    NamedModule,
    affine_parameters,
    is_norm,
    keeps_statistics,
)
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import (
    FreezeRecord,
    layer_class,
    original_flags,
    policies_by_parameter,
    policy_name,
    record_of,
    recorded,
    set_record,
    was_lookalike,
)


def carry_out(
    modules: Sequence[NamedModule], changes: Sequence[Change], *, around: bool = True
) -> tuple[LayerRow, ...]:
    """Restore each layer to its original state, then freeze it as planned.

    Args:
        modules: all of the model's.
        changes: what some of them become.
        around: whether a DistributedDataParallel around the model counts, whose gradients must
            stay the same; one among the modules always does.

    Returns:
        A row for each norm layer, and for each other module that was changed.

    Raises:
        PolicyError: a wrapper does not allow it. The caller's transaction undoes what was changed.
    """
    parameters = [p for e in modules for p in e.module._parameters.values() if p is not None]
    trained = {id(p) for p in parameters if p.requires_grad}
    records = [record_of(change.entry.module) for change in changes]
    flags = original_flags(change.entry.module for change in changes)
    release(modules)
    for change in changes:
        _restore(change)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    actions = {id(c.entry.module): _freeze(c, old) for c, old in zip(changes, records, strict=True)}
    # A tied parameter stays frozen as long as any module that has it is frozen.
    for entry in modules:
        for _, parameter, _ in recorded(entry.module):
            parameter.requires_grad_(False)
    refuse_wrapped(modules, trained, around)
    fusions = fuse_blocks(modules)
    planned = {id(change.entry.module): change.note for change in changes}
    by_policy = policies_by_parameter(entry.module for entry in modules)
    rows = []
    for entry in modules:
        module, key = entry.module, id(entry.module)
        if key in actions or is_norm(module):
            fusion = fusions.get(key, Fusion())
            notes = planned.get(key, ""), fusion.note, _frozen_elsewhere(module, by_policy)
            rows.append(
                LayerRow(
                    entry.name,
                    layer_class(module).__name__,
                    policy_name(module),
                    fusion.fuses,
                    actions.get(key, ()),
                    "; ".join(filter(None, notes)),
                )
            )
    return tuple(rows)


def _restore(change: Change) -> None:
    """Give the module back all that its record says, but for the flags of its parameters."""
    module, following = change.entry.module, change.record
    record, base = record_of(module), layer_class(module)
    if record is not None and type(module) is not base:
        module.__class__ = base
        if record.policy.forces_eval:
            module.__dict__["training"] = record.training
        if Policy.FUSED in record.policy and not (following and Policy.FUSED in following.policy):
            _cast_statistics(module)
    set_record(module, None)


def _cast_statistics(module: nn.Module) -> None:
    """Cast statistics that a fused layer kept in fp32 to the half precision of the model."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.dtype.itemsize < 4 and weight.is_floating_point():
        for name in STATISTICS[:2]:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype is torch.float32:
                buffer.data = buffer.data.to(weight.dtype)


def _freeze(change: Change, old: FreezeRecord | None) -> tuple[str, ...]:
    """Freeze the layer; return what is new compared with the record that it had."""
    module, record = change.entry.module, change.record
    restored = ("restore",) if old is not None else ()
    if record is None:
        return restored
    if change.kind is not type(module):
        module.__class__ = change.kind
        if record.policy.forces_eval:
            # torch.jit.script does not use the property: it reads the flag in the instance's dict.
            module.__dict__["training"] = False
    set_record(module, record)
    left = [p for _, p, _ in recorded(module) if p.grad is not None]
    for parameter in left:
        parameter.grad = None
    cleared = ("clear-grad",) if left else ()
    if old is not None and old.policy == record.policy:
        return cleared
    done = ["fuse"] if Policy.FUSED in record.policy else []
    if is_norm(module) and not was_lookalike(module) and keeps_statistics(module):
        done += ["force-eval"] if record.policy.forces_eval else []
        done += ["freeze-statistics"] if record.policy.freezes_statistics else []
    done += [f"freeze-{name}" for name in record.requires_grad]
    return (*restored, *done, *cleared)


def _frozen_elsewhere(module: nn.Module, by_policy: Mapping[int, str]) -> str:
    """A note on a norm layer whose weight or bias does not train, although its policy allows it.

    Args:
        module: any module.
        by_policy: what `policies_by_parameter` gives for the model.
    """
    if not is_norm(module) or was_lookalike(module):
        return ""
    own = {name for name, _, _ in recorded(module)}
    notes: dict[str, list[str]] = {}
    for name, parameter in affine_parameters(module).items():
        if not parameter.requires_grad and name in AFFINE and name not in own:
            shared = id(parameter) in by_policy
            who = "with the layer that shares it" if shared else "by you (requires_grad=False)"
            notes.setdefault(who, []).append(name)
    return "; ".join(f"{' and '.join(names)} frozen {who}" for who, names in notes.items())
