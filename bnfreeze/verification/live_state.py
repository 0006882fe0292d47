"""The state of a live model: its facts, and its values in the model's own memory."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
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

_clock = count(1)
# What is said if a selection has nothing.
_NOTHING = {
    "frozen": "Nothing in the model is frozen, so there is nothing to record. Use freeze(model) "
    "first, or pass tensors='norm', 'all' or a pattern of tensor names.",
    "norm": "The model has no norm layer, so there is nothing to record. Use tensors='all'.",
    "all": "The model has no tensor, so there is nothing to record.",
}


class _Slot(NamedTuple):
    """A place in a module where a tensor is registered, under one of its names."""

    name: str
    tensor: Any
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
    chosen = _chosen(modules, slots, selection).union(also)
    if not chosen:
        near = hint(selection, [*_NOTHING, *with_parents(slot.name for slot in slots)])
        nothing = f"Pattern {selection!r} matches no tensor of the model.{near}"
        raise PolicyError(_NOTHING.get(selection, nothing))
    tensors: dict[str, TensorFacts] = {}
    values: dict[str, TensorInMemory] = {}
    identities: dict[str, Identity] = {}
    owners: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    # By device, from which address to which there is what.
    places: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, tensor, kind, owner, module in slots:
        if name not in chosen:
            continue
        owners[owner] = module
        known = first.setdefault(id(tensor), name)
        value, own, placement = TensorInMemory(tensor), shard_of(tensor), ""
        if own is not None:
            shards = ", ".join(map(str, tensor.placements))
            placement = f"{shards} over {tuple(tensor.device_mesh.shape)}"
        pointer, version = 0, None
        if value.has_values:
            if known == name:
                values[name] = value
            local = tensor if own is None else own
            pointer = local.untyped_storage().data_ptr()
            if pointer and local.numel():
                steps = zip(local.shape, local.stride(), strict=True)
                last = local.data_ptr() + local.element_size() * sum((n - 1) * s for n, s in steps)
                place = local.data_ptr(), last + local.element_size(), name
                places.setdefault(local.device, []).append(place)
            version = None if tensor.is_inference() else tensor._version
        identities[name] = Identity(tensor, pointer, version)
        tensors[name] = TensorFacts(
            kind=kind,
            dtype=value.dtype,
            shape=tuple(tensor.shape) if placement else value.shape,
            device=str(tensor.device),
            requires_grad=tensor.requires_grad,
            has_grad=tensor.is_leaf and tensor.grad is not None,
            optimized=None if optimized is None else id(tensor) in optimized,
            owner=owner,
            first=known,
            placement=placement,
            unreadable=value.why,
        )
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
        holders = (module._parameters, "parameter"), (module._buffers, "buffer")
        found = [
            (key, value, kind)
            for holder, kind in (*holders, (vars(module), "attribute"))
            for key, value in holder.items()
            if isinstance(value, Tensor)
        ]
        for plain in entry.plain_names if found else ():
            for key, tensor, kind in found:
                name = f"{plain}.{key}" if plain else key
                # A wrapper's own tensor may have the very name of one inside it.
                if seen.setdefault(name, id(tensor)) != id(tensor):
                    name = f"{entry.name}.{key}" if entry.name else key
                if kind == "buffer" and key in module._non_persistent_buffers_set:
                    kind = "non-persistent buffer"
                yield _Slot(name, tensor, kind, plain, module)


def _chosen(modules: Iterable[NamedModule], slots: Iterable[_Slot], selection: str) -> set[str]:
    if selection == LISTED:
        return set()  # they are named by themselves
    if selection == "all":
        return {slot.name for slot in slots}
    if selection == "norm":
        return {s.name for s in slots if is_norm(s.module)}
    if selection == "frozen":
        # By identity, so that the other names of a frozen tensor belong to it.
        ids = {id(getattr(e.module, key)) for e in modules for key in frozen_names(e.module)}
        return {slot.name for slot in slots if id(slot.tensor) in ids}
    pattern = Pattern.parse(selection)
    return {slot.name for slot in slots if pattern.matches(slot.name)}


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
