"""One change between two states, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bnfreeze.verification.values import Scalar

__all__ = ["Drift", "Kind"]

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


@dataclass(frozen=True)
class Drift:
    """Something that is not as it was.

    Attributes:
        name: the tensor's dotted name, its first one if it has several; for ``thawed`` and
            ``mode`` the layer's.
        kind: what changed:

            * ``value``: bits of the elements.
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
        first_index: the index of the first of them, in row-major order.
        before: its value before; for the other kinds, what was.
        after: its value after; for the other kinds, what is.
        max_abs: the largest absolute change; None if no change is a finite number.
        max_ulps: the same in units of the last place, for floating point numbers of one sign.
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
        fields = asdict(self)
        if self.first_index is not None:
            fields["first_index"] = list(self.first_index)
        for key in ("before", "after", "max_abs"):
            value = fields[key]
            if isinstance(value, complex) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                fields[key] = str(value)
        return fields
