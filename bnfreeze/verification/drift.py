"""One change between two states: as data, and as a sentence. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Drift", "Kind", "Scalar", "sentence", "what_changed"]

Kind = Literal[
    "value",
    "dtype",
    "shape",
    "device",
    "added",
    "removed",
    "aliasing",
    "replaced",
    "thawed",
    "mode",
    "requires-grad",
    "optimizer",
    "grad",
    "unverified",
]
Scalar = bool | int | float | complex | str

_VERBS = {
    "value": "drifted",
    "added": "was added",
    "removed": "was removed",
    "aliasing": "shares its memory differently",
    "replaced": "was replaced",
    "thawed": "was thawed",
    "mode": "went into train mode",
    "requires-grad": "has a different requires_grad",
    "grad": "has a .grad",
    "unverified": "could not be verified",
}


@dataclass(frozen=True)
class Drift:
    """Something that is not as it was.

    Attributes:
        name: the tensor's dotted name, its first one if it has several; for ``thawed`` and
            ``mode`` the layer's.
        kind: what changed:

            * ``value``: bits of the elements; or the eps of a norm layer, as ``bn1.eps``.
            * ``dtype``, ``shape``, ``device``.
            * ``added``, ``removed``: the name itself.
            * ``aliasing``: which names share memory.
            * ``replaced``: another parameter is registered under the name, so optimizers and
              other references still have the old one; or a parameter became a buffer, a buffer
              became non-persistent, a layer that was not frozen got another class.
            * ``thawed``: the class or the policy of a frozen layer, or its mode from eval to train.
            * ``mode``: a layer that was not frozen went from eval to train mode.
            * ``requires-grad``: the flag.
            * ``optimizer``: whether it is in the optimizer.
            * ``grad``: it has a ``.grad`` although it requires none.
            * ``unverified``: it cannot be compared, and so does not count as unchanged.
        changed: how many elements differ in any bit; None if they were not counted.
        total: how many elements there are.
        first_index: the index of the first of them, in row-major order; ``()`` for a
            0-dimensional tensor.
        before: its value before; for the other kinds, what was. If both values look alike (two
            NaN), they come with their bits.
        after: its value after; for the other kinds, what is.
        max_abs: the largest absolute change; None if no change is a finite number.
        max_ulps: the largest change of a floating point number, in units of its last place; None
            for other dtypes, and if a sign or an infinity changed.
        step: the optimizer steps completed when it was seen; None outside of `guard`.
        since: the optimizer steps completed at the last check that found no drift.
        rank: the rank on which it was seen; None without a process group.
        operation: the operation that wrote, under ``guard(trace=True)``.
        where: file and line of the user's code that called it.
        cause_code: a stable name of the cause, such as ``"forward-in-training"``; ``"unknown"``
            if nothing shows it.
        cause: the likeliest cause, from what can be seen, as a sentence.
        remedy: what to do about it.
    """

    name: str
    kind: Kind
    changed: int | None = None
    total: int | None = None
    first_index: tuple[int, ...] | None = None
    before: Scalar | None = None
    after: Scalar | None = None
    max_abs: float | None = None
    max_ulps: int | None = None
    step: int | None = None
    since: int | None = None
    rank: int | None = None
    operation: str | None = None
    where: str | None = None
    cause_code: str = ""
    cause: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; numbers that JSON lacks are strings."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    is_number = isinstance(value, float) and math.isfinite(value)
    return str(value) if isinstance(value, float | complex) and not is_number else value


def sentence(drift: Drift) -> str:
    """Where and what, in one sentence."""
    verb = _VERBS.get(drift.kind, f"changed its {drift.kind}")
    if drift.kind == "optimizer":
        verb = f"was {'taken out of' if drift.before else 'put into'} the optimizer"
    what = what_changed(drift)
    return f"{drift.name or 'The model'} {verb}{_when(drift)}" + (f": {what}." if what else ".")


def what_changed(drift: Drift) -> str:
    """What changed, without the name."""
    before, after = drift.before, drift.after
    if drift.kind == "value":
        return _elements(drift)
    if drift.kind == "aliasing":
        return f"now with {after or 'no other'}, before with {before or 'no other'}"
    if drift.kind == "unverified":
        return str(after or "")
    if drift.kind == "added":
        return f"a {after or 'tensor'} that was not there"
    return "" if drift.kind in ("optimizer", "grad", "removed") else f"{before} → {after}"


def _elements(drift: Drift) -> str:
    if drift.changed is None:
        return "its SHA-256 differs" if drift.before is None else f"{drift.before}"
    before, after = str(drift.before), str(drift.after)
    if isinstance(drift.before, float) and isinstance(drift.after, float):
        # Just enough digits to show the difference.
        for digits in (3, 6, 9):
            short = f"{drift.before:.{digits}g}", f"{drift.after:.{digits}g}"
            if short[0] != short[1]:
                before, after = short
                break
    index = ", ".join(map(str, drift.first_index or ()))
    verb = "differs" if drift.changed == 1 else "differ"
    text = f"{drift.changed} of {drift.total} elements {verb}, first at [{index}] "
    text += f"({before} → {after})"
    return text if drift.max_abs is None else f"{text}, largest change {drift.max_abs:.3g}"


def _when(drift: Drift) -> str:
    where = "" if drift.rank is None else f" on rank {drift.rank}"
    where += f" in {drift.operation}" if drift.operation else ""
    where += f", called at {drift.where}" if drift.where else ""
    step, since = drift.step, drift.since
    if step is None:
        return where
    if since is None or since == step - 1:
        return f" at step {step}{where}"
    if since < step:
        return f" between steps {since + 1} and {step}{where}"
    return (f" after step {step}" if step else " before the first optimizer step") + where
