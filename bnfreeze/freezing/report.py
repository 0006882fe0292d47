"""What freezing did, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from bnfreeze.findings import Finding
from bnfreeze.policies.policy import Policy
from bnfreeze.tables import Printable, Sheet, shared_kind

__all__ = ["FreezeReport", "LayerRow"]


@dataclass(frozen=True)
class LayerRow:
    """What was done to one layer.

    Attributes:
        name: the dotted name; of a shared layer the first; empty for the model itself.
        kind: the class, as it was before freezing.
        policy: the policy that holds it now, ``"none"`` where it is left alone.
        absorbs: what the layer computes along under ``fused-act``: an activation (``"relu"``),
            ``"add"``, ``"add+relu"``, or with another norm layer that it is added to
            ``"affine+add+relu"``; that other one says ``"absorbed"``.
        actions: what was changed, as stable words: ``fuse``, ``force-eval``, ``hold-statistics``,
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
            "schema": 2,
            "layers": [asdict(row) for row in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        norms = [row for row in self.layers if row.name in self.norm_names]
        others = len(self.layers) - len(norms)
        undone = any(row.policy == "none" and "restore" in row.actions for row in self.layers)
        if undone:
            done, count = "given back", sum("restore" in row.actions for row in norms)
        else:
            done, count = "frozen", sum(row.policy != "none" for row in norms)
        tally = Counter(row.absorbs for row in norms if row.absorbs)
        absorbed = ", ".join(f"{number} {what}" for what, number in tally.most_common())
        title, further = shared_kind(f"Norm layers {done}", [row.kind for row in norms])
        return Sheet(
            title=title,
            columns=(
                "layer",
                "kind",
                "policy",
                "absorbs",
                "uses",
                "statistics",
                "affine",
                "note",
            ),
            rows=[_cells(row) for row in norms],
            findings=self.findings,
            verdict=f"{count} of {len(norms)} norm layers {done}"
            + (f", and the weights of {others} other modules." if others else ".")
            + (f" They absorb: {absorbed}." if absorbed else ""),
            further=further,
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


def _cells(row: LayerRow) -> tuple[str, ...]:
    """What the layer does from now on, in the words of the inspection's table."""
    uses = statistics = affine = ""
    if row.policy == "frozen":
        uses, statistics, affine = "running", "held", "held"
    elif row.policy != "none":
        policy = Policy.parse(row.policy)
        uses = "running" if policy.forces_eval else "batch"
        statistics = "held" if policy.freezes_statistics else "update"
        affine = "held" if policy.freezes_affine else "train"
    words = {"clear-grad": "gradient cleared", "restore": "given back"}
    notes = [words[action] for action in row.actions if action in words]
    if row.policy != "none" and not row.actions and not row.note:
        notes.append("as it was")
    notes += [row.note] if row.note else []
    return (
        row.name or "(the model)",
        row.kind,
        row.policy,
        row.absorbs,
        uses,
        statistics,
        affine,
        "; ".join(notes),
    )
