"""What `probe` and `recalibrate` found, as data and as tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain data with stable keys. What is infinite or NaN is None."""
        layers = [
            {
                **asdict(layer),
                "mean_shift": layer.mean_shift._asdict(),
                "variance_ratio": layer.variance_ratio._asdict(),
            }
            for layer in self.layers
        ]
        return {
            "schema": 2,
            "ok": self.ok,
            "samples": self.samples,
            "batches": self.batches,
            "advice": self.advice,
            "thresholds": asdict(self.thresholds),
            "layers": [_finite(layer) for layer in layers],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        layers = self.layers
        scale = Scale([x.shifts for x in layers if x.shifts], positive=False)
        title, further = shared_kind("Statistics against data", [x.kind for x in layers])
        columns = (
            "layer",
            "kind",
            "verdict",
            "shift",
            "mean off, σ",
            scale.ends(_BAR),
            "variance",
            "by chance",
            "batch noise",
            "channels off",
            "samples",
        )
        return Sheet(
            title=title,
            columns=columns,
            rows=[(layer.name or "(the model)", *_cells(layer, scale)) for layer in layers],
            findings=self.findings,
            verdict=self.advice,
            further=further | {"by chance", "batch noise", "channels off", "samples"},
            notes=(f"{self.samples:,} samples in {self.batches:,} batches",),
            outlined=True,
            legend="median channel … the one farthest off; bars: the shift of all channels, in σ",
        )


def _cells(layer: LayerFit, scale: Scale) -> tuple[Cell, ...]:
    if layer.verdict == "not reached":
        return (layer.kind, layer.verdict, *[""] * 8)
    off = layer.shifted_channels
    return (
        layer.kind,
        layer.verdict,
        layer.origin,
        _shift(layer.mean_shift),
        scale.draw(layer.shifts or None, _BAR),
        _ratio(layer.variance_ratio),
        f"±{layer.margin:.2f}",
        f"{layer.batch_noise:.2f} of {layer.batch_size}" if layer.batch_noise >= 0 else "",
        f"{off} of {layer.channels}" if off else "",
        f"{layer.samples}",
    )


def _shift(shift: PerChannel) -> str:
    return f"{shift.median:.2f} … {shift.largest:.2f}"


def _ratio(ratio: PerChannel) -> str:
    return f"×{_factor(ratio.median)} … ×{_factor(ratio.largest)}"


def _factor(value: float) -> str:
    return f"{value:.2f}" if 0.05 <= value < 99.5 else f"{value:.0e}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(each) for each in value]
    return value


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
        """The facts as plain data with stable keys."""
        return {
            "schema": 2,
            "mode": self.mode,
            "exact": self.exact,
            "recalibrated": list(self.recalibrated),
            "score_before": self.score_before,
            "score_after": self.score_after,
            "passes": self.passes,
            "advice": self.advice,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        changed = set(self.recalibrated)
        pairs = list(zip(self.before.layers, self.after.layers, strict=True))
        title, further = shared_kind("Statistics recalibrated", [x.kind for x, _ in pairs])
        score = ""
        if self.score_before is not None and self.score_after is not None:
            score = f" Score: {self.score_before:.4g} before, {self.score_after:.4g} after."
        return Sheet(
            title=title,
            columns=(
                "layer",
                "kind",
                "before",
                "mean off, σ",
                "variance",
                "after",
                "mean off then",
                "variance then",
                "note",
            ),
            rows=[
                (before.name or "(the model)", *_pair(before, after, changed))
                for before, after in pairs
            ],
            findings=self.findings,
            verdict=self.advice,
            further=further | {"variance", "variance then"},
            notes=(
                f"{len(changed)} of {len(pairs)} layers, mode {self.mode!r}, "
                f"{self.before.samples:,} samples, {self.passes} passes.{score}",
            ),
        )


def _pair(before: LayerFit, after: LayerFit, changed: set[str]) -> tuple[str, ...]:
    if before.verdict == "not reached":
        return (before.kind, before.verdict, *[""] * 6)
    return (
        before.kind,
        before.verdict,
        _shift(before.mean_shift),
        _ratio(before.variance_ratio),
        after.verdict,
        _shift(after.mean_shift),
        _ratio(after.variance_ratio),
        "" if before.name in changed else "left as it was",
    )
