"""Changing layers, and restoring them: all that are planned, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfreeze.freezing.ddp import refuse_wrapped, wrappers_around, wrappers_in
from bnfreeze.freezing.plan import Change, restoring
from bnfreeze.fusion.blocks import Fusion, fuse_blocks, release
from bnfreeze.norm_layers import STATISTICS, NamedModule, is_norm, keeps_statistics
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import (
    FreezeRecord,
    layer_class,
    mark_left_alone,
    original_flags,
    record_of,
    recorded,
    set_record,
    was_lookalike,
)
from bnfreeze.policies.transaction import transaction

__all__ = ["carry_out", "thaw"]


def carry_out(
    modules: Sequence[NamedModule],
    changes: Sequence[Change],
    traceable: Sequence[type | str] = (),
    *,
    wrappers: Callable[[Sequence[NamedModule]], list[DistributedDataParallel]] = wrappers_around,
) -> tuple[dict[int, tuple[str, ...]], dict[int, Fusion]]:
    """Restore each layer to its original state, then freeze it as planned.

    Args:
        modules: all of the model's.
        changes: what some of them become.
        traceable: as for `freeze`.
        wrappers: what finds the DistributedDataParallel whose gradients must stay the same.

    Returns:
        By identity of each changed module the actions that were needed, in the words of
        `LayerRow.actions`; and of each layer under the policy ``fused-act`` what it fuses.

    Raises:
        PolicyError: a wrapper does not allow it. The caller's transaction undoes what was changed.
    """
    parameters = [p for e in modules for p in e.module._parameters.values() if p is not None]
    trained = {id(p) for p in parameters if p.requires_grad}
    records = [record_of(change.module) for change in changes]
    flags = original_flags(change.module for change in changes)
    release(modules)
    for change in changes:
        _restore(change)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    done = {id(c.module): _freeze(c, old) for c, old in zip(changes, records, strict=True)}
    # A tied parameter stays frozen as long as any module that has it is frozen.
    for entry in modules:
        for _, parameter, _ in recorded(entry.module):
            parameter.requires_grad_(False)
    refuse_wrapped(modules, trained, wrappers)
    return done, fuse_blocks(modules, traceable)


def _freeze(change: Change, old: FreezeRecord | None) -> tuple[str, ...]:
    """Freeze the layer; return what is new compared with the record that it had."""
    module, record = change.module, change.record
    if record is None:
        return ("restore",)
    left = any(parameter.grad is not None for parameter in change.frozen.values())
    cleared = ("clear-grad",) if left else ()
    for parameter in change.frozen.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    if change.kind is not layer_class(module):
        module.__class__ = change.kind
        if record.policy.forces_eval:
            # torch.jit.script does not use the property: it reads the flag in the instance's dict.
            module.__dict__["training"] = False
    elif was_lookalike(module) and not change.frozen:
        return ()  # its class freezes all of it already
    set_record(module, record)
    if old is not None and old.policy == record.policy:
        return cleared
    done = ["restore"] if old is not None else []
    done += ["fuse"] if Policy.FUSED in record.policy else []
    if is_norm(module) and not was_lookalike(module) and keeps_statistics(module):
        done += ["force-eval"] if record.policy.forces_eval else []
        done += ["freeze-statistics"] if record.policy.freezes_statistics else []
    done += [f"freeze-{name}" for name in change.frozen]
    return (*done, *cleared)


def _restore(change: Change) -> None:
    """Give the module back all that its record says, but for the flags of its parameters."""
    module, record = change.module, record_of(change.module)
    if record is None:
        return
    base, following = layer_class(module), change.record
    if type(module) is not base:
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


def thaw(
    modules: Sequence[NamedModule], chosen: Sequence[NamedModule]
) -> tuple[dict[int, tuple[str, ...]], dict[int, Fusion]]:
    """Restore the chosen ones among a model's modules, and forget which were left alone.

    Returns:
        As `carry_out`.

    Raises:
        PolicyError: a layer whose class was changed by something else, or one that must not
            train again because it is wrapped. None is changed then.
    """
    changes = [restoring(entry) for entry in chosen if record_of(entry.module) is not None]
    with transaction(entry.module for entry in modules):
        for entry in chosen:
            mark_left_alone(entry.module, False)
        # Only wrappers that were given count: unfreeze(ddp.module) is the way to wrap again.
        return carry_out(modules, changes, wrappers=wrappers_in)
