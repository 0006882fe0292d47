"""The likeliest cause of a change, from what the two states show. Needs no torch.

The first rule that recognises a change gives the cause. If none does, the cause is ``"unknown"``,
and the remedy says what would show it. `verify`, `guard`, ``snapshot(model) == before``, `diff`
and the command all take causes from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.reasons import because
from bnfreeze.verification.state import Identity, OwnerFacts, State, TensorFacts

__all__ = ["explained"]

# The same words as bnfreeze.norm_layers, which imports torch.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# The policies under which statistics move.
_MOVING = ("none", "affine", "weights", "affine+weights")
# Those that freeze no parameter.
_TRAINING = ("none", "frozen", "stats", "eval")

# A code of bnfreeze.verification.reasons, and what its sentence needs.
Cause = tuple[str, dict[str, object]]


def explained(drifts: Sequence[Drift], before: State, after: State) -> tuple[Drift, ...]:
    """The drifts, each with its cause and remedy."""
    other = _other_model(drifts, before, after)
    return tuple(_explained(_Case(d, before, after), other.get(d.kind)) for d in drifts)


class _Case:
    """One drift, and what is known about its tensor, its layer and the optimizers."""

    def __init__(self, drift: Drift, before: State, after: State) -> None:
        self.drift, self.before, self.after = drift, before, after
        self.old: TensorFacts | None = before.tensors.get(drift.name)
        self.new: TensorFacts | None = after.tensors.get(drift.name)
        self.layer = self.old.owner if self.old else drift.name
        self.was = _known(before.owners.get(self.layer))
        self.now = _known(after.owners.get(self.layer))

    def identities(self, name: str) -> tuple[Identity, Identity] | None:
        """The object under the name, before and after; None if one is not known."""
        old, new = self.before.identities.get(name), self.after.identities.get(name)
        return None if old is None or new is None else (old, new)

    def statistics(self, state: State) -> list[StoredTensor | None]:
        """Mean, variance and count of the layer in one of the states."""
        prefix = f"{self.layer}." if self.layer else ""
        facts = [state.tensors.get(prefix + key) for key in _STATISTICS]
        return [state.values.get(one.first) if one else None for one in facts]


def _known(facts: OwnerFacts | None) -> OwnerFacts | None:
    # A checkpoint shows no classes and no policies.
    return facts if facts is not None and facts.kind else None


def _explained(case: _Case, known: Cause | None) -> Drift:
    code, details = known or next(_causes(case), (case.drift.kind, {}))
    found = because(case.drift, code, **details)
    if case.now and code in ("forward-in-training", "train-called"):
        more = f'Use freeze(model, "eval+{case.now.policy}").' if case.now.policy != "none" else ""
        return replace(found, remedy=case.now.remedy or more or found.remedy)
    return found


def _causes(case: _Case) -> Iterator[Cause]:
    """What may be the cause, the likeliest first; nothing if the kind says all."""
    if case.drift.kind == "value" and case.old is None:
        yield "eps", {}  # the only value that is no tensor
    elif case.drift.kind == "value":
        for rule in (_statistics_moved, _replaced, _optimized, _averaged, _written):
            yield from rule(case)
    elif case.drift.kind in ("thawed", "mode", "replaced") and case.old is None:
        yield from _layer_changed(case)


def _other_model(drifts: Iterable[Drift], before: State, after: State) -> dict[str, Cause]:
    """The cause of several kinds of drift at once, if this is another model; by kind."""
    ours, theirs = before.tensors, after.tensors
    gone = sum(name not in theirs for name in ours)
    reshaped = sum(drift.kind == "shape" for drift in drifts)
    if 2 * (gone + reshaped) > len(ours):
        details: dict[str, object] = {"gone": gone, "all": len(ours), "reshaped": reshaped}
        return dict.fromkeys(("removed", "added", "shape", "replaced"), ("other-model", details))
    replaced = {drift.name for drift in drifts if drift.kind == "replaced"}
    parameters = {n for n, facts in ours.items() if facts.kind == "parameter" and n in theirs}
    if len(parameters) > 1 and parameters <= replaced:
        return {"replaced": ("other-objects", {"count": len(parameters)})}
    return {}


def _statistics_moved(case: _Case) -> Iterator[Cause]:
    """A reset, a layer that was thawed, or a forward pass in training mode."""
    old, was, now = case.old, case.was, case.now
    key = case.drift.name.rpartition(".")[2]
    is_statistic = old is not None and (
        (key in _STATISTICS and old.kind != "parameter")
        # Of a foreign norm layer, what does not train.
        or (now is not None and now.remedy != "" and not old.requires_grad)
    )
    if is_statistic and _was_reset(case):
        yield "reset", {}
    if was and now and was.policy not in ("none", now.policy):
        yield "thawed", {"was": was.policy, "now": now.policy, "kind": now.short_kind}
    if not is_statistic or (now and now.policy not in _MOVING):
        return
    batches, training = _batches(case), now is not None and now.training
    if (batches is not None and batches <= 0) or not (training or batches):
        return
    sentences = []
    if now:
        text = f"The layer is a plain {now.short_kind}"
        if now.policy != "none":
            text = f"The layer's policy {now.policy!r} lets statistics update, and it is"
        text += " in training mode" if training else " in eval mode now"
        if was and now.woken_since(was):
            text += ": model.train() was called after an eval() that does not last"
        sentences.append(f"{text}.")
    if batches:
        steps = (case.drift.step or 0) - (case.drift.since or 0)
        text = f"{'It' if now else 'The layer'} ran {_times(batches)} in training mode since"
        if 0 < steps < batches:
            text += f" ({batches} forward passes in {steps} step{'s' if steps > 1 else ''}: does "
            text += "activation checkpointing run it twice?)"
        sentences.append(f"{text}.")
    yield "forward-in-training", {"sentences": " ".join(sentences)}


def _batches(case: _Case) -> int | None:
    """By how much num_batches_tracked rose; None if that is not known, or not counted."""
    start, end = (
        None if (count := case.statistics(state)[2]) is None else count.item()
        for state in (case.before, case.after)
    )
    counts = case.now is None or "InstanceNorm" not in case.now.kind
    return int(end - start) if counts and start is not None and end is not None else None


def _was_reset(case: _Case) -> bool:
    """Whether mean, variance and count are what a new layer has."""
    mean, var, count = (
        None if one is None or not one.numel else one.values()
        for one in case.statistics(case.after)
    )
    if mean is None or var is None or mean.any() or (var != 1).any():
        return False
    return count is None or not count.any()


def _replaced(case: _Case) -> Iterator[Cause]:
    """Another tensor, or another storage."""
    if known := case.identities(case.drift.name):
        old, new = known
        if old.tensor is not new.tensor:
            yield "other-tensor", {}
        if old.pointer and new.pointer and old.pointer != new.pointer:
            yield "other-storage", {}


def _optimized(case: _Case) -> Iterator[Cause]:
    """An optimizer's step, with a new gradient or with one that was left over."""
    old, new, known = case.old, case.new, case.identities(case.drift.name)
    if old is None or new is None or old.kind != "parameter":
        return
    tensor = known[1].tensor if known else None
    groups: list[tuple[str, dict[str, Any]]] = [
        (type(optimizer).__name__, group)
        for optimizer in case.before.live_optimizers()
        for group in optimizer.param_groups
        if any(member is tensor for member in group["params"])
    ]
    name, group = groups[0] if groups else ("", {})
    if old.requires_grad if new.requires_grad is None else new.requires_grad:
        where = f" and it is in {name}" if name else ""
        policy = case.now.policy if case.now else "none"
        own = case.drift.name.rpartition(".")[2] in ("weight", "bias")
        if "weights" in policy or (own and policy not in _TRAINING):
            yield "affine-thawed", {"where": where, "policy": policy}
        yield "trained", {"where": where}
        return
    grad = tensor.grad if tensor is not None and new.has_grad else None
    if name and grad is not None:
        forces = [
            f"{key}={group[key]:g}"
            for key in ("weight_decay", "momentum")
            if isinstance(group.get(key), int | float) and group[key]
        ]
        text = ".grad"
        if not (old.has_grad or old.requires_grad):
            text = ".grad that the optimizer (Muon) or an edit of gradients (PCGrad) gave it,"
        elif not grad.any():
            text = ".grad of zeros, which zero_grad(set_to_none=False) leaves,"
        yield (
            "leftover-grad",
            {
                "grad": text,
                "optimizer": name + (f" with {' and '.join(forces)}" if forces else ""),
            },
        )


def _averaged(case: _Case) -> Iterator[Cause]:
    """An average d * x + (1 - d) * x of equal numbers rounds, in some elements."""
    changed, ulps = case.drift.changed or 0, case.drift.max_ulps or 0
    if changed > 1 and 0 < ulps <= 4:
        yield "averaging", {"ulps": ulps}


def _written(case: _Case) -> Iterator[Cause]:
    """A write in place: to all tensors, or to this one; seen by autograd, or not.

    A load_state_dict or an EMA writes to every tensor, changed or not.
    """
    for where, owner in (("checked tensors", None), ("tensors of the layer", case.layer)):
        names = [n for n, one in case.before.tensors.items() if owner in (None, one.owner)]
        if len(names) > 1 and all(_writes(case, name) for name in names):
            yield "loaded", {"count": len(names), "where": where}
    writes = _writes(case, case.drift.name)
    if writes is not None:
        yield ("in-place", {"times": _times(writes)}) if writes else ("hidden-write", {})


def _writes(case: _Case, name: str) -> int | None:
    """How often autograd saw the tensor written in place; None if it is not known."""
    known = case.identities(name)
    if known is None or known[0].tensor is not known[1].tensor:
        return None
    start, end = known[0].version, known[1].version
    return None if start is None or end is None else end - start


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _layer_changed(case: _Case) -> Iterator[Cause]:
    """Another class, policy or mode of a layer."""
    was, now = case.was, case.now
    if was is None or now is None:
        return
    other = was.kind != now.kind
    if other and now.short_kind == "SyncBatchNorm":
        yield "sync-batchnorm", {}
    if other and now.short_kind.startswith("Parametrized"):
        yield "parametrized", {}
    if was.policy not in ("none", "frozen") and now.policy == "none":
        yield "unfrozen", {}
    if other:
        yield "class-changed", {}
    if now.woken_since(was):
        yield "train-called", {}
    if was.policy != now.policy:
        yield "frozen-again", {}
