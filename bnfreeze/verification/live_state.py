"""The state of a live model: its facts, and its values in the model's own memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnfreeze.errors import PolicyError
from bnfreeze.inspection.behaviour import optimizers_by_id
from bnfreeze.inspection.in_memory import TensorInMemory, shard_of
from bnfreeze.norm_layers import NamedModule, is_lookalike, is_norm, named_modules
from bnfreeze.patterns import Pattern, nearest
from bnfreeze.policies.record import frozen_names, policy_name, record_of
from bnfreeze.torch_private import _InstanceNorm
from bnfreeze.verification.facts import LISTED, Facts, OwnerFacts, TensorFacts
from bnfreeze.verification.state import Identity, State

__all__ = ["read_state"]


class _Slot(NamedTuple):
    """A place in a module where a tensor is registered."""

    name: str
    tensor: Tensor
    kind: str
    owner: str
    module: nn.Module


def read_state(
    model: nn.Module,
    selection: str,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    also: Collection[str] = (),
    lenient: bool = False,
) -> State:
    """Read the state of `model`, whose values are then the model's own memory, not copies.

    Args:
        model: the model.
        selection: ``"frozen"``, ``"norm"``, ``"all"``, or a pattern of dotted tensor names.
        optimizer: the optimizer, or several.
        also: names that are read as well, if they exist.
        lenient: whether a selection of nothing is fine.

    Raises:
        PolicyError: there is nothing to check.
    """
    optimizers = _several(optimizer)
    optimized = optimizers_by_id(optimizers) if optimizers else None
    modules = named_modules(model)
    slots = list(_slots(modules))
    chosen = _chosen(modules, slots, selection)
    if not chosen and not lenient:
        raise PolicyError(_nothing(selection, slots))
    tensors: dict[str, TensorFacts] = {}
    values: dict[str, TensorInMemory] = {}
    identities: dict[str, Identity] = {}
    owners: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    ranges: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for slot in slots:
        if slot.name not in chosen and slot.name not in also:
            continue
        name, tensor = slot.name, slot.tensor
        known = first.setdefault(id(tensor), name)
        value = TensorInMemory(tensor) if known == name else values.get(known)
        unreadable = tensors[known].unreadable if value is None else value.why
        tensors[name] = _tensor_facts(slot, known, optimized, unreadable)
        owners[slot.owner] = slot.module
        pointer, version = 0, None
        if value is not None and not unreadable:
            values.setdefault(known, value)
            own = shard_of(tensor)
            local = tensor if own is None else own
            pointer = local.untyped_storage().data_ptr()
            if pointer and local.numel():
                place = (*_bytes_of(local), name)
                ranges.setdefault((_name(local.device), pointer), []).append(place)
            version = None if tensor.is_inference() else tensor._version
        identities[name] = Identity(tensor, pointer, version)
    groups = tuple(group for places in ranges.values() for group in _overlapping(places))
    noted = {name: _owner_facts(module) for name, module in owners.items()}
    return State(
        Facts(selection, tensors, noted, groups),
        values,
        identities=identities,
        optimizers=tuple(weakref.ref(one) for one in optimizers),
    )


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The range of bytes in its storage, from the first element to the end of the last one."""
    start, size = tensor.storage_offset(), tensor.element_size()
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start * size), int((start + span + 1) * size)


def _overlapping(places: Sequence[tuple[int, int, str]]) -> Iterator[tuple[str, ...]]:
    """The names whose ranges of bytes overlap. Views of one buffer side by side share nothing."""
    group: list[str] = []
    reach = 0
    for start, end, name in sorted(places, key=lambda place: place[:2]):
        if group and start >= reach:
            yield from [tuple(group)] if len(group) > 1 else ()
            group = []
        group.append(name)
        reach = max(reach, end)
    yield from [tuple(group)] if len(group) > 1 else ()


def _several(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    optimizers_by_id(several)  # refuses what is not an optimizer
    return several


def _slots(modules: Iterable[NamedModule]) -> Iterator[_Slot]:
    """Every tensor of the model under each of its names, wrappers' segments left out."""
    seen: dict[str, int] = {}
    for entry in modules:
        module = entry.module
        found = list(_own(module))
        for plain in entry.plain_names if found else ():
            for key, tensor, kind in found:
                name = f"{plain}.{key}" if plain else key
                # A wrapper's own tensor may have the very name of one inside it.
                if seen.setdefault(name, id(tensor)) != id(tensor):
                    name = f"{entry.name}.{key}" if entry.name else key
                yield _Slot(name, tensor, kind, plain, module)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield key, parameter, "parameter"
    for key, buffer in module._buffers.items():
        if buffer is not None:
            passing = key in module._non_persistent_buffers_set
            yield key, buffer, "non-persistent buffer" if passing else "buffer"
    for key, value in module.__dict__.items():
        if isinstance(value, Tensor):
            yield key, value, "attribute"


def _chosen(modules: Iterable[NamedModule], slots: Iterable[_Slot], selection: str) -> set[str]:
    if selection == LISTED:
        return set()  # they are named by themselves
    if selection == "all":
        return {slot.name for slot in slots}
    if selection == "norm":
        return {slot.name for slot in slots if is_norm(slot.module)}
    if selection == "frozen":
        # By identity, so that the other names of a frozen tensor belong to it.
        frozen = [getattr(entry.module, k) for entry in modules for k in frozen_names(entry.module)]
        ids = set(map(id, frozen))
        return {slot.name for slot in slots if id(slot.tensor) in ids}
    pattern = Pattern.parse(selection)
    return {slot.name for slot in slots if pattern.matches(slot.name)}


def _nothing(selection: str, slots: Iterable[_Slot]) -> str:
    if selection == "frozen":
        return (
            "Nothing in the model is frozen, so there is nothing to check. Use freeze(model) "
            "first, or say what to check: tensors='norm', 'all', or a pattern of tensor names."
        )
    if selection == "norm":
        return "The model has no norm layer, so there is nothing to check. Use tensors='all'."
    if selection == "all":
        return "The model has no tensor, so there is nothing to check."
    near = nearest(selection, ["frozen", "norm", "all", *(slot.name for slot in slots)])
    hint = " Did you mean " + " or ".join(map(repr, near)) + "?" if near else ""
    return f"Pattern {selection!r} matches no tensor of the model.{hint}"


def _tensor_facts(
    slot: _Slot, first: str, optimized: Mapping[int, str] | None, unreadable: str
) -> TensorFacts:
    tensor: Any = slot.tensor
    placement = ""
    if shard_of(tensor) is not None:
        shards = ", ".join(map(str, tensor.placements))
        placement = f"{shards} over {tuple(tensor.device_mesh.shape)}"
    return TensorFacts(
        kind=slot.kind,
        dtype=_name(tensor.dtype),
        shape=() if unreadable.startswith("it has not seen") else tuple(tensor.shape),
        device=_name(tensor.device),
        requires_grad=tensor.requires_grad,
        has_grad=tensor.is_leaf and tensor.grad is not None,
        optimized=None if optimized is None else id(tensor) in optimized,
        owner=slot.owner,
        first=first,
        placement=placement,
        unreadable=unreadable,
    )


@functools.cache
def _name(what: torch.dtype | torch.device) -> str:
    return str(what).removeprefix("torch.")


def _owner_facts(module: nn.Module) -> OwnerFacts:
    record = record_of(module)
    free = not is_norm(module) or (
        not record.policy.forces_eval if record else is_lookalike(module)
    )
    # fully_shard gives a module a class made on the spot, derived from its own.
    kind = type(module)
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = kind.__bases__[-1]
    momentum = getattr(module, "momentum", None)
    return OwnerFacts(
        kind=f"{kind.__module__}.{kind.__qualname__}",
        policy=policy_name(module),
        mode="" if free else "train" if module.training else "eval",
        training=module.training,
        counts=not isinstance(module, _InstanceNorm),
        momentum=float(momentum) if isinstance(momentum, int | float) else None,
        parametrized=hasattr(module, "parametrizations"),
    )
