"""What `probe` and `recalibrate` found, as data and as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from typing import Any, Literal, cast

from bnfreeze.calibration.fit import LayerFit, PerChannel, Thresholds
from bnfreeze.findings import Finding
from bnfreeze.histograms import Scale
from bnfreeze.sheets import Cell, Sheet, shared_kind
from bnfreeze.tables import Printable

__all__ = ["Mode", "ProbeReport", "RecalibrationReport"]

Mode = Literal["replace", "keep-function"]
_BAR = 8


@dataclass(frozen=True, repr=False)
class ProbeReport(Printable):
    """How well the stored statistics of a model fit some data.

    Printing it gives a table, in a notebook too; `save_svg` saves it as a picture.

    Attributes:
        layers: one for each norm layer, in the model's order.
        findings: the worst first.
        advice: what to do, as far as the numbers support it.
        samples: how many samples the model was run on.
        batches: in how many batches.
        thresholds: what counts as a misfit.
    """

    layers: tuple[LayerFit, ...]
    findings: tuple[Finding, ...]
    advice: str
    samples: int
    batches: int
    thresholds: Thresholds

    @property
    def ok(self) -> bool:
        """Whether the statistics of every layer that was reached fit, and one was reached."""
        reached = [layer for layer in self.layers if layer.verdict != "not reached"]
        return bool(reached) and all(layer.verdict == "fits" for layer in reached)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys. What is infinite or NaN is None."""
        return _plain({"schema": 2, "ok": self.ok, **asdict(self)})

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        scale = Scale([x.shifts for x in self.layers if x.shifts], positive=False)
        title, further = shared_kind("Statistics against data", [x.kind for x in self.layers])
        rows = [_row(layer, scale) for layer in self.layers]
        return Sheet(
            title=title,
            columns=tuple(rows[0]),
            rows=[tuple(row.values()) for row in rows],
            findings=self.findings,
            verdict=self.advice,
            further=further | {"by chance", "batch noise", "channels off", "samples"},
            notes=(f"{self.samples:,} samples in {self.batches:,} batches",),
            outlined=True,
            legend="median channel … the one farthest off; bars: the shift of all channels, in σ",
        )


def _row(layer: LayerFit, scale: Scale) -> dict[str, Cell]:
    """The cells of a layer by their headings."""
    off = layer.shifted_channels
    noise = f"{layer.batch_noise:.2f} of {layer.batch_size}" if layer.batch_noise >= 0 else ""
    return _known(
        layer,
        {
            "layer": layer.name or "(the model)",
            "kind": layer.kind,
            "verdict": layer.verdict,
            "shift": layer.origin,
            "mean off, σ": _shift(layer.mean_shift),
            scale.ends(_BAR): scale.draw(layer.shifts or None, _BAR),
            "variance": _ratio(layer.variance_ratio),
            "by chance": f"±{layer.margin:.2f}",
            "batch noise": noise,
            "channels off": f"{off} of {layer.channels}" if off else "",
            "samples": f"{layer.samples}",
        },
    )


def _known(layer: LayerFit, row: dict[str, Cell]) -> dict[str, Cell]:
    """The row, or only its first three cells: of a layer never reached nothing more is known."""
    if layer.verdict != "not reached":
        return row
    return dict.fromkeys(row, "") | dict(islice(row.items(), 3))


def _shift(shift: PerChannel) -> str:
    return f"{shift.median:.2f} … {shift.largest:.2f}"


def _ratio(ratio: PerChannel) -> str:
    return f"×{_factor(ratio.median)} … ×{_factor(ratio.largest)}"


def _factor(value: float) -> str:
    return f"{value:.2f}" if 0.05 <= value < 99.5 else f"{value:.0e}"


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As strict JSON gives it back, which has neither tuples, NaN nor infinity."""
    return cast("dict[str, Any]", json.loads(json.dumps(facts), parse_constant=lambda _: None))


@dataclass(frozen=True, repr=False)
class RecalibrationReport(Printable):
    """What `recalibrate` did: what `probe` says before and after it.

    Attributes:
        mode: ``"replace"`` or ``"keep-function"``.
        exact: whether each layer was measured with all before it already recalibrated.
        recalibrated: the names of the layers that have new statistics.
        before: how the old statistics fit.
        after: how the new ones do. Of ``mode="replace"`` it shows what shift remains.
        score_before: what `score` gave before; None without one.
        score_after: what it gave after.
        passes: how often the data were gone through, all in all.
        findings: the worst first.
        advice: what to do next, as far as the numbers support it.
        undo: gives the old values back, bit for bit.
    """

    mode: Mode
    exact: bool
    recalibrated: tuple[str, ...]
    before: ProbeReport
    after: ProbeReport
    score_before: float | None
    score_after: float | None
    passes: int
    findings: tuple[Finding, ...]
    advice: str
    undo: Callable[[], None] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys. What is NaN is None."""
        facts = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "undo"}
        facts |= {"before": self.before.to_dict(), "after": self.after.to_dict()}
        facts["findings"] = [finding.to_dict() for finding in self.findings]
        return _plain({"schema": 2, **facts})

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        pairs = list(zip(self.before.layers, self.after.layers, strict=True))
        title, further = shared_kind("Statistics recalibrated", [x.kind for x, _ in pairs])
        rows = [_pair(before, after, self.recalibrated) for before, after in pairs]
        score = ""
        if self.score_before is not None and self.score_after is not None:
            score = f" Score: {self.score_before:.4g} before, {self.score_after:.4g} after."
        return Sheet(
            title=title,
            columns=tuple(rows[0]),
            rows=[tuple(row.values()) for row in rows],
            findings=self.findings,
            verdict=self.advice,
            further=further | {"variance", "variance then"},
            notes=(
                f"{len(self.recalibrated)} of {len(pairs)} layers, mode {self.mode!r}, "
                f"{self.before.samples:,} samples, {self.passes} passes.{score}",
            ),
        )


def _pair(before: LayerFit, after: LayerFit, recalibrated: Collection[str]) -> dict[str, Cell]:
    """The cells of a layer by their headings."""
    return _known(
        before,
        {
            "layer": before.name or "(the model)",
            "kind": before.kind,
            "before": before.verdict,
            "mean off, σ": _shift(before.mean_shift),
            "variance": _ratio(before.variance_ratio),
            "after": after.verdict,
            "mean off then": _shift(after.mean_shift),
            "variance then": _ratio(after.variance_ratio),
            "note": "" if before.name in recalibrated else "left as it was",
        },
    )
