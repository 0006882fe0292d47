"""The norm layers of a checkpoint, as a table, as lines and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bnfreeze.inspection.origin import Origin
from bnfreeze.inspection.result import Inspection
from bnfreeze.inspection.stored_layers import BATCH_NORM, Spread, StoredLayer
from bnfreeze.inspection.tree import Scale, outline
from bnfreeze.tables import Sheet

__all__ = ["CheckpointInspection"]

_BAR = 12


@dataclass(frozen=True)
class CheckpointInspection(Inspection):
    """The norm layers of a checkpoint or a state_dict.

    Attributes:
        origin: where they were found.
        sorted_by: by what the layers are sorted; empty for the file's own order.
    """

    layers: tuple[StoredLayer, ...]
    origin: Origin
    sorted_by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {"schema": 2, **asdict(self.origin), **super().to_dict()}

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        layers = self.layers
        means = Scale([x.mean.deciles for x in layers if x.mean], positive=False)
        variances = Scale([x.var.deciles for x in layers if x.var], positive=True)
        names = [layer.name or "(the model)" for layer in layers]
        # A tree has an order of its own.
        lines = (
            list(zip(names, range(len(names)), strict=True)) if self.sorted_by else outline(names)
        )
        columns = (
            "layer",
            "kind",
            "C",
            "batches",
            "mean",
            means.ends(_BAR),
            "variance",
            variances.ends(_BAR),
            "dead",
            "dtype",
        )
        shared = {
            column
            for column, values in (
                ("kind", {layer.kind for layer in layers}),
                ("batches", {layer.batches for layer in layers}),
                ("dtype", {layer.dtype for layer in layers}),
            )
            if len(values) == 1
        }
        rows = [
            (
                line,
                *(
                    _cells(layers[index], means, variances, shared)
                    if index is not None
                    else ("",) * (len(columns) - 1)
                ),
            )
            for line, index in lines
        ]
        return Sheet(
            title=self.origin.path or "A state_dict",
            columns=columns,
            rows=rows,
            findings=self.findings,
            verdict=_verdict(self, shared),
            further=frozenset({"kind", "dtype", columns[5]}),
            notes=self.origin.summary(),
            findings_first=True,
            pictures=frozenset({columns[5], columns[7]}),
        )

    def lines(self) -> list[tuple[str, ...]]:
        """One line a layer, for grep: a cell for each fact."""
        return [
            (
                layer.name or "(the model)",
                layer.kind,
                f"C={layer.num_features}",
                f"batches={'-' if layer.batches is None else layer.batches}",
                f"mean={_range(layer.mean, '..')}",
                f"var={_range(layer.var, '..')}",
                f"dead={layer.near_dead}",
                layer.dtype,
                ",".join(sorted({f.code for f in self.findings if f.name == layer.name})) or "-",
            )
            for layer in self.layers
        ]


def _cells(layer: StoredLayer, means: Scale, variances: Scale, shared: set[str]) -> tuple[str, ...]:
    return (
        "" if "kind" in shared else layer.kind,
        str(layer.num_features),
        "" if "batches" in shared else "–" if layer.batches is None else str(layer.batches),
        _range(layer.mean, "…"),
        means.draw(layer.mean.deciles if layer.mean else None, _BAR),
        _range(layer.var, "…"),
        variances.draw(layer.var.deciles if layer.var else None, _BAR),
        str(layer.near_dead) if layer.near_dead else "",
        "" if "dtype" in shared else layer.dtype,
    )


def _range(spread: Spread | None, between: str) -> str:
    return "-" if spread is None else f"{spread.low:.2g}{between}{spread.high:.2g}"


def _verdict(inspection: CheckpointInspection, shared: set[str]) -> str:
    layers: Sequence[StoredLayer] = inspection.layers
    if not layers:
        return "No whole norm layer." if inspection.findings[0].name else "No norm layer."
    kinds = {layer.kind for layer in layers}
    text = f"{len(layers)} norm layer{'s' if len(layers) > 1 else ''}"
    text += f", all {kinds.pop()}" if len(kinds) == 1 and kinds != {BATCH_NORM} else ""
    text += f" in {layers[0].dtype}" if "dtype" in shared else ""
    if "batches" in shared and layers[0].batches is not None:
        text += f", {layers[0].batches:,} batches counted"
    channels = sum(layer.num_features for layer in layers)
    dead = sum(layer.near_dead for layer in layers)
    text += f", {dead:,} of {channels:,} channels near-dead" if dead else ""
    errors = len({finding.name for finding in inspection.findings if finding.level == "error"})
    warnings = sum(finding.level == "warning" for finding in inspection.findings)
    if errors:
        return f"{text}: {errors} {'layer is' if errors == 1 else 'layers are'} broken."
    if warnings:
        return f"{text}: usable, with {warnings} warning{'s' if warnings > 1 else ''}."
    return f"{text}: all sound."
