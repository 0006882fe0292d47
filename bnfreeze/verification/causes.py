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
from bnfreeze.verification.reasons import Reason, because
from bnfreeze.verification.state import Identity, OwnerFacts, State, TensorFacts

__all__ = ["explained", "with_reason"]

# The same words as bnfreeze.norm_layers, which imports torch.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# The policies under which statistics move.
_MOVING = ("none", "affine", "weights", "affine+weights")


def explained(drifts: Sequence[Drift], before: State, after: State) -> tuple[Drift, ...]:
    """The drifts, each with its cause and remedy."""
    other = _other_model(drifts, before, after)
    cases = [_Case(drift, before, after) for drift in drifts]
    return tuple(with_reason(c.drift, other.get(c.drift.kind) or _reason(c)) for c in cases)


def with_reason(drift: Drift, reason: Reason) -> Drift:
    """The drift with this cause and remedy."""
    return replace(drift, cause_code=reason.code, cause=reason.cause, remedy=reason.remedy)


class _Case:
    """One drift, and what is known about its tensor, its layer and the optimizers."""

    def __init__(self, drift: Drift, before: State, after: State) -> None:
        self.drift, self.before, self.after = drift, before, after
        self.old: TensorFacts | None = before.tensors.get(drift.name)
        self.new: TensorFacts | None = after.tensors.get(drift.name)
        self.layer = self.old.owner if self.old else drift.name
        self.was = _known(before.owners.get(self.layer))
        self.now = _known(after.owners.get(self.layer))
        self.identities = _identities(self, drift.name)

    def statistics(self, state: State) -> list[StoredTensor | None]:
        """Mean, variance and count of the layer in one of the states."""
        prefix = f"{self.layer}." if self.layer else ""
        facts = [state.tensors.get(prefix + key) for key in _STATISTICS]
        return [state.values.get(one.first) if one else None for one in facts]

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The optimizer groups that have the tensor, each with its optimizer's class."""
        tensor = self.identities[1].tensor if self.identities else None
        for optimizer in self.before.live_optimizers():
            for group in optimizer.param_groups:
                if any(member is tensor for member in group["params"]):
                    yield type(optimizer).__name__, group


def _known(facts: OwnerFacts | None) -> OwnerFacts | None:
    # A checkpoint shows no classes and no policies.
    return facts if facts is not None and facts.kind else None


def _identities(case: _Case, name: str) -> tuple[Identity, Identity] | None:
    """The object under the name, before and after; None if one is not known."""
    old, new = case.before.identities.get(name), case.after.identities.get(name)
    return None if old is None or new is None else (old, new)


def _reason(case: _Case) -> Reason:
    kind, reason = case.drift.kind, None
    if kind == "value" and case.old is None:
        return because("eps")  # the only value that is no tensor
    if kind == "value":
        rules = (_statistics_moved, _replaced, _optimized, _averaged, _written)
        reason = next(filter(None, (rule(case) for rule in rules)), None)
    elif kind in ("thawed", "mode") or (kind == "replaced" and not (case.old or case.new)):
        reason = _layer_changed(case)
    reason = reason or because(kind)
    if case.now and case.now.remedy and reason.code in ("forward-in-training", "train-called"):
        return reason._replace(remedy=case.now.remedy)
    return reason


def _other_model(drifts: Iterable[Drift], before: State, after: State) -> dict[str, Reason]:
    """The cause of several kinds of drift at once, if this is another model; by kind."""
    ours, theirs = before.tensors, after.tensors
    gone = sum(name not in theirs for name in ours)
    reshaped = sum(drift.kind == "shape" for drift in drifts)
    if 2 * (gone + reshaped) > len(ours):
        reason = because("other-model", gone=gone, all=len(ours), reshaped=reshaped)
        return dict.fromkeys(("removed", "added", "shape", "replaced"), reason)
    replaced = {drift.name for drift in drifts if drift.kind == "replaced"}
    parameters = {n for n, facts in ours.items() if facts.kind == "parameter" and n in theirs}
    if len(parameters) > 1 and parameters <= replaced:
        return {"replaced": because("other-objects", count=len(parameters))}
    return {}


def _statistics_moved(case: _Case) -> Reason | None:
    """A reset, a layer that was thawed, or a forward pass in training mode."""
    old, was, now = case.old, case.was, case.now
    key = case.drift.name.rpartition(".")[2]
    is_statistic = old is not None and (
        (key in _STATISTICS and old.kind != "parameter")
        # Of a foreign norm layer, what does not train.
        or (now is not None and now.remedy != "" and not old.requires_grad)
    )
    if is_statistic and _was_reset(case):
        return because("reset")
    if was and now and was.policy not in ("none", now.policy):
        return because("thawed", was=was.policy, now=now.policy, kind=now.short_kind)
    if not is_statistic or (now and now.policy not in _MOVING):
        return None
    batches, training = _batches(case), now is not None and now.training
    if (batches is not None and batches <= 0) or not (training or batches):
        return None
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
    return because("forward-in-training", sentences=" ".join(sentences))


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


def _replaced(case: _Case) -> Reason | None:
    """Another tensor, or another storage."""
    if not case.identities:
        return None
    old, new = case.identities
    if old.tensor is not new.tensor:
        return because("other-tensor")
    if old.pointer and new.pointer and old.pointer != new.pointer:
        return because("other-storage")
    return None


def _optimized(case: _Case) -> Reason | None:
    """An optimizer's step, with a new gradient or with one that was left over."""
    old, new = case.old, case.new
    if old is None or new is None or old.kind != "parameter":
        return None
    requires_grad = old.requires_grad if new.requires_grad is None else new.requires_grad
    name, group = next(case.groups(), ("", {}))
    if requires_grad:
        return because("trained", where=f" and it is in {name}" if name else "")
    grad = case.identities[1].tensor.grad if case.identities and new.has_grad else None
    if grad is None or not name:
        return None
    forces = [
        f"{key}={group[key]:g}"
        for key in ("weight_decay", "momentum")
        if isinstance(group.get(key), int | float) and group[key]
    ]
    zeros = ".grad of zeros, which zero_grad(set_to_none=False) leaves,"
    return because(
        "leftover-grad",
        grad=".grad" if grad.any() else zeros,
        optimizer=name + (f" with {' and '.join(forces)}" if forces else ""),
    )


def _averaged(case: _Case) -> Reason | None:
    """An average d * x + (1 - d) * x of equal numbers rounds, in some elements."""
    changed, ulps = case.drift.changed or 0, case.drift.max_ulps or 0
    return because("averaging", ulps=ulps) if changed > 1 and 0 < ulps <= 4 else None


def _written(case: _Case) -> Reason | None:
    """A write in place: to all tensors, or to this one; seen by autograd, or not.

    A load_state_dict or an EMA writes to every tensor, changed or not.
    """
    for where, owner in (("checked tensors", None), ("tensors of the layer", case.layer)):
        names = [n for n, one in case.before.tensors.items() if owner in (None, one.owner)]
        if len(names) > 1 and all(_writes(case, name) for name in names):
            return because("loaded", count=len(names), where=where)
    writes = _writes(case, case.drift.name)
    if writes is None:
        return None
    return because("in-place", times=_times(writes)) if writes else because("hidden-write")


def _writes(case: _Case, name: str) -> int | None:
    """How often autograd saw the tensor written in place; None if it is not known."""
    known = _identities(case, name)
    if known is None or known[0].tensor is not known[1].tensor:
        return None
    start, end = known[0].version, known[1].version
    return None if start is None or end is None else end - start


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _layer_changed(case: _Case) -> Reason | None:
    """Another class, policy or mode of a layer."""
    was, now = case.was, case.now
    if was is None or now is None:
        return None
    if was.kind != now.kind and now.short_kind == "SyncBatchNorm":
        return because("sync-batchnorm")
    if was.kind != now.kind and now.short_kind.startswith("Parametrized"):
        return because("parametrized")
    if was.policy not in ("none", "frozen") and now.policy == "none":
        return because("unfrozen")
    if was.kind != now.kind:
        return because("class-changed")
    if now.woken_since(was):
        return because("train-called")
    return because("frozen-again") if was.policy != now.policy else None
