"""A change as text: where, what, since when, why, and how to mend it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bnfreeze.text import escaped
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.values import Scalar

__all__ = ["message_of", "sentence", "tally", "what_changed"]


def message_of(drifts: Sequence[Drift]) -> str:
    """The first change in full, of values if there is one, and how many more of which kind."""
    first = next((drift for drift in drifts if drift.kind == "value"), drifts[0])
    others = [drift for drift in drifts if drift is not first]
    lines = [sentence(first), f"{first.cause} {first.remedy}".strip()]
    if others:
        lines.append(f"And {len(others)} more: {tally(others)}.")
    return "\n".join(escaped(line) for line in lines if line)


def tally(drifts: Sequence[Drift]) -> str:
    """How many changes of which kind, as ``53 thawed, 2 value``, with the name of a single one."""
    if len(drifts) == 1:
        return f"{drifts[0].name or 'the model'} ({drifts[0].kind})"
    counted = Counter(drift.kind for drift in drifts)
    return ", ".join(f"{count} {kind}" for kind, count in counted.most_common())


def sentence(drift: Drift) -> str:
    """Where and what, in one sentence."""
    name = drift.name or "The model"
    verb = {
        "value": "drifted",
        "added": "was added",
        "removed": "was removed",
        "aliasing": "shares its memory differently",
        "replaced": "was replaced",
        "thawed": "was thawed",
        "mode": "went into train mode",
        "requires-grad": "has a different requires_grad",
        "optimizer": "was taken out of the optimizer"
        if drift.before
        else "was put into the optimizer",
        "grad": "has a .grad",
        "unverified": "could not be verified",
    }.get(drift.kind, f"changed its {drift.kind}")
    what = what_changed(drift)
    return f"{name} {verb}{_when(drift)}" + (f": {what}." if what else ".")


def what_changed(drift: Drift) -> str:
    """What changed, without the name."""
    if drift.kind == "value":
        return _elements(drift)
    if drift.kind == "aliasing":
        return f"now with {drift.after or 'no other'}, before with {drift.before or 'no other'}"
    if drift.kind == "unverified":
        return str(drift.after or "")
    if drift.kind in ("optimizer", "grad", "removed"):
        return ""
    if drift.kind == "added":
        return f"a {drift.after} that was not there"
    return f"{drift.before} → {drift.after}"


def _elements(drift: Drift) -> str:
    if drift.changed is None:
        return "its SHA-256 differs" if drift.before is None else f"{drift.before}"
    before, after = _pair(drift.before, drift.after)
    index = ", ".join(map(str, drift.first_index or ()))
    verb = "differs" if drift.changed == 1 else "differ"
    text = f"{drift.changed} of {drift.total} elements {verb}, first at [{index}] "
    text += f"({before} → {after})"
    if drift.max_abs is not None:
        text += f", largest change {drift.max_abs:.3g}"
    return text


def _pair(before: Scalar | None, after: Scalar | None) -> tuple[str, str]:
    """Both values, with just enough digits to show the difference."""
    if isinstance(before, float) and isinstance(after, float):
        for digits in (3, 6, 9):
            short = f"{before:.{digits}g}", f"{after:.{digits}g}"
            if short[0] != short[1]:
                return short
    return str(before), str(after)


def _when(drift: Drift) -> str:
    where = "" if drift.rank is None else f" on rank {drift.rank}"
    if drift.where or drift.operation:
        where += f" in {drift.operation}" if drift.operation else ""
        where += f", called at {drift.where}" if drift.where else ""
    if drift.step is None:
        return where
    if drift.since is None or drift.since == drift.step - 1:
        return f" at step {drift.step}{where}"
    if drift.since == drift.step:
        return f" after step {drift.step}{where}"
    return f" between steps {drift.since + 1} and {drift.step}{where}"
