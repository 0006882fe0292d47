"""The likeliest cause of a change, from what the two states show, and its remedy. Needs no torch.

The first rule that recognises a change gives the cause. If none does, the cause is ``"unknown"``,
and the remedy says what would show it. What is said of each stands in `bnfreeze/causes.md`.
`verify`, `guard`, ``snapshot(model) == before``, `diff` and the command all take causes from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, Final

import numpy as np

from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.text import counted
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.state import MOVING, Identity, State

# The same words as bnfreeze.norm_layers, which imports torch.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Those that freeze no parameter.
_TRAINING = ("none", "frozen", "stats", "eval")

# By its code a cause, in which details are filled in, and what to do about it. A kind of drift that
# is its own cause has its own name here.
_REASONS: Final[dict[str, tuple[str, str]]] = {
    code: (cause, remedy)
    for code, cause, remedy in re.findall(
        r"^\| `(.+)` \| (.+) \| (.+) \|$",
        files("bnfreeze").joinpath("causes.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}
# Of these causes a trace tells more.
TRACED: Final = ("unknown", "in-place", "hidden-write")

_COUNTS_ADDED: Final = (
    "Mean and variance of the layer moved by rounding alone, as in an average (EMA, SWA) of equal "
    "numbers. Such a script may average the counts, too, or add them up."
)

_INTEGER_TO_FLOAT: Final = {
    "cause": "An integer became a floating-point number: a script averaged it with the other "
    "tensors (sum / n), or converted it by itself. model.half() and .to() leave integers alone.",
    "remedy": "Copy integers as they are, and frozen tensors, too.",
}

# A code of these, and what its sentence needs.
Cause = tuple[str, dict[str, Any]]


def because(
    drift: Drift, code: str, *, cause: str = "", remedy: str = "", **details: object
) -> Drift:
    """The drift with the cause of this code; `details` fill in its sentence.

    A `cause` or a `remedy` takes the place of the usual one.
    """
    code = code if code in _REASONS else "unknown"
    usual, usual_remedy = _REASONS[code]
    text = cause or usual.format(**details)
    return replace(drift, cause_code=code, cause=text, remedy=remedy or usual_remedy)


def explained(drifts: Sequence[Drift], before: State, after: State) -> tuple[Drift, ...]:
    """The drifts, each with its cause and remedy; of a layer's class or mode they have it."""
    other = _other_model(drifts, before, after)
    found = []
    for drift in drifts:
        if drift.kind in other or not drift.cause_code:
            case = _Case(drift, before, after)
            code, details = next(case.causes(), (drift.kind, {}))
            code, details = other.get(code, (code, details))
            drift = because(drift, code, **details)
        found.append(drift)
    return tuple(found)


def _other_model(drifts: Iterable[Drift], before: State, after: State) -> dict[str, Cause]:
    """The cause of several drifts at once, if this is another model; by their own causes."""
    ours, theirs = before.tensors, after.tensors
    gone = sum(name not in theirs for name in ours)
    reshaped = sum(drift.kind == "shape" for drift in drifts)
    if 2 * (gone + reshaped) > len(ours):
        details = {"gone": gone, "all": len(ours), "reshaped": reshaped}
        kinds = ("removed", "added", "shape", "replaced", "other-tensor")
        return dict.fromkeys(kinds, ("other-model", details))
    replaced = {drift.name for drift in drifts if drift.kind == "replaced"}
    parameters = {n for n, facts in ours.items() if facts.kind == "parameter" and n in theirs}
    if len(parameters) > 1 and parameters <= replaced:
        details = {"count": len(parameters)}
        return dict.fromkeys(("replaced", "other-tensor"), ("other-objects", details))
    return {}


class _Case:
    """One drift, and what is known about its tensor, its layer and the optimizers."""

    def __init__(self, drift: Drift, before: State, after: State) -> None:
        self.drift, self.before, self.after = drift, before, after
        self.old, self.new = before.tensors.get(drift.name), after.tensors.get(drift.name)
        self.layer = self.old.owner if self.old else drift.name
        owners = before.owners.get(self.layer), after.owners.get(self.layer)
        # A checkpoint shows no classes and no policies.
        self.was, self.now = (owner if owner and owner.kind else None for owner in owners)

    def causes(self) -> Iterator[Cause]:
        """What may be the cause, the likeliest first; nothing if the kind says all."""
        if self.drift.kind == "dtype" and self.old and self.new:
            dtypes = self.old.dtype, self.new.dtype
            yield "dtype", _INTEGER_TO_FLOAT if "int" in dtypes[0] and "float" in dtypes[1] else {}
        if self.drift.kind in ("value", "requires-grad", "grad"):
            yield from self._thawed()
        if self.drift.kind == "value":
            yield from self._statistics_moved()
            yield from self._replaced()
            yield from self._optimized()
            # An average d * x + (1 - d) * x of equal numbers rounds, in some elements.
            changed, ulps = self.drift.changed or 0, self.drift.max_ulps or 0
            if changed > 1 and 0 < ulps <= 4:
                yield "averaging", {"ulps": counted(ulps, "unit")}
            yield from self._written()
        elif self.drift.kind == "requires-grad" and self._is_another():
            yield "replaced", {}
        elif self.drift.kind == "grad" and self.new and self.new.requires_grad:
            yield from self._optimized()

    def _thawed(self) -> Iterator[Cause]:
        """A policy that was given back, or changed."""
        was, now = self.was, self.now
        if was and now and was.policy not in ("none", now.policy):
            policies = {"was": repr(was.policy), "now": repr(now.policy)}
            yield "thawed", policies | {"kind": now.short_kind}

    def _is_another(self) -> bool:
        """Whether another object has the name now."""
        known = self._identities(self.drift.name)
        return known is not None and known[0].tensor is not known[1].tensor

    def _identities(self, name: str) -> tuple[Identity, Identity] | None:
        """The object under the name, before and after; None if one is not known."""
        old, new = self.before.identities.get(name), self.after.identities.get(name)
        return None if old is None or new is None else (old, new)

    def _statistics(self, state: State) -> list[StoredTensor | None]:
        """Mean, variance and count of the layer in one of the states."""
        prefix = f"{self.layer}." if self.layer else ""
        facts = [state.tensors.get(prefix + key) for key in _STATISTICS]
        return [state.values.get(one.first) if one else None for one in facts]

    def _statistics_moved(self) -> Iterator[Cause]:
        """A reset, or a forward pass in training mode."""
        old, was, now = self.old, self.was, self.now
        is_statistic = old is not None and (
            (self.drift.name.rpartition(".")[2] in _STATISTICS and old.kind != "parameter")
            # Of a foreign norm layer, what does not train.
            or (now is not None and now.remedy != "" and not old.requires_grad)
        )
        if is_statistic and self._was_reset():
            yield "reset", {}
        if not is_statistic or (now and now.policy not in MOVING):
            return
        batches, training = self._batches(), now is not None and now.training
        if (batches is not None and batches <= 0) or not (training or batches):
            return
        # A forward pass counts one; a load or an EMA writes the count at once.
        count = f"{self.layer}.{_STATISTICS[2]}".removeprefix(".")
        if batches and 0 < (self._writes(count) or 0) < batches:
            return
        if self._only_rounded():
            if self.drift.name.rpartition(".")[2] == _STATISTICS[2]:
                yield "averaging", {"cause": _COUNTS_ADDED}
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
            steps = (self.drift.step or 0) - (self.drift.since or 0)
            text = f"{'It' if now else 'The layer'} ran {_times(batches)} in training mode since"
            if 0 < steps < batches:
                text += f" ({batches} forward passes in {counted(steps, 'step')}: does "
                text += "activation checkpointing run it twice?)"
            sentences.append(f"{text}.")
        layer = now or was
        remedy = layer.what_freezes_it if layer else ""
        yield "forward-in-training", {"cause": " ".join(sentences), "remedy": remedy}

    def _only_rounded(self) -> bool:
        """Whether mean and variance moved, but by rounding alone, which no forward pass does."""
        moved = False
        for was, now in zip(
            self._statistics(self.before)[:2], self._statistics(self.after)[:2], strict=True
        ):
            old, new = (one.values() if one else None for one in (was, now))
            if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
                return False
            if old.dtype.kind != "f" or not (abs(old - new) <= 4 * np.spacing(abs(old))).all():
                return False
            moved = moved or bool((old != new).any())
        return moved

    def _batches(self) -> int | None:
        """By how much num_batches_tracked rose; None if that is not known, or not counted."""
        counts = [self._statistics(state)[2] for state in (self.before, self.after)]
        start, end = (None if count is None else count.item() for count in counts)
        rises = self.now is None or "InstanceNorm" not in self.now.kind
        return int(end - start) if rises and start is not None and end is not None else None

    def _was_reset(self) -> bool:
        """Whether mean, variance and count are what a new layer has."""
        mean, var, count = (
            None if one is None or not one.numel else one.values()
            for one in self._statistics(self.after)
        )
        if mean is None or var is None or mean.any() or (var != 1).any():
            return False
        return count is None or not count.any()

    def _replaced(self) -> Iterator[Cause]:
        """Another tensor, or another storage."""
        if known := self._identities(self.drift.name):
            old, new = known
            if old.tensor is not new.tensor:
                # The forward of a foreign norm layer may assign its statistics, in eval mode, too.
                yield "other-tensor", {"remedy": self.now.remedy if self.now else ""}
            if old.pointer and new.pointer and old.pointer != new.pointer:
                yield "other-storage", {}

    def _optimized(self) -> Iterator[Cause]:
        """An optimizer's step, with a new gradient or with one that was left over."""
        old, new, known = self.old, self.new, self._identities(self.drift.name)
        if old is None or new is None or old.kind != "parameter":
            return
        tensor = known[1].tensor if known else None
        groups: list[tuple[str, dict[str, Any]]] = [
            (type(optimizer).__name__, group)
            for optimizer in self.before.live_optimizers()
            for group in optimizer.param_groups
            if any(member is tensor for member in group["params"])
        ]
        name, group = groups[0] if groups else ("", {})
        if old.requires_grad if new.requires_grad is None else new.requires_grad:
            where = f" and it is in {name}" if name else ""
            policy = self.now.policy if self.now else "none"
            own = self.drift.name.rpartition(".")[2] in ("weight", "bias")
            if "weights" in policy or (own and policy not in _TRAINING):
                yield "affine-thawed", {"where": where, "policy": repr(policy)}
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
            name += f" with {' and '.join(forces)}" if forces else ""
            yield "leftover-grad", {"grad": text, "optimizer": name}

    def _written(self) -> Iterator[Cause]:
        """A write in place: to all tensors, or to this one; seen by autograd, or not.

        A load_state_dict or an EMA writes to every tensor, changed or not.
        """
        for where, owner in (("checked tensors", None), ("tensors of the layer", self.layer)):
            names = [n for n, one in self.before.tensors.items() if owner in (None, one.owner)]
            if len(names) > 1 and all(map(self._writes, names)):
                yield "loaded", {"count": len(names), "where": where}
        writes = self._writes(self.drift.name)
        if writes is not None:
            yield ("in-place", {"times": _times(writes)}) if writes else ("hidden-write", {})

    def _writes(self, name: str) -> int | None:
        """How often autograd saw the tensor written in place; None if it is not known."""
        known = self._identities(name)
        if known is None or known[0].tensor is not known[1].tensor:
            return None
        start, end = known[0].version, known[1].version
        return None if start is None or end is None else end - start


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
