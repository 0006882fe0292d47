"""Two states compared: what changed from one to the other. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isclose, prod

from bnfreeze.checkpoints import naming_file
from bnfreeze.verification.causes import because, explained
from bnfreeze.verification.drift import Drift, DriftReport, Kind
from bnfreeze.verification.state import OwnerFacts, State, TensorFacts
from bnfreeze.verification.values import locate

DIGESTED = "Values were compared by SHA-256: equal up to a collision."
_FROM_FILE = (
    "The snapshot is a copy or was read from a file, which does not show the device, whether a "
    "parameter was replaced by another with the same bits, or what optimizers have."
)
_INSTANTS = "A change that was undone between the two moments is seen by guard(trace=True) only."

# The kind of drift if one of these facts differs.
_KINDS: dict[str, Kind] = {
    "kind": "replaced",
    "dtype": "dtype",
    "shape": "shape",
    "device": "device",
    "requires_grad": "requires-grad",
    "optimized": "optimizer",
}

Progress = Callable[[int, int], None]


def compare(
    before: State,
    after: State,
    *,
    gathered: bool = False,
    step: int | None = None,
    since: int | None = None,
    progress: Progress = lambda done, total: None,
) -> DriftReport:
    """What changed from `before` to `after`.

    Args:
        before: what must not change; the tensors selected in it are compared.
        after: what is now; it may have more tensors than `before`.
        gathered: whether other ranks check their shards of what is sharded.
        step: the optimizer steps completed now.
        since: those completed at the last check that found no drift.
        progress: is called with how many tensors of files are compared, and of how many.
    """
    drifts = [
        replace(drift, step=step, since=since)
        for drift in _changes(before, after, gathered, progress)
    ]
    # In the model's order, a layer after its tensors, and values before what else is known.
    names = dict.fromkeys([*before.tensors, *after.tensors])
    places = {name: place for place, name in enumerate(names)}
    last = {facts.owner: places[name] for name, facts in before.tensors.items()}
    last |= {f"{owner}.eps": place for owner, place in last.items()}
    drifts.sort(key=lambda d: (places.get(d.name, last.get(d.name, 0)), d.kind != "value"))
    notes = [_INSTANTS]
    if before.digests or after.digests:
        notes.append(DIGESTED)
    if not _exact(before, after):
        notes.append(_FROM_FILE)
    distinct = {facts.first for facts in before.tensors.values()} & after.tensors.keys()
    checked = distinct - {drift.name for drift in drifts if drift.kind == "unverified"}
    return DriftReport(explained(drifts, before, after), len(checked), tuple(notes))


def _exact(before: State, after: State) -> bool:
    """Whether both are of this process: only then are devices and objects compared."""
    return bool(before.identities and after.identities)


def _changes(before: State, after: State, gathered: bool, progress: Progress) -> Iterator[Drift]:
    ours, theirs = before.tensors, after.tensors
    for name, facts in theirs.items():
        if name not in ours:
            yield Drift(name, "added", after=facts.kind)
    comparable = []
    for name, old in ours.items():
        if name not in theirs:
            yield Drift(name, "removed", before=old.kind)
            continue
        new = theirs[name]
        # What is reported of a tensor is not reported again under its other names.
        if old.first != name and old.first in theirs and theirs[old.first].first == new.first:
            continue
        yield from _flags(name, before, after)
        if doubt := _doubt(old, new, gathered):
            yield Drift(name, "unverified", after=doubt)
        elif (old.dtype, old.shape) == (new.dtype, new.shape):
            comparable.append(name)
    yield from _values(comparable, before, after, progress)
    yield from _aliases(before, after)
    for name, was in before.owners.items():
        now = after.owners.get(name)
        if now and was.kind and now.kind:  # a checkpoint does not say
            yield from _layer(name, was, now, exact=bool(before.identities))
        if now and was.eps is not None and now.eps is not None:
            # ONNX keeps it in float32.
            tolerance = 0.0 if _exact(before, after) else 1e-6
            if not isclose(was.eps, now.eps, rel_tol=tolerance):
                eps, change = f"{name}.eps" if name else "eps", abs(now.eps - was.eps)
                drift = Drift(eps, "value", 1, 1, (), was.eps, now.eps, max_abs=change)
                yield because(drift, "eps")


def _flags(name: str, before: State, after: State) -> Iterator[Drift]:
    old, new = before.tensors[name], after.tensors[name]
    for fact, kind in _KINDS.items() if old != new else ():
        was, now = getattr(old, fact), getattr(new, fact)
        known = was not in (None, "") and now not in (None, "")
        if known and was != now and (fact != "device" or _exact(before, after)):
            shown = (str(was), str(now)) if fact == "shape" else (was, now)
            yield Drift(name, kind, before=shown[0], after=shown[1])
    if (
        old.kind == new.kind == "parameter"
        and _exact(before, after)
        and before.identities[name].tensor is not after.identities[name].tensor
    ):
        was, now = "the parameter that was there", "another parameter"
        yield Drift(name, "replaced", before=was, after=now)
    if new.has_grad and not old.has_grad and old.requires_grad is False:
        yield Drift(name, "grad", before=False, after=True)


def _doubt(old: TensorFacts, new: TensorFacts, gathered: bool) -> str:
    """Why two tensors cannot be compared; empty if they can."""
    if old.placement != new.placement:
        sharding = [place or "not sharded" for place in (old.placement, new.placement)]
        return f"its sharding changed: {sharding[0]} → {sharding[1]}"
    if new.placement and not gathered:
        return f"it is sharded ({new.placement}), and this rank sees only its own shard"
    return new.unreadable or old.unreadable


def _values(
    names: Sequence[str], before: State, after: State, progress: Progress
) -> Iterator[Drift]:
    digested = bool(before.digests or after.digests)
    pairs = {} if digested else {name: (before.value(name), after.value(name)) for name in names}
    # Live tensors are compared on their own device; only what differs there is read from it.
    live = {
        name: (old.tensor, new.tensor)
        for name, (old, new) in pairs.items()
        if hasattr(old, "tensor") and hasattr(new, "tensor") and old.shape == new.shape
    }
    if live:
        from bnfreeze.verification.on_device import unequal_tensors

        unequal = unequal_tensors(live)
        names = [name for name in names if name not in live or name in unequal]
    for done, name in enumerate(names):
        progress(done, len(names))
        with naming_file(name):
            if digested:
                if before.digest(name) != after.digest(name):
                    yield Drift(name, "value", total=prod(before.tensors[name].shape))
                continue
            old, new = pairs[name]
            if old.shape != new.shape:  # shards: their facts have the shape of the whole tensor
                sizes = f"{old.shape} → {new.shape}"
                yield Drift(name, "unverified", after=f"the shape of its shard changed: {sizes}")
            elif drift := locate(name, old, new):
                yield drift


def _aliases(before: State, after: State) -> Iterator[Drift]:
    """One drift for each group of names that was merged or split."""
    common = before.tensors.keys() & after.tensors.keys()
    partners: list[dict[str, list[str]]] = []
    for state in (before, after):
        groups = [sorted(common.intersection(group)) for group in state.groups]
        partners.append({name: group for group in groups for name in group})
    reported: set[str] = set()
    for name in before.tensors:
        old, new = (by_name.get(name, [name]) for by_name in partners)
        if name not in common or name in reported or old == new:
            continue
        reported.update(old, new)
        others = [", ".join(n for n in group if n != name) for group in (old, new)]
        yield Drift(name, "aliasing", before=others[0], after=others[1])


def _layer(name: str, was: OwnerFacts, now: OwnerFacts, *, exact: bool) -> Iterator[Drift]:
    # In another process a class may come from another module: __main__, or an older torch.
    same = was.kind == now.kind if exact else was.short_kind == now.short_kind
    never_frozen = was.policy == "none"
    unfrozen = was.policy not in ("none", "frozen") and now.policy == "none"
    refrozen = was.policy != now.policy not in ("none", "frozen")
    if not same and (not never_frozen or now.policy == "none"):
        kind: Kind = "replaced" if never_frozen else "thawed"
        code = "unfrozen" if unfrozen else "frozen-again" if refrozen else "class-changed"
        if now.short_kind == "SyncBatchNorm":
            code = "sync-batchnorm"
        elif now.short_kind.startswith("Parametrized"):
            code = "parametrized"
        yield because(Drift(name, kind, before=was.short_kind, after=now.short_kind), code)
    elif not never_frozen and was.policy != now.policy:
        policies = f"policy {was.policy}", f"policy {now.policy}"
        drift = Drift(name, "thawed", before=policies[0], after=policies[1])
        yield because(drift, "unfrozen" if unfrozen else "frozen-again")
    elif now.woken_since(was):
        kind = "mode" if never_frozen else "thawed"
        drift = Drift(name, kind, before="eval mode", after="train mode")
        yield because(drift, "train-called", remedy=now.what_freezes_it)
