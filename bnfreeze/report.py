"""What freezing did, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from bnfreeze.findings import Finding
from bnfreeze.render import Printable, Sheet

__all__ = ["FreezeReport", "LayerRow"]


@dataclass(frozen=True)
class LayerRow:
    """What was done to one layer.

    Attributes:
        name: the dotted name; of a shared layer the first; empty for the model itself.
        kind: the class, as it was before freezing.
        policy: the policy that holds it now, ``"none"`` where it is left alone.
        absorbs: what the layer computes along: always ``""`` but for ``fused-act``.
        actions: what was changed, as stable words: ``hold-statistics``, ``force-eval``,
            ``hold-weight``, ``hold-bias`` (or another parameter's name), ``clear-grad``,
            ``restore``; empty where nothing had to be.
        note: what else a person should know.
    """

    name: str
    kind: str
    policy: str
    absorbs: str = ""
    actions: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class FreezeReport(Printable):
    """What `freeze` or `unfreeze` did: a row a layer, and the findings.

    Printing it gives a table. As a context manager, leaving it unfreezes the layers that it
    reports as frozen::

        with bnfreeze.freeze(model, "eval"):
            train(model)
    """

    layers: tuple[LayerRow, ...]
    findings: tuple[Finding, ...] = ()
    # Parameters outside norm layers, which only the policy "weights" holds, are counted and not
    # drawn: there are as many of these modules as norm layers, and they all say the same.
    norm_names: frozenset[str] = field(default=frozenset(), repr=False)
    undo: Callable[[], object] = field(default=lambda: None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 1,
            "layers": [asdict(row) for row in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.render`."""
        norms = [row for row in self.layers if row.name in self.norm_names]
        others = len(self.layers) - len(norms)
        done, count = ("frozen", sum(row.policy != "none" for row in norms))
        if any(row.policy == "none" and "restore" in row.actions for row in self.layers):
            done, count = ("given back", sum("restore" in row.actions for row in norms))
        verdict = f"{count} of {len(norms)} norm layers {done}" + (
            f", and the weights of {others} other modules." if others else "."
        )
        return Sheet(
            title=f"Norm layers {done}",
            columns=("layer", "kind", "policy", "absorbs", "done", "note"),
            rows=[
                (
                    row.name or "(the model)",
                    row.kind,
                    row.policy,
                    row.absorbs,
                    ", ".join(row.actions),
                    row.note,
                )
                for row in norms
            ],
            findings=self.findings,
            verdict=verdict,
        )

    def __enter__(self) -> FreezeReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()
