"""Changing layers, and restoring them: all that are planned, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bnfreeze.freezing.ddp import refuse_thawing, wrappers_in
from bnfreeze.freezing.plan import Change, check_class
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

__all__ = ["carry_out", "thaw", "transaction"]


@contextlib.contextmanager
def transaction(modules: Sequence[NamedModule], *, keep: bool = True) -> Iterator[None]:
    """Undo on an error everything that is changed on the modules inside the block.

    Args:
        modules: all of the model's.
        keep: False to undo it also if there was no error.
    """
    before = [_saved(entry.module) for entry in modules]
    done = False
    try:
        yield
        done = keep
    finally:
        if not done:
            for put_back in before:
                put_back()


def carry_out(
    modules: Sequence[NamedModule],
    changes: Sequence[Change],
    traceable: Sequence[type | str] = (),
) -> tuple[dict[int, tuple[str, ...]], dict[int, Fusion]]:
    """Restore each layer to its original state, then freeze it as planned.

    Args:
        modules: all of the model's.
        changes: what some of them become.
        traceable: as for `freeze`.

    Returns:
        By identity of each changed module the actions that were needed, in the words of
        `LayerRow.actions`; and of each layer under the policy ``fused-act`` what it fuses.
    """
    records = [record_of(change.module) for change in changes]
    release(modules)
    for change in changes:
        _restore(change.module, change.record)
    done = {id(c.module): _freeze(c, old) for c, old in zip(changes, records, strict=True)}
    _freeze_tied(modules)
    return done, fuse_blocks(modules, traceable)


def _freeze(change: Change, old: FreezeRecord | None) -> tuple[str, ...]:
    """Freeze the layer; return what is new compared with the record that it had."""
    module, record = change.module, change.record
    if record is None:
        return ("restore",)
    cleared = []
    for parameter in change.frozen.values():
        parameter.requires_grad_(False)
        if parameter.grad is not None:
            parameter.grad = None
            cleared.append("clear-grad")
    if change.kind is not layer_class(module):
        module.__class__ = change.kind
        if record.policy.forces_eval:
            # torch.jit.script does not use the property: it reads the flag in the instance's dict.
            module.__dict__["training"] = False
    elif was_lookalike(module) and not change.frozen:
        return ()  # its class freezes all of it already
    set_record(module, record)
    if old is not None and old.policy == record.policy:
        return tuple(dict.fromkeys(cleared))
    done = ["restore"] if old is not None else []
    done += ["fuse"] if Policy.FUSED in record.policy else []
    if is_norm(module) and not was_lookalike(module) and keeps_statistics(module):
        done += ["force-eval"] if record.policy.forces_eval else []
        done += ["freeze-statistics"] if record.policy.freezes_statistics else []
    done += [f"freeze-{name}" for name in change.frozen]
    return tuple(dict.fromkeys([*done, *cleared]))


def _restore(module: nn.Module, following: FreezeRecord | None = None) -> None:
    """Restore one module to what its record says; do nothing if it has none.

    Args:
        module: the module.
        following: the record that it gets next, if any.
    """
    record = record_of(module)
    if record is None:
        return
    for _, parameter, flag in recorded(module):
        parameter.requires_grad_(flag)
    base = layer_class(module)
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


def thaw(modules: Sequence[NamedModule], chosen: Sequence[NamedModule]) -> dict[int, Fusion]:
    """Restore the chosen ones among a model's modules, and forget which were left alone.

    Returns:
        By identity of each norm layer under the policy ``fused-act`` what it fuses from now on.

    Raises:
        PolicyError: a layer whose class was changed by something else, or one that must not
            train again because it is wrapped. None is changed then.
    """
    thawed = [entry for entry in chosen if record_of(entry.module) is not None]
    for entry in thawed:
        check_class(entry)
    # Only wrappers that were given count: unfreeze(ddp.module) is the way to wrap again.
    owned = [(e, [p for _, p, flag in recorded(e.module) if flag]) for e in thawed]
    refuse_thawing(wrappers_in(modules), owned)
    with transaction(modules):
        release(modules)
        flags = original_flags(thawed)
        for entry in thawed:
            _restore(entry.module)
        for entry in chosen:
            mark_left_alone(entry.module, False)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        _freeze_tied(modules)
        return fuse_blocks(modules)


def _freeze_tied(modules: Sequence[NamedModule]) -> None:
    """A tied parameter stays frozen as long as any module that has it is frozen."""
    for entry in modules:
        for _, parameter, _ in recorded(entry.module):
            parameter.requires_grad_(False)


def _saved(module: nn.Module) -> Callable[[], None]:
    """What puts back everything that freezing may change on the module."""
    kind, attributes = type(module), dict(module.__dict__)
    parameters = [
        (p, p.requires_grad, p.grad) for p in module._parameters.values() if p is not None
    ]
    buffers = module.named_buffers(recurse=False)
    statistics = [(buffer, buffer.data) for name, buffer in buffers if name in STATISTICS]

    def put_back() -> None:
        if type(module) is not kind:
            module.__class__ = kind
        for name in module.__dict__.keys() - attributes.keys():
            del module.__dict__[name]
        module.__dict__.update(attributes)
        for parameter, flag, grad in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for buffer, data in statistics:
            if buffer.dtype is not data.dtype:
                buffer.data = data

    return put_back
