"""Two states compared: what changed from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from bnfreeze.verification import bits
from bnfreeze.verification.causes import explain, strangers
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.facts import Facts, OwnerFacts, TensorFacts
from bnfreeze.verification.report import DriftReport
from bnfreeze.verification.state import State

__all__ = ["DIGESTED", "compare"]

DIGESTED = "Values were compared by SHA-256: equal up to a collision."
_FROM_FILE = (
    "The snapshot is a copy or was read from a file, which does not show the device, nor whether "
    "a parameter was replaced by another with the same bits, nor what optimizers hold."
)
_INSTANTS = "A change undone between the two instants is seen by guard(trace=True) alone."


def compare(
    before: State,
    after: State,
    *,
    gathered: bool = False,
    step: int | None = None,
    since: int | None = None,
    later: bits.Later | None = None,
) -> DriftReport:
    """What changed from `before` to `after`.

    Args:
        before: what was promised to stay; its selection is compared.
        after: what is; it may have more tensors than `before`.
        gathered: whether other ranks check their shards of what is sharded.
        step: the optimizer steps completed now.
        since: those completed when all was last seen to be well.
        later: takes the values on an accelerator; their verdict is asked of it.
    """
    changes = _changes(before, after, gathered, later)
    drifts = [replace(change, step=step, since=since) for change in changes]
    names = [*before.facts.tensors, *after.facts.tensors]
    places = {name: place for place, name in reversed(list(enumerate(names)))}
    # In the model's order, a layer after its tensors.
    last = {facts.owner: places[name] for name, facts in before.facts.tensors.items()}
    # What a tensor holds comes before what is noted of it besides.
    drifts.sort(
        key=lambda d: (last[d.name] if d.kind == "thawed" else places[d.name], d.kind != "value")
    )
    notes = [_INSTANTS]
    if before.digests or after.digests:
        notes.append(DIGESTED)
    if not before.identities or not after.identities:
        notes.append(_FROM_FILE)
    distinct = {facts.first for facts in before.facts.tensors.values()}
    checked = sum(name in after.facts.tensors for name in distinct)
    told = [explain(drift, before, after) for drift in drifts]
    return DriftReport(tuple(strangers(told, before, after)), checked, tuple(notes))


def _changes(
    before: State, after: State, gathered: bool, later: bits.Later | None
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
        # What is said of a tensor is not said again of its other names.
        if old.first != name and old.first in theirs and theirs[old.first].first == new.first:
            continue
        if old != new or _another(name, before, after):
            yield from _flags(name, before, after)
        doubt = _doubt(old, new, gathered)
        if doubt:
            yield Drift(name, "unverified", after=doubt)
        elif (old.dtype, old.shape) == (new.dtype, new.shape):
            comparable.append(name)
    yield from _values(comparable, before, after, later)
    yield from _aliases(before.facts, after.facts)
    for name, was in before.facts.owners.items():
        now = after.facts.owners.get(name)
        if now is not None:
            yield from _thawed(name, was, now, exact=bool(before.identities))


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
    if old.device != new.device and before.identities:
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
        return f"it is sharded ({new.placement}), and this rank sees its own shard alone"
    return new.unreadable or old.unreadable


def _values(
    names: list[str], before: State, after: State, later: bits.Later | None
) -> Iterator[Drift]:
    if before.digests or after.digests:
        for name in names:
            total = _count(before.facts.tensors[name])
            if _digest(name, before) != _digest(name, after):
                yield Drift(name, "value", total=total)
        return
    pairs, compared = [], []
    for name in names:
        old, new = _value(name, before), _value(name, after)
        if old.shape == new.shape:
            pairs.append((old.to(new.device), new))
            compared.append(name)
        else:  # shards: the shape that is noted is that of the whole
            sizes = f"{tuple(old.shape)} → {tuple(new.shape)}"
            yield Drift(name, "unverified", after=f"its shard has another shape: {sizes}")
    for index in bits.unequal(pairs, later):
        found = bits.locate(*pairs[index])
        if found is not None:
            yield Drift(
                compared[index],
                "value",
                changed=found.changed,
                total=pairs[index][0].numel(),
                first_index=found.first_index,
                before=found.before,
                after=found.after,
                max_abs=found.max_abs,
            )


def _value(name: str, state: State) -> Tensor:
    return state.values[state.facts.tensors[name].first]


def _digest(name: str, state: State) -> str:
    """The digest under this name, made of the values where only these are known."""
    known = state.digests.get(name)
    return bits.digest(name, _value(name, state)) if known is None else known


def _count(facts: TensorFacts) -> int:
    total = 1
    for size in facts.shape:
        total *= size
    return total


def _aliases(before: Facts, after: Facts) -> Iterator[Drift]:
    """One drift for each group of names that was merged or split."""
    common = before.tensors.keys() & after.tensors.keys()
    old, new = _partners(before, common), _partners(after, common)
    told: set[str] = set()
    for name in before.tensors:
        if name not in common or name in told or old[name] == new[name]:
            continue
        told |= {*old[name], *new[name]}
        others = [", ".join(n for n in group if n != name) for group in (old[name], new[name])]
        yield Drift(name, "aliasing", before=others[0], after=others[1])


def _partners(facts: Facts, common: set[str]) -> dict[str, tuple[str, ...]]:
    partners: dict[str, tuple[str, ...]] = {name: (name,) for name in common}
    for group in facts.groups:
        kept = tuple(sorted(name for name in group if name in common))
        partners.update(dict.fromkeys(kept, kept))
    return partners


def _thawed(name: str, was: OwnerFacts, now: OwnerFacts, *, exact: bool) -> Iterator[Drift]:
    if not was.kind:
        return  # a checkpoint does not say
    # Read elsewhere, a class may come from another module: __main__, or an older torch.
    same = was.kind == now.kind if exact else was.short_kind == now.short_kind
    if not same:
        yield Drift(name, "thawed", before=was.short_kind, after=now.short_kind)
    elif was.policy != now.policy:
        yield Drift(name, "thawed", before=f"policy {was.policy}", after=f"policy {now.policy}")
    elif (was.mode, now.mode) == ("eval", "train"):
        yield Drift(name, "thawed", before="eval mode", after="train mode")
