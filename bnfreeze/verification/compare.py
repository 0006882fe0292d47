"""Two states compared: what changed from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.verification import values
from bnfreeze.verification.causes import explained
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.facts import Facts, OwnerFacts, TensorFacts
from bnfreeze.verification.state import State

if TYPE_CHECKING:
    from bnfreeze.verification.on_device import PendingCheck

__all__ = ["DIGESTED", "compare"]

DIGESTED = "Values were compared by SHA-256: equal up to a collision."
_FROM_FILE = (
    "The snapshot is a copy or was read from a file, which does not show the device, whether a "
    "parameter was replaced by another with the same bits, or what optimizers have."
)
_INSTANTS = "A change that was undone between the two moments is seen by guard(trace=True) only."


def compare(
    before: State,
    after: State,
    *,
    gathered: bool = False,
    step: int | None = None,
    since: int | None = None,
    pending: PendingCheck | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DriftReport:
    """What changed from `before` to `after`.

    Args:
        before: what must not change; the tensors selected in it are compared.
        after: what is now; it may have more tensors than `before`.
        gathered: whether other ranks check their shards of what is sharded.
        step: the optimizer steps completed now.
        since: those completed at the last check that found no drift.
        pending: takes the values on an accelerator; it is asked for the answer later.
        progress: is called with how many tensors of files are compared, and of how many.
    """
    changes = _changes(before, after, gathered, pending, progress)
    drifts = [replace(change, step=step, since=since) for change in changes]
    names = [*before.facts.tensors, *after.facts.tensors]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    # In the model's order, a layer after its tensors.
    last = {facts.owner: places[name] for name, facts in before.facts.tensors.items()}
    # Values come before what else is known of a tensor.
    drifts.sort(key=lambda d: (places.get(d.name, last.get(d.name, 0)), d.kind != "value"))
    notes = [_INSTANTS]
    if before.digests or after.digests:
        notes.append(DIGESTED)
    if not before.identities or not after.identities:
        notes.append(_FROM_FILE)
    distinct = {facts.first for facts in before.facts.tensors.values()}
    checked = sum(name in after.facts.tensors for name in distinct)
    return DriftReport(explained(drifts, before, after), checked, tuple(notes))


def _changes(
    before: State,
    after: State,
    gathered: bool,
    pending: PendingCheck | None,
    progress: Callable[[int, int], None],
) -> Iterator[Drift]:
    ours, theirs = before.facts.tensors, after.facts.tensors
    for name, facts in theirs.items():
        if name not in ours:
            yield Drift(name, "added", after=facts.kind)
    comparable = []
    for name, old in ours.items():
        new = theirs.get(name)
        if new is None:
            yield Drift(name, "removed", before=old.kind)
            continue
        # What is reported of a tensor is not reported again under its other names.
        if old.first != name and old.first in theirs and theirs[old.first].first == new.first:
            continue
        if old != new or _another(name, before, after):
            yield from _flags(name, before, after)
        doubt = _doubt(old, new, gathered)
        if doubt:
            yield Drift(name, "unverified", after=doubt)
        elif (old.dtype, old.shape) == (new.dtype, new.shape):
            comparable.append(name)
    yield from _values(comparable, before, after, pending, progress)
    yield from _aliases(before.facts, after.facts)
    for name, was in before.facts.owners.items():
        now = after.facts.owners.get(name)
        if now is not None:
            yield from _layer(name, was, now, exact=bool(before.identities))


def _flags(name: str, before: State, after: State) -> Iterator[Drift]:
    old, new = before.facts.tensors[name], after.facts.tensors[name]
    if "" in (old.kind, new.kind):
        pass  # a checkpoint does not say
    elif old.kind != new.kind:
        yield Drift(name, "replaced", before=old.kind, after=new.kind)
    elif old.kind == "parameter" and _another(name, before, after):
        yield Drift(
            name, "replaced", before="the parameter that was there", after="another parameter"
        )
    if old.dtype != new.dtype:
        yield Drift(name, "dtype", before=old.dtype, after=new.dtype)
    if old.shape != new.shape:
        yield Drift(name, "shape", before=str(old.shape), after=str(new.shape))
    if old.device != new.device and before.identities and after.identities:
        yield Drift(name, "device", before=old.device, after=new.device)
    if None not in (old.requires_grad, new.requires_grad) and (
        old.requires_grad != new.requires_grad
    ):
        yield Drift(name, "requires-grad", before=old.requires_grad, after=new.requires_grad)
    if None not in (old.optimized, new.optimized) and old.optimized != new.optimized:
        yield Drift(name, "optimizer", before=old.optimized, after=new.optimized)
    if new.has_grad and not old.has_grad and old.requires_grad is False:
        yield Drift(name, "grad", before=False, after=True)


def _another(name: str, before: State, after: State) -> bool:
    old, new = before.identities.get(name), after.identities.get(name)
    return old is not None and new is not None and old.tensor is not new.tensor


def _doubt(old: TensorFacts, new: TensorFacts, gathered: bool) -> str:
    """Why two tensors cannot be compared; empty if they can."""
    if old.placement != new.placement:
        sharding = [place or "not sharded" for place in (old.placement, new.placement)]
        return f"its sharding changed: {sharding[0]} → {sharding[1]}"
    if new.placement and not gathered:
        return f"it is sharded ({new.placement}), and this rank sees only its own shard"
    return new.unreadable or old.unreadable


def _values(
    names: list[str],
    before: State,
    after: State,
    pending: PendingCheck | None,
    progress: Callable[[int, int], None],
) -> Iterator[Drift]:
    if before.digests or after.digests:
        for done, name in enumerate(names):
            progress(done, len(names))
            if _digest(name, before) != _digest(name, after):
                yield Drift(name, "value", total=prod(before.facts.tensors[name].shape))
        return
    pairs, compared = [], []
    for name in names:
        old, new = _value(name, before), _value(name, after)
        if old.shape == new.shape:
            pairs.append((old, new))
            compared.append(name)
        else:  # shards: their facts have the shape of the whole tensor
            sizes = f"{old.shape} → {new.shape}"
            yield Drift(name, "unverified", after=f"the shape of its shard changed: {sizes}")
    for index, found in values.unequal(compared, pairs, pending, progress).items():
        yield Drift(
            compared[index],
            "value",
            changed=found.changed,
            total=pairs[index][0].numel,
            first_index=found.first_index,
            before=found.before,
            after=found.after,
            max_abs=found.max_abs,
            max_ulps=found.max_ulps,
        )


def _value(name: str, state: State) -> StoredTensor:
    return state.values[state.facts.tensors[name].first]


def _digest(name: str, state: State) -> str:
    """The digest under this name; computed if only the values are known."""
    known = state.digests.get(name)
    return values.digest(name, _value(name, state)) if known is None else known


def _aliases(before: Facts, after: Facts) -> Iterator[Drift]:
    """One drift for each group of names that was merged or split."""
    common = before.tensors.keys() & after.tensors.keys()
    old, new = _partners(before, common), _partners(after, common)
    reported: set[str] = set()
    for name in before.tensors:
        if name not in common or name in reported or old[name] == new[name]:
            continue
        reported |= {*old[name], *new[name]}
        others = [", ".join(n for n in group if n != name) for group in (old[name], new[name])]
        yield Drift(name, "aliasing", before=others[0], after=others[1])


def _partners(facts: Facts, common: set[str]) -> dict[str, tuple[str, ...]]:
    partners: dict[str, tuple[str, ...]] = {name: (name,) for name in common}
    for group in facts.groups:
        kept = tuple(sorted(name for name in group if name in common))
        partners.update(dict.fromkeys(kept, kept))
    return partners


def _layer(name: str, was: OwnerFacts, now: OwnerFacts, *, exact: bool) -> Iterator[Drift]:
    if not was.kind or not now.kind:
        return  # a checkpoint does not say
    # In another process a class may come from another module: __main__, or an older torch.
    same = was.kind == now.kind if exact else was.short_kind == now.short_kind
    flipped = (was.mode, now.mode) == ("eval", "train")
    if was.policy == "none":
        if not same and now.policy == "none":
            yield Drift(name, "replaced", before=was.short_kind, after=now.short_kind)
        elif flipped:
            yield Drift(name, "mode", before="eval mode", after="train mode")
    elif not same:
        yield Drift(name, "thawed", before=was.short_kind, after=now.short_kind)
    elif was.policy != now.policy:
        yield Drift(name, "thawed", before=f"policy {was.policy}", after=f"policy {now.policy}")
    elif flipped:
        yield Drift(name, "thawed", before="eval mode", after="train mode")
