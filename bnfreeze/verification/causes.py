"""The likeliest cause of a change, from what the two states show. Needs no torch.

A change is put before the rules for its kind, in order; the first one that recognises it gives
the cause. If no rule does, the cause is ``"unknown"``, and the remedy says what would show it.
`verify`, `guard`, ``snapshot(model) == before``, `diff` and the command all take causes from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.facts import OwnerFacts, TensorFacts
from bnfreeze.verification.reasons import BY_KIND, TRACE, UNKNOWN, Reason
from bnfreeze.verification.state import Identity, State

__all__ = ["explained"]


# The same words as bnfreeze.norm_layers, which imports torch.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_FREEZE = 'Use freeze(model, "eval").'


def explained(drifts: Iterable[Drift], before: State, after: State) -> tuple[Drift, ...]:
    """The drifts, each with its cause and remedy."""
    drifts = list(drifts)
    other = _other_model(drifts, before, after)
    return tuple(
        _with(drift, other[drift.kind] if drift.kind in other else _reason(drift, before, after))
        for drift in drifts
    )


def _with(drift: Drift, reason: Reason) -> Drift:
    return replace(drift, cause_code=reason.code, cause=reason.cause, remedy=reason.remedy)


def _reason(drift: Drift, before: State, after: State) -> Reason:
    case = _Case(drift, before, after)
    for rule in _RULES.get(drift.kind, ()):
        reason = rule(case)
        if reason is not None:
            return reason
    return BY_KIND.get(drift.kind, UNKNOWN)


def _other_model(drifts: Sequence[Drift], before: State, after: State) -> dict[str, Reason]:
    """The cause of several kinds of drift at once, if this is another model; by kind."""
    ours, theirs = before.facts.tensors, after.facts.tensors
    gone = sum(name not in theirs for name in ours)
    reshaped = sum(drift.kind == "shape" for drift in drifts)
    replaced = {drift.name for drift in drifts if drift.kind == "replaced"}
    parameters = {n for n, facts in ours.items() if facts.kind == "parameter" and n in theirs}
    if 2 * (gone + reshaped) > len(ours):
        reason = Reason(
            "other-model",
            f"{gone} of {len(ours)} names are missing and {reshaped} have another shape: this is "
            f"another model, or its names begin differently.",
            "Compare one model with itself. If the file has several state_dicts, choose one with "
            "--key.",
        )
        return dict.fromkeys(("removed", "added", "shape", "replaced"), reason)
    if len(parameters) > 1 and parameters <= replaced:
        reason = Reason(
            "other-objects",
            f"All {len(parameters)} parameters are other objects: this is another model or a "
            f"copy, or load_state_dict(assign=True) ran.",
            "Check the model of which the snapshot was taken. For a copy, save the snapshot and "
            "use Snapshot.load.",
        )
        return {"replaced": reason}
    return {}


class _Case:
    """One drift, and what is known about its tensor, its layer and the optimizers."""

    def __init__(self, drift: Drift, before: State, after: State) -> None:
        self.drift, self.before, self.after = drift, before, after
        self.key = drift.name.rpartition(".")[2]
        self.old: TensorFacts | None = before.facts.tensors.get(drift.name)
        self.new: TensorFacts | None = after.facts.tensors.get(drift.name)
        self.layer = self.old.owner if self.old else drift.name
        self.was = _known(before.facts.owners.get(self.layer))
        self.now = _known(after.facts.owners.get(self.layer))
        self.before_id: Identity | None = before.identities.get(drift.name)
        self.after_id: Identity | None = after.identities.get(drift.name)

    @property
    def is_statistic(self) -> bool:
        return self.key in _STATISTICS and self.old is not None and self.old.kind != "parameter"

    def statistics(self, state: State) -> list[StoredTensor | None]:
        """Mean, variance and count of the layer in one of the states."""
        prefix = f"{self.layer}." if self.layer else ""
        facts = [state.facts.tensors.get(prefix + key) for key in _STATISTICS]
        return [state.values.get(one.first) if one else None for one in facts]

    def batches(self) -> int | None:
        """By how much num_batches_tracked rose; None if it is not known."""
        old, new = (self.statistics(state)[2] for state in (self.before, self.after))
        counts = [one.item() if one is not None else None for one in (old, new)]
        if counts[0] is None or counts[1] is None:
            return None
        return int(counts[1] - counts[0])

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The optimizer groups that have the tensor, each with its optimizer's class."""
        tensor = self.after_id.tensor if self.after_id else None
        for optimizer in self.before.live_optimizers():
            for group in optimizer.param_groups:
                if any(member is tensor for member in group["params"]):
                    yield type(optimizer).__name__, group


def _known(facts: OwnerFacts | None) -> OwnerFacts | None:
    # A snapshot of a checkpoint knows no classes and no policies.
    return facts if facts is not None and facts.kind else None


# Values -----------------------------------------------------------------------------------------


def _was_reset(case: _Case) -> Reason | None:
    if not case.is_statistic:
        return None
    mean, var, count = (
        None if one is None or not one.numel else one.values()
        for one in case.statistics(case.after)
    )
    if mean is None or var is None or mean.any() or (var != 1).any():
        return None
    if count is not None and count.any():
        return None
    text = "Every mean of its layer is 0 and every variance is 1: the statistics were reset, by "
    if case.was is None or case.was.policy in _MOVING:
        return Reason(
            "reset",
            text + "reset_running_stats() or a new initialisation.",
            "Freeze the layer: a frozen layer refuses reset_running_stats().",
        )
    return Reason(
        "reset",
        text + "a tool that assigns new ones (Lightning's StochasticWeightAveraging does).",
        "Such tools look for torch's own batch norm. Use freeze(model, 'fused'), which is not one.",
    )


# The policies under which statistics move.
_MOVING = ("none", "affine", "weights", "affine+weights")


def _layer_thawed(case: _Case) -> Reason | None:
    was, now = case.was, case.now
    if was is None or now is None or was.policy == "none" or now.policy == was.policy:
        return None
    return Reason(
        "thawed",
        f"Its layer was frozen by policy {was.policy!r}, and is now a {now.short_kind} with policy "
        f"{now.policy!r}: unfreeze() was called, or something replaced the layer.",
        "Freeze it again, or unfreeze after the check.",
    )


def _forward_in_training(case: _Case) -> Reason | None:
    layer = case.now
    if not case.is_statistic or (layer is not None and layer.policy not in _MOVING):
        return None
    batches = case.batches() if layer is None or layer.counts else None
    training = layer is not None and bool(layer.training)
    if batches is not None and batches <= 0:
        return None
    if not training and not batches:
        return None
    kind = layer.short_kind if layer else "layer"
    text = f"Its layer is a plain {kind}" if layer else "Its layer"
    if layer is not None and layer.policy != "none":
        text = f"Its layer is a {kind} whose policy {layer.policy!r} lets statistics update,"
    if layer is not None:
        text += " in training mode" if training else ", in eval mode now"
    if training and case.was is not None and case.was.mode == "eval":
        text += ": model.train() was called after an eval() that does not last"
    elif batches:
        text += f"{', and' if layer else ''} ran {_times(batches)}"
        text += f"{'' if training else ' in training mode'} since"
    else:
        text += ", where each forward pass updates its statistics"
    steps = (case.drift.step or 0) - (case.drift.since or 0)
    if batches and steps and batches > steps:
        text += f" ({batches} forward passes in {steps} step{'s' if steps != 1 else ''}: does "
        text += "activation checkpointing run it twice?)"
    if layer is not None and layer.momentum == 0 and case.key == "num_batches_tracked":
        text += "; momentum=0 does not stop the count"
    return Reason("forward-in-training", f"{text}.", _FREEZE)


def _object_replaced(case: _Case) -> Reason | None:
    old, new = case.before_id, case.after_id
    if old is None or new is None or old.tensor is new.tensor:
        return None
    return Reason(
        "other-tensor",
        "Another tensor is registered under its name: load_state_dict(assign=True), or an "
        "assignment to the attribute.",
        "Copy into the existing tensor, before freezing.",
    )


def _storage_replaced(case: _Case) -> Reason | None:
    old, new = case.before_id, case.after_id
    if old is None or new is None or not (old.pointer and new.pointer):
        return None
    if old.pointer == new.pointer:
        return None
    return Reason(
        "other-storage",
        "Its storage was replaced: something assigned to .data, or moved the tensor.",
        "Do not assign to .data of a frozen tensor.",
    )


def _was_trained(case: _Case) -> Reason | None:
    if case.new is None or case.new.kind != "parameter" or not case.new.requires_grad:
        return None
    optimizer = next((name for name, _ in case.groups()), "")
    where = f" and it is in {optimizer}" if optimizer else ""
    return Reason(
        "trained",
        f"Its requires_grad is True{where}: it trains.",
        'Use freeze(model, "affine"), or "weights" for what is not a norm layer.',
    )


def _leftover_grad(case: _Case) -> Reason | None:
    grad = case.after_id.tensor.grad if case.after_id and case.new and case.new.has_grad else None
    if grad is None or case.new is None or case.new.requires_grad:
        return None
    for name, group in case.groups():
        forces = [
            f"{key}={group[key]:g}"
            for key in ("weight_decay", "momentum")
            if isinstance(group.get(key), int | float) and group[key]
        ]
        by = name + (f" with {' and '.join(forces)}" if forces else "")
        zeros = ".grad of zeros, which zero_grad(set_to_none=False) leaves,"
        return Reason(
            "leftover-grad",
            f"Its requires_grad is False, but it has a {'.grad' if grad.any() else zeros} and is "
            f"in {by}, which applies it.",
            "Clear it with .grad = None; freeze(model, optimizer=…) does that.",
        )
    return None


def _averaged(case: _Case) -> Reason | None:
    """An average d * x + (1 - d) * x of equal numbers rounds, in some elements."""
    drift = case.drift
    if not drift.changed or drift.changed < 2 or drift.max_ulps is None:
        return None
    if not 0 < drift.max_ulps <= 4:
        return None
    return Reason(
        "averaging",
        f"No element moved by more than {drift.max_ulps} units of its last place. That is "
        f"rounding, as an average (EMA, SWA) of equal numbers has.",
        "Leave frozen tensors out of the average: copy them instead.",
    )


def _was_loaded(case: _Case) -> Reason | None:
    """A load_state_dict or an EMA writes to every tensor in place, changed or not."""
    facts = case.before.facts.tensors
    for where, owner in (("the snapshot", None), ("its layer", case.layer)):
        names = [name for name, one in facts.items() if owner in (None, one.owner)]
        if len(names) > 1 and all(_rewritten(case, name) for name in names):
            return Reason(
                "loaded",
                f"All {len(names)} tensors of {where} were written in place: by "
                f"load_state_dict(), an EMA or another copy.",
                "Load before freezing; leave frozen tensors out of the EMA's copy.",
            )
    return None


def _rewritten(case: _Case, name: str) -> bool:
    old, new = case.before.identities.get(name), case.after.identities.get(name)
    if old is None or new is None or None in (old.version, new.version):
        return False
    return old.tensor is new.tensor and old.version != new.version


def _written_in_place(case: _Case) -> Reason | None:
    old, new = case.before_id, case.after_id
    if old is None or new is None or old.version is None or new.version is None:
        return None
    if old.version != new.version:
        return Reason(
            "in-place",
            f"It was written in place {_times(new.version - old.version)}, by an operation that "
            f"autograd sees: copy_, an EMA, a broadcast, an optimizer.",
            TRACE,
        )
    return Reason(
        "hidden-write",
        "It was written without autograd noticing: through .data, a numpy or dlpack view, or by "
        "a kernel that does not report its writes.",
        TRACE,
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


# Layers and flags -------------------------------------------------------------------------------


def _class_changed(case: _Case) -> Reason | None:
    was, now = case.was, case.now
    if was is None or now is None or was.kind == now.kind:
        return None
    if now.short_kind == "SyncBatchNorm":
        return Reason(
            "sync-batchnorm",
            "convert_sync_batchnorm rebuilt the layer, which is not frozen any more.",
            "Convert first, then freeze.",
        )
    if now.parametrized:
        return Reason(
            "parametrized",
            "A parametrization was registered on the layer.",
            "Parametrize first, then freeze.",
        )
    if was.policy not in ("none", "frozen") and now.policy == "none":
        return Reason(
            "unfrozen",
            "unfreeze() was called, or something replaced the layer.",
            "Freeze it again.",
        )
    return Reason(
        "class-changed",
        "Something changed the layer's class, or replaced the layer.",
        "Change the layer first, then freeze.",
    )


def _layer_replaced(case: _Case) -> Reason | None:
    is_tensor = case.old is not None or case.new is not None
    return None if is_tensor else _class_changed(case)


def _mode_changed(case: _Case) -> Reason | None:
    if case.was is None or case.now is None or (case.was.mode, case.now.mode) != ("eval", "train"):
        return None
    return Reason(
        "train-called", "model.train() was called after an eval() that does not last.", _FREEZE
    )


def _policy_changed(case: _Case) -> Reason | None:
    if case.was is None or case.now is None or case.was.policy == case.now.policy:
        return None
    return Reason("frozen-again", "freeze() was called again.", "Take the snapshot afterwards.")


_RULES: dict[str, tuple[Callable[[_Case], Reason | None], ...]] = {
    "value": (
        _was_reset,
        _layer_thawed,
        _forward_in_training,
        _object_replaced,
        _storage_replaced,
        _was_trained,
        _leftover_grad,
        _averaged,
        _was_loaded,
        _written_in_place,
    ),
    "thawed": (_class_changed, _mode_changed, _policy_changed),
    "mode": (_mode_changed,),
    "replaced": (_layer_replaced,),
}
