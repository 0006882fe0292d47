"""One change between two states, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bnfreeze.verification.bits import Scalar

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
    "requires-grad",
    "optimizer",
    "grad",
    "unverified",
]


@dataclass(frozen=True)
class Drift:
    """Something that is not as it was.

    Attributes:
        name: the tensor's dotted name, of an alias the first; the layer's where it was thawed.
        kind: what changed:

            * ``value``: bits of the elements.
            * ``dtype``, ``shape``, ``device``.
            * ``added``, ``removed``: the name itself.
            * ``aliasing``: which names share storage.
            * ``replaced``: another object is registered under the name of a parameter, so that
              optimizers and other references still have the old one; or what was a parameter is
              a buffer, or persistent and no longer.
            * ``thawed``: the layer's class or policy, or its mode from eval to train.
            * ``requires-grad``: the flag.
            * ``optimizer``: whether it stands in the optimizer.
            * ``grad``: a ``.grad`` is left on it though it requires none.
            * ``unverified``: nobody can tell, and so it does not count as unchanged.
        changed: how many elements differ in any bit; None where it was not counted.
        total: how many elements there are.
        first_index: where the first of them is, in row-major order.
        before: its value before; for the other kinds, what was.
        after: its value after; for the other kinds, what is.
        max_abs: the largest absolute change; None where no change is a number.
        step: the optimizer steps completed when it was seen; None outside of `guard`.
        since: the optimizer steps completed when all was last seen to be well.
        rank: the rank on which it was seen; None where no process group was given.
        operation: the very operation that wrote, under ``guard(trace=True)``.
        where: file and line of the user's code that called it.
        cause: the likeliest cause, from what can be seen; it says so where there is none to see.
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
    step: int | None = None
    since: int | None = None
    rank: int | None = None
    operation: str | None = None
    where: str | None = None
    cause: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; numbers that JSON does not have are strings."""
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
