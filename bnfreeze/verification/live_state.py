"""The state of a live model: its facts, and its values in the model's own memory."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnfreeze.errors import PolicyError
from bnfreeze.inspection.behaviour import inner_optimizer, optimizers_by_id
from bnfreeze.inspection.in_memory import TensorInMemory, shard_of
from bnfreeze.norm_layers import (
    NamedModule,
    eps_of,
    foreign_remedy,
    is_foreign,
    is_lookalike,
    is_norm,
    named_modules,
)
from bnfreeze.patterns import Pattern, hint, with_parents
from bnfreeze.policies.record import frozen_names, policy_name, record_of
from bnfreeze.verification.state import LISTED, Identity, OwnerFacts, State, TensorFacts

__all__ = ["as_list", "read_state"]

_clock = count(1)


class _Slot(NamedTuple):
    """A place in a module where a tensor is registered, under one of its names."""

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
) -> State:
    """Read the state of `model`, whose values are then the model's own memory, not copies.

    Args:
        model: the model.
        selection: ``"frozen"``, ``"norm"``, ``"all"``, or a pattern of dotted tensor names.
        optimizer: the optimizer, or several.
        also: names that are read as well, if they exist; then a selection of nothing is fine.

    Raises:
        PolicyError: there is nothing to check.
    """
    optimizers = as_list(optimizer)
    optimized = optimizers_by_id(optimizers) if optimizers else None
    modules = named_modules(model)
    slots = list(_slots(modules))
    chosen = _chosen(modules, slots, selection)
    if not chosen and not also:
        raise PolicyError(_nothing(selection, slots))
    tensors: dict[str, TensorFacts] = {}
    values: dict[str, TensorInMemory] = {}
    identities: dict[str, Identity] = {}
    owners: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    # By device and address of a storage, which bytes of it have which name.
    places: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    for slot in slots:
        name, tensor = slot.name, slot.tensor
        if name not in chosen and name not in also:
            continue
        known = first.setdefault(id(tensor), name)
        value = TensorInMemory(tensor)
        tensors[name] = _tensor_facts(slot, known, optimized, value)
        owners[slot.owner] = slot.module
        identities[name] = Identity(tensor)
        if value.has_values:
            if known == name:
                values[name] = value
            own = shard_of(tensor)
            local = tensor if own is None else own
            pointer = local.untyped_storage().data_ptr()
            if pointer and local.numel():
                place = (*_bytes_of(local), name)
                places.setdefault((local.device, pointer), []).append(place)
            version = None if tensor.is_inference() else tensor._version
            identities[name] = Identity(tensor, pointer, version)
    return State(
        selection,
        tensors,
        {name: _owner_facts(name, module) for name, module in owners.items()},
        groups=tuple(chain.from_iterable(map(_overlapping, places.values()))),
        values=values,
        identities=identities,
        optimizers=tuple(weakref.ref(one) for one in optimizers),
        taken=next(_clock),
    )


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """The range of bytes in its storage, from the first element to the end of the last one."""
    start, size = tensor.storage_offset(), tensor.element_size()
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start * size), int((start + span + 1) * size)


def _overlapping(places: Sequence[tuple[int, int, str]]) -> Iterator[tuple[str, ...]]:
    """The names whose ranges of bytes overlap. Views of one buffer side by side share nothing."""
    groups: list[list[str]] = []
    reach = 0
    for start, end, name in sorted(places, key=lambda place: place[:2]):
        if not groups or start >= reach:
            groups.append([])
        groups[-1].append(name)
        reach = max(reach, end)
    return (tuple(group) for group in groups if len(group) > 1)


def as_list(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """The optimizers, without wrappers.

    Raises:
        TypeError: something is not an optimizer.
    """
    if optimizer is None:
        return []
    several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for one in several:
        optimizers_by_id(one)  # refuses what is not an optimizer
    return [inner_optimizer(one) for one in several]


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
    holders = (module._parameters, "parameter"), (module._buffers, "buffer")
    for holder, kind in (*holders, (module.__dict__, "attribute")):
        for key, value in holder.items():
            if isinstance(value, Tensor):
                passing = kind == "buffer" and key in module._non_persistent_buffers_set
                yield key, value, "non-persistent buffer" if passing else kind


def _chosen(modules: Iterable[NamedModule], slots: Iterable[_Slot], selection: str) -> set[str]:
    if selection == LISTED:
        return set()  # they are named by themselves
    if selection == "all":
        return {slot.name for slot in slots}
    if selection == "norm":
        return {s.name for s in slots if is_norm(s.module)}
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
            "Nothing in the model is frozen, so there is nothing to record. Use freeze(model) "
            "first, or pass tensors='norm', 'all' or a pattern of tensor names."
        )
    if selection == "norm":
        return "The model has no norm layer, so there is nothing to record. Use tensors='all'."
    if selection == "all":
        return "The model has no tensor, so there is nothing to record."
    near = hint(selection, ["frozen", "norm", "all", *with_parents(slot.name for slot in slots)])
    return f"Pattern {selection!r} matches no tensor of the model.{near}"


def _tensor_facts(
    slot: _Slot, first: str, optimized: Mapping[int, str] | None, value: TensorInMemory
) -> TensorFacts:
    tensor: Any = slot.tensor
    placement = ""
    if shard_of(tensor) is not None:
        shards = ", ".join(map(str, tensor.placements))
        placement = f"{shards} over {tuple(tensor.device_mesh.shape)}"
    return TensorFacts(
        kind=slot.kind,
        dtype=value.dtype,
        shape=tuple(tensor.shape) if placement else value.shape,
        device=str(tensor.device),
        requires_grad=tensor.requires_grad,
        has_grad=tensor.is_leaf and tensor.grad is not None,
        optimized=None if optimized is None else id(tensor) in optimized,
        owner=slot.owner,
        first=first,
        placement=placement,
        unreadable=value.why,
    )


def _owner_facts(name: str, module: nn.Module) -> OwnerFacts:
    record = record_of(module)
    free = not record.policy.forces_eval if record else is_lookalike(module)
    # fully_shard gives a module a class made on the spot, derived from its own.
    kind = type(module)
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = kind.__bases__[-1]
    return OwnerFacts(
        kind=f"{kind.__module__}.{kind.__qualname__}",
        policy=policy_name(module),
        training=module.training,
        mode_matters=is_norm(module) and not free,
        remedy="" if record or not is_foreign(module) else foreign_remedy(module, name),
        eps=eps_of(module) if is_norm(module) else None,
    )
