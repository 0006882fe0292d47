"""What `inspect` returns: of a checkpoint, and what it has in common with that of a live model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, Final

from bnfreeze.findings import Finding
from bnfreeze.histograms import Scale
from bnfreeze.inspection.origin import RUNS_CODE, Origin
from bnfreeze.inspection.stored_layers import BATCH_NORM, Spread, StoredLayer
from bnfreeze.sheets import Cell, Sheet
from bnfreeze.tables import Printable
from bnfreeze.text import counted

_BAR = 12
_LEGEND = "C: channels; a…b: range; bars: spread, on one axis; < >: values beyond it"
_DEAD = "; dead: variance < 1e-5 or |weight| < 1e-3"


def _kind(layer: StoredLayer) -> str:
    return f"{layer.kind} (frozen)" if layer.frozen_by else layer.kind


# A column is left empty where all layers have the same value; the last line gives it instead.
_SHARED: Final[dict[str, Callable[[StoredLayer], object]]] = {
    "kind": _kind,
    "batches": attrgetter("batches"),
    "dtype": attrgetter("dtype"),
}


@dataclass(frozen=True, repr=False)
class Inspection(Printable):
    """The norm layers of a model or a checkpoint, and what there is to know about them.

    It is true if `ok`. Printing it gives a table; `to_dict` gives the same facts for JSON.

    Attributes:
        layers: of a live model `bnfreeze.LiveLayer`, which says what the layer will do; of a
            checkpoint `bnfreeze.StoredLayer`, which says what its tensors hold.
        findings: the worst first.
    """

    layers: tuple[Any, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no finding of level ``"error"``."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "ok": self.ok,
            "layers": [asdict(layer) for layer in self.layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class Unread:
    """A model of a checkpoint that could not be read.

    Attributes:
        key: its dotted key.
        error: the class of the error, such as ``"CorruptCheckpointError"``.
        message: what is wrong with it.
    """

    key: str
    error: str
    message: str


@dataclass(frozen=True, repr=False)
class CheckpointInspection(Inspection):
    """The norm layers of a checkpoint or a state_dict, of all models in it.

    Attributes:
        origin: where they were found.
        sorted_by: by what the layers of each model are sorted; empty for the file's own order.
        unread: the models that could not be read, if others could.
        weights: whether the table has the range of the weights.
    """

    layers: tuple[StoredLayer, ...]
    origin: Origin
    sorted_by: str = ""
    unread: tuple[Unread, ...] = ()
    weights: bool = False

    @property
    def ok(self) -> bool:
        """Whether every model was read, and there is no finding of level ``"error"``."""
        return super().ok and not self.unread

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys."""
        unread = [asdict(one) for one in self.unread]
        return {"schema": 2, **asdict(self.origin), "unread": unread, **super().to_dict()}

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        layers = self.layers
        means = Scale([x.mean.deciles for x in layers if x.mean], positive=False)
        variances = Scale([x.var.deciles for x in layers if x.var], positive=True)
        shared = {
            column
            for column, fact in _SHARED.items()
            if len({fact(layer) for layer in layers}) == 1
        }

        def cells(layer: StoredLayer) -> list[tuple[str, Cell]]:
            batches = "–" if layer.batches is None else str(layer.batches)
            mean, var = (spread.deciles if spread else None for spread in (layer.mean, layer.var))
            return [
                ("layer", layer.name or "(the model)"),
                ("kind", "" if "kind" in shared else _kind(layer)),
                ("C", str(layer.num_features)),
                ("batches", "" if "batches" in shared else batches),
                ("mean", _range(layer.mean, "…")),
                (means.ends(_BAR), means.draw(mean, _BAR)),
                ("variance", _range(layer.var, "…")),
                (variances.ends(_BAR), variances.draw(var, _BAR)),
                ("weight", _range(layer.weight, "…") if self.weights else ""),
                ("dead", str(layer.near_dead or "")),
                ("dtype", "" if "dtype" in shared else layer.dtype),
            ]

        rows: list[tuple[Cell, ...]] = []
        columns: tuple[str, ...] = ()
        several = len({layer.key for layer in layers}) > 1
        for key, own in groupby(layers, attrgetter("key")):
            rows += [(f"{key or '(top)'}:",)] if several else []
            for layer in own:
                columns, row = zip(*cells(layer), strict=True)
                rows.append(row)
        return Sheet(
            title=self.origin.path or "A state_dict",
            columns=columns,
            rows=rows,
            findings=self.findings,
            verdict=_verdict(self, shared),
            further=frozenset({"kind", "dtype", means.ends(_BAR)}),
            notes=(
                *self.origin.summary(),
                *(f"{one.key} was not read: {one.message}" for one in self.unread),
            ),
            findings_first=True,
            outlined=not self.sorted_by,  # a tree has an order of its own
            legend=_LEGEND + (_DEAD if any(layer.near_dead for layer in layers) else ""),
        )

    def lines(self) -> list[tuple[str, ...]]:
        """One line a layer, for grep: a cell for each fact."""
        codes = defaultdict(set)
        for one in self.findings:
            codes[one.key, one.name].add(one.code)
        return [
            (
                *([layer.key or "(top)"] if len(self.origin.models) > 1 else []),
                layer.name or "(the model)",
                layer.kind,
                f"C={layer.num_features}",
                f"batches={'-' if layer.batches is None else layer.batches}",
                f"mean={_range(layer.mean, '..')}",
                f"var={_range(layer.var, '..')}",
                *([f"weight={_range(layer.weight, '..')}"] if self.weights else []),
                f"dead={layer.near_dead}",
                layer.dtype,
                ",".join(sorted(codes[layer.key, layer.name])) or "-",
            )
            for layer in self.layers
        ]


def _range(spread: Spread | None, between: str) -> str:
    return "-" if spread is None else f"{spread.low:.2g}{between}{spread.high:.2g}"


def _verdict(inspection: CheckpointInspection, shared: set[str]) -> str:
    layers, findings = inspection.layers, inspection.findings
    if not layers:
        whole = "whole " if any(one.code == "stats-unpaired" for one in findings) else ""
        return f"No {whole}norm layer with statistics under torch's names."
    text = counted(len(layers), "norm layer")
    kinds = {_kind(layer) for layer in layers}
    text += f", all {kinds.pop()}" if len(kinds) == 1 and kinds != {BATCH_NORM} else ""
    text += f" in {layers[0].dtype}" if "dtype" in shared else ""
    if "batches" in shared and layers[0].batches is not None:
        text += f", {layers[0].batches:,} batches counted"
    bare = sum(not layer.affine for layer in layers)
    text += f", {bare:,} of {len(layers):,} lack weight or bias" if bare else ""
    channels = sum(layer.num_features for layer in layers)
    dead = sum(layer.near_dead for layer in layers)
    text += f", {dead:,} of {channels:,} channels near-dead" if dead else ""
    if inspection.unread:
        text += f"; {len(inspection.unread)} of {len(inspection.origin.models)} models not read"
    errors = [one for one in findings if one.level == "error"]
    if any(one.code == RUNS_CODE for one in errors):
        text += "; loading the file would run code"
    if broken := len({(one.key, one.name) for one in errors if one.code != RUNS_CODE}):
        return f"{text}: {counted(broken, 'layer')} {'is' if broken == 1 else 'are'} broken."
    if not inspection.ok:
        return f"{text}."
    warned = [one for one in findings if one.level == "warning"]
    if not warned:
        return f"{text}: usable."
    warnings = counted(len({one.code for one in warned}), "warning")
    places = counted(len({(one.key, one.name) for one in warned}), "layer")
    return f"{text}: usable, with {warnings} on {places}."
