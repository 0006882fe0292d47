"""What freezing did, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bnfreeze.findings import Finding
from bnfreeze.inspection.behaviour import LiveLayer, fate, fate_legend
from bnfreeze.sheets import Sheet, shared_kind
from bnfreeze.tables import Printable
from bnfreeze.text import counted


@dataclass(frozen=True)
class LayerRow:
    """What was done to one layer.

    Attributes:
        name: the dotted name; of a shared layer the first; empty for the model itself.
        kind: the class, as it was before freezing.
        policy: the policy that it is frozen by now, ``"none"`` if it is left alone, ``"frozen"``
            for a frozen batch norm of another library.
        fuses: what runs in the layer's kernel under ``fused-act``: an activation (``"relu"``),
            ``"add"``, ``"add+relu"``, or ``"affine+add+relu"`` if the sum's other side is a norm
            layer too; that other layer says ``"fused"``. Under ``folded`` what runs in or behind
            its convolution: ``"conv"``, ``"conv+add+relu"``. Empty if nothing.
        actions: what was changed; empty if nothing had to be:

            * ``freeze-statistics``: the running statistics cannot change any more;
            * ``freeze-weight``, ``freeze-bias``, or another parameter's name:
              ``requires_grad`` is False;
            * ``force-eval``: the layer always normalises with its running statistics;
            * ``fuse``: it is a `FrozenBatchNorm1d/2d/3d` now;
            * ``clear-grad``: a leftover ``.grad`` was removed;
            * ``restore``: the layer went back to its original state (first, if others follow).
        note: what else a person should know.
    """

    name: str
    kind: str
    policy: str
    fuses: str = ""
    actions: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, repr=False)
class FreezeReport(Printable):
    """What `freeze` or `unfreeze` did: a row for each layer, and the findings.

    Print it to see a table. Used as a context manager, it unfreezes at the end the layers that
    it reports as frozen::

        with bnfreeze.freeze(model, "eval"):
            train(model)
    """

    layers: tuple[LayerRow, ...]
    findings: tuple[Finding, ...] = ()
    # By name of each norm layer what `inspect` says of it, so that the table never contradicts it.
    # Other modules, of which the policy "weights" freezes parameters, are counted and not drawn:
    # they are as many as the norm layers, and their rows would all say the same.
    facts: Mapping[str, LiveLayer] = field(default_factory=dict, compare=False)
    call: str = field(default="freeze", compare=False)
    undo: Callable[[], object] = field(default=lambda: None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "layers": [asdict(row) for row in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        norms = [row for row in self.layers if row.name in self.facts]
        cells = [self._cells(row) for row in norms]
        title, further = shared_kind(f"Norm layers after {self.call}", [row.kind for row in norms])
        return Sheet(
            title=title,
            columns=("layer", "kind", "policy", "fuses", "uses", "statistics", "affine", "note"),
            rows=cells,
            findings=self.findings,
            verdict=self._verdict(norms, cells),
            further=further,
            legend=fate_legend(cells),
        )

    def __enter__(self) -> FreezeReport:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _verdict(self, norms: Sequence[LayerRow], cells: Sequence[tuple[str, ...]]) -> str:
        others, total = len(self.layers) - len(norms), counted(len(norms), "norm layer")
        if self.call == "unfreeze":
            restored = sum("restore" in row.actions for row in norms)
            verdict = f"{restored} of {total} restored"
            return f"{verdict}, and {counted(others, 'other module')}." if others else f"{verdict}."
        statistics = sum(row[5] == "frozen" for row in cells)
        affine = sum(row[6] == "frozen" for row in cells)
        verdict = f"Statistics frozen: {statistics} of {total}. Weight and bias frozen: {affine}."
        if others:
            verdict += f" Weights of other modules frozen: {others}."
        tally = Counter(row.fuses for row in norms if row.fuses).most_common()
        fused = ", ".join(f"{number} {what}" for what, number in tally)
        return verdict + (f" Fused: {fused}." if fused else "")

    def _cells(self, row: LayerRow) -> tuple[str, ...]:
        """What the layer does from now on, in the words of the inspection's table."""
        facts = self.facts[row.name]
        words = {"clear-grad": "gradient cleared", "restore": "restored"}
        notes = [words[action] for action in row.actions if action in words]
        if row.policy != "none" and not row.actions and not row.note:
            notes.append("as it was")
        return (
            row.name or "(the model)",
            row.kind,
            row.policy,
            row.fuses,
            facts.normalizes_with,
            *fate(facts),
            "; ".join([*notes, *filter(None, [row.note])]),
        )
