"""The likeliest cause of a change, from what the two states show; never a guess.

A change is put before the rules for its kind, in order; the first that recognises it speaks. Where
none does, the report says that the cause cannot be told, and what would tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bnfreeze.norm_layers import STATISTICS
from bnfreeze.torch_private import _InstanceNorm
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.facts import OwnerFacts, TensorFacts
from bnfreeze.verification.state import State

__all__ = ["TRACE", "explain", "strangers"]

Reason = tuple[str, str]

_FREEZE = 'Use freeze(model, "eval").'
# The remedy where only a trace would tell more.
TRACE = "guard(model, trace=True) names the line that writes."


def explain(drift: Drift, before: State, after: State) -> Drift:
    """The drift with its cause and its remedy."""
    case = _Case(drift, before, after)
    for rule in _RULES.get(drift.kind, ()):
        reason = rule(case)
        if reason is not None:
            return replace(drift, cause=reason[0], remedy=reason[1])
    if drift.kind in _KNOWN:
        cause, remedy = _KNOWN[drift.kind]
        return replace(drift, cause=cause, remedy=remedy)
    return replace(drift, cause="The cause cannot be told from the two states.", remedy=TRACE)


def strangers(drifts: Sequence[Drift], before: State, after: State) -> Iterator[Drift]:
    """The drifts; of a model that is another one, with that as the cause of what it explains."""
    ours, theirs = before.facts.tensors, after.facts.tensors
    gone = sum(name not in theirs for name in ours)
    reshaped = sum(drift.kind == "shape" for drift in drifts)
    replaced = {drift.name for drift in drifts if drift.kind == "replaced"}
    parameters = {n for n, facts in ours.items() if facts.kind == "parameter" and n in theirs}
    what = remedy = ""
    if 2 * (gone + reshaped) > len(ours):
        what = f"{gone} of {len(ours)} names are missing and {reshaped} have another shape, as in "
        what += "a model of another architecture."
        remedy = "Compare with the model of which the snapshot was taken."
    elif len(parameters) > 1 and parameters <= replaced:
        what = f"All {len(parameters)} parameters are other objects: this is another model or a "
        what += "copy, or load_state_dict(assign=True) ran."
        remedy = "Check the model of which the snapshot was taken; a copy, with Snapshot.load."
    kinds = ("removed", "added", "shape", "replaced") if gone or reshaped else ("replaced",)
    for drift in drifts:
        known = what and drift.kind in kinds
        yield replace(drift, cause=what, remedy=remedy) if known else drift


class _Case:
    """One drift and what is known about its tensor, its layer and the optimizers."""

    def __init__(self, drift: Drift, before: State, after: State) -> None:
        self.drift, self.before, self.after = drift, before, after
        self.key = drift.name.rpartition(".")[2]
        facts = before.facts.tensors.get(drift.name)
        self.old: TensorFacts | None = facts
        self.new: TensorFacts | None = after.facts.tensors.get(drift.name)
        self.layer_name = facts.owner if facts else drift.name
        was = before.facts.owners.get(self.layer_name)
        # A snapshot of a checkpoint knows no classes and no policies.
        self.was: OwnerFacts | None = was if was and was.kind else None
        self.now: OwnerFacts | None = after.facts.owners.get(self.layer_name)
        self.layer: nn.Module | None = after.modules.get(self.layer_name)

    @property
    def is_statistic(self) -> bool:
        return self.key in STATISTICS and self.old is not None and self.old.kind != "parameter"

    @property
    def kind_now(self) -> str:
        return self.now.short_kind if self.now else "module"

    @property
    def lets_statistics_move(self) -> bool:
        """Whether no policy holds the layer's statistics now."""
        return self.now is not None and self.now.policy in ("none", "affine", "weights")

    def statistics(self, state: State) -> tuple[Tensor | None, ...]:
        """Mean, variance and count of the layer in one of the states."""
        prefix = f"{self.layer_name}." if self.layer_name else ""
        found = []
        for key in STATISTICS:
            facts = state.facts.tensors.get(prefix + key)
            found.append(state.values.get(facts.first) if facts else None)
        return tuple(found)

    def batches(self) -> int | None:
        """By how much num_batches_tracked rose; None where it is not known."""
        counts = [self.statistics(state)[2] for state in (self.before, self.after)]
        if counts[0] is None or counts[1] is None or counts[0].numel() != 1:
            return None
        return int(counts[1]) - int(counts[0])

    def tensor(self) -> Tensor | None:
        """The tensor as it is now."""
        identity = self.after.identities.get(self.drift.name)
        return identity.tensor if identity else None

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The optimizer groups in which the tensor stands, each with its optimizer's class."""
        tensor = self.tensor()
        for optimizer in self.before.live_optimizers():
            for group in optimizer.param_groups:
                if any(member is tensor for member in group["params"]):
                    yield type(optimizer).__name__, group


# Values -----------------------------------------------------------------------------------------


def _was_reset(case: _Case) -> Reason | None:
    if not case.is_statistic:
        return None
    mean, var, count = case.statistics(case.after)
    if mean is None or var is None or not mean.numel():
        return None
    if bool(mean.any()) or bool((var != 1).any()) or (count is not None and bool(count.any())):
        return None
    text = "Every mean of its layer is 0 and every variance 1: the statistics were reset, by "
    if case.was is None or case.lets_statistics_move:
        return (
            text + "reset_running_stats() or a new initialisation.",
            "Freeze the layer, which then refuses reset_running_stats().",
        )
    return (
        text + "a tool that assigns new ones (Lightning's StochasticWeightAveraging does).",
        "Such tools look for torch's own batch norm: use freeze(model, 'fused'), which is none.",
    )


def _layer_thawed(case: _Case) -> Reason | None:
    was, now = case.was, case.now
    if was is None or now is None or was.policy == "none" or now.policy == was.policy:
        return None
    return (
        f"Its layer was held by policy {was.policy!r} and is a {now.short_kind} with policy "
        f"{now.policy!r} now: unfreeze() was called, or something replaced the layer.",
        "Freeze it again, or unfreeze after the proof.",
    )


def _forward_in_training(case: _Case) -> Reason | None:
    if not case.is_statistic or not case.lets_statistics_move or case.layer is None:
        return None
    training = bool(case.layer.training)
    batches = case.batches()
    if isinstance(case.layer, _InstanceNorm):
        batches = None  # it does not count
    elif batches is not None and batches <= 0:
        return None
    if not training and not batches:
        return None
    text = f"Its layer is a plain {case.kind_now}"
    if case.now is not None and case.now.policy != "none":
        text = f"Its layer is a {case.kind_now} held by policy {case.now.policy!r} alone"
    text += " in training mode" if training else ", in eval mode now"
    if training and case.was is not None and case.was.mode == "eval":
        text += ": model.train() was called after an eval() that does not last"
    elif batches:
        text += f", and ran {_times(batches)}{'' if training else ' in training mode'} since"
    else:
        text += ", where each forward pass updates its statistics"
    steps = (case.drift.step or 0) - (case.drift.since or 0)
    if batches and steps and batches > steps:
        text += f" ({batches} forward passes in {steps} step{'s' if steps != 1 else ''}: is it "
        text += "run twice by activation checkpointing?)"
    if getattr(case.layer, "momentum", None) == 0 and case.key == "num_batches_tracked":
        text += "; momentum=0 does not stop the count"
    return f"{text}.", _FREEZE


def _object_replaced(case: _Case) -> Reason | None:
    old = case.before.identities.get(case.drift.name)
    new = case.after.identities.get(case.drift.name)
    if old is None or new is None or old.tensor is new.tensor:
        return None
    return (
        "Another tensor is registered under its name: load_state_dict(assign=True), or an "
        "assignment to the attribute.",
        "Copy into the tensor that is there, before freezing.",
    )


def _storage_replaced(case: _Case) -> Reason | None:
    old = case.before.identities.get(case.drift.name)
    new = case.after.identities.get(case.drift.name)
    if old is None or new is None or not (old.pointer and new.pointer):
        return None
    if old.pointer == new.pointer:
        return None
    return (
        "Its storage was replaced by another: .data = … was assigned, or it was moved.",
        "Do not assign to .data of a held tensor.",
    )


def _was_trained(case: _Case) -> Reason | None:
    if case.new is None or case.new.kind != "parameter" or not case.new.requires_grad:
        return None
    standing = [name for name, _ in case.groups()]
    where = f" and stands in {standing[0]}" if standing else ""
    return (
        f"Its requires_grad is True{where}: it trains.",
        'Use freeze(model, "affine"), or "weights" for what is not a norm layer.',
    )


def _leftover_grad(case: _Case) -> Reason | None:
    tensor = case.tensor()
    if tensor is None or case.new is None or case.new.requires_grad:
        return None
    for name, group in case.groups():
        forces = [
            f"{key}={group[key]:g}"
            for key in ("weight_decay", "momentum")
            if isinstance(group.get(key), int | float) and group[key]
        ]
        by = name + (f" with {' and '.join(forces)}" if forces else "")
        remedy = "Clear it with .grad = None, which freeze(model, optimizer=…) does."
        if case.new.has_grad and tensor.grad is not None:
            zero = not tensor.grad.any()
            what = "of zeros, as zero_grad(set_to_none=False) leaves it," if zero else "left"
            return (
                f"Its requires_grad is False, but it has a .grad {what} and stands in {by}, "
                f"which applies it.",
                remedy,
            )
    return None


def _was_loaded(case: _Case) -> Reason | None:
    """A load_state_dict or an EMA writes to every tensor in place, changed or not."""
    remedy = "Load before freezing; leave what is held out of the EMA's copy."
    noted = case.before.facts.tensors
    for where, owner in (("the snapshot", None), ("its layer", case.layer_name)):
        names = [name for name, facts in noted.items() if owner in (None, facts.owner)]
        if len(names) > 1 and all(_rewritten(case, name) for name in names):
            return (
                f"All {len(names)} tensors of {where} were written in place: by "
                f"load_state_dict(), an EMA or another copy of it all.",
                remedy,
            )
    return None


def _rewritten(case: _Case, name: str) -> bool:
    old, new = case.before.identities.get(name), case.after.identities.get(name)
    if old is None or new is None or None in (old.version, new.version):
        return False
    return old.tensor is new.tensor and old.version != new.version


def _written_in_place(case: _Case) -> Reason | None:
    old = case.before.identities.get(case.drift.name)
    new = case.after.identities.get(case.drift.name)
    if old is None or new is None or old.version is None or new.version is None:
        return None
    if old.version != new.version:
        return (
            f"It was written in place {_times(new.version - old.version)}, by an operation that "
            f"autograd sees: copy_, an EMA, a broadcast, an optimizer.",
            TRACE,
        )
    return (
        "It was written past autograd: through .data, a numpy or dlpack view, or by a kernel "
        "that does not tell.",
        TRACE,
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


# Layers and flags -------------------------------------------------------------------------------


def _class_swapped(case: _Case) -> Reason | None:
    was, now = case.was, case.now
    if was is None or now is None or was.kind == now.kind:
        return None
    if now.short_kind == "SyncBatchNorm":
        return (
            "convert_sync_batchnorm rebuilt the layer, which is live again.",
            "Convert first, then freeze.",
        )
    if case.layer is not None and hasattr(case.layer, "parametrizations"):
        return "A parametrization was registered on the layer.", "Parametrize first, then freeze."
    if was.policy not in ("none", "frozen") and now.policy == "none":
        return "unfreeze() was called, or something replaced the layer.", "Freeze it again."
    return "Something changed the layer's class, or replaced the layer.", "Change, then freeze."


def _mode_flipped(case: _Case) -> Reason | None:
    if case.was is None or case.now is None or (case.was.mode, case.now.mode) != ("eval", "train"):
        return None
    return "model.train() was called after an eval() that does not last.", _FREEZE


def _policy_changed(case: _Case) -> Reason | None:
    if case.was is None or case.now is None or case.was.policy == case.now.policy:
        return None
    return "freeze() was called again.", "Take the snapshot afterwards."


_RULES: dict[str, tuple[Callable[[_Case], Reason | None], ...]] = {
    "value": (
        _was_reset,
        _layer_thawed,
        _forward_in_training,
        _object_replaced,
        _storage_replaced,
        _was_trained,
        _leftover_grad,
        _was_loaded,
        _written_in_place,
    ),
    "thawed": (_class_swapped, _mode_flipped, _policy_changed),
}

# Kinds that are their own cause.
_KNOWN: dict[str, Reason] = {
    "dtype": (
        "The tensor was converted, as model.half(), .bfloat16() and .double() do.",
        "Convert first, then freeze and take the snapshot.",
    ),
    "shape": ("The tensor was resized or replaced.", "Freeze the model in its final form."),
    "device": (
        "The tensor was moved.",
        "Move first, then take the snapshot; or save it, and verify against the file.",
    ),
    "added": (
        "The snapshot does not know this tensor, so nothing is proved about it.",
        "Take the snapshot once the model is complete and all is frozen.",
    ),
    "removed": (
        "No tensor has this name any more.",
        "Take the snapshot of the model as it will be.",
    ),
    "aliasing": (
        "Names were tied to one memory, or tied names were split: an assignment, a .data, a copy "
        "or load_state_dict(assign=True).",
        "Tie first, then freeze.",
    ),
    "replaced": (
        "Something else is registered under its name: load_state_dict(assign=True), an assignment, "
        "register_buffer, or fully_shard.",
        "An optimizer still has the old parameter: replace first, then build it and freeze.",
    ),
    "requires-grad": (
        "The flag was set: requires_grad_() on the model or on the parameter.",
        "Set flags first, then freeze.",
    ),
    "optimizer": (
        "The optimizer's groups changed: add_param_group, or a parameter was replaced.",
        "Give the optimizer only what trains.",
    ),
    "grad": (
        "A backward ran while it required a gradient, or .grad was assigned: the next optimizer "
        "step moves it.",
        "Clear it with .grad = None, which freeze(model, optimizer=…) does.",
    ),
    "unverified": (
        "What cannot be read is not counted as unchanged.",
        "Leave it out with a pattern; of sharded tensors each rank checks its own with "
        "process_group=….",
    ),
}
