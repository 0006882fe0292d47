"""What `probe` and `recalibrate` found, as data and as tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from bnfreeze.calibration.fit import LayerFit, PerChannel, Thresholds
from bnfreeze.findings import Finding
from bnfreeze.histograms import Scale
from bnfreeze.sheets import Cell, Sheet, shared_kind
from bnfreeze.tables import Printable

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
        rows: list[dict[str, Cell]] = []
        for layer in self.layers:
            off, noise = layer.shifted_channels, layer.batch_noise
            row = {
                "layer": layer.name or "(the model)",
                "kind": layer.kind,
                "verdict": layer.verdict,
                "shift": layer.origin,
                "mean off, σ": _shift(layer.mean_shift),
                scale.ends(_BAR): scale.draw(layer.shifts or None, _BAR),
                "variance": _ratio(layer.variance_ratio),
                "by chance": f"±{layer.margin:.2f}",
                "batch noise": f"{noise:.2f} of {layer.batch_size}" if noise >= 0 else "",
                "channels off": f"{off} of {layer.channels}" if off else "",
                "samples": f"{layer.samples}",
            }
            rows.append(row)
        return _sheet(
            self,
            "Statistics against data",
            rows,
            {"by chance", "batch noise", "channels off", "samples"},
            f"{self.samples:,} samples in {self.batches:,} batches",
            outlined=True,
            legend="median channel … the one farthest off; bars: the shift of all channels, in σ",
        )


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
        """The facts as plain data with stable keys. What is infinite or NaN is None."""
        facts = {name: value for name, value in vars(self).items() if name != "undo"}
        return _plain({"schema": 2, **facts})

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        rows: list[dict[str, Cell]] = [
            {
                "layer": before.name or "(the model)",
                "kind": before.kind,
                "before": before.verdict,
                "mean off, σ": _shift(before.mean_shift),
                "variance": _ratio(before.variance_ratio),
                "after": after.verdict,
                "mean off then": _shift(after.mean_shift),
                "variance then": _ratio(after.variance_ratio),
                "note": "" if before.name in self.recalibrated else "left as it was",
            }
            for before, after in zip(self.before.layers, self.after.layers, strict=True)
        ]
        note = (
            f"{len(self.recalibrated)} of {len(rows)} layers, mode {self.mode!r}, "
            f"{self.before.samples:,} samples, {self.passes} passes."
        )
        if self.score_before is not None and self.score_after is not None:
            note += f" Score: {self.score_before:.4g} before, {self.score_after:.4g} after."
        return _sheet(self, "Statistics recalibrated", rows, {"variance", "variance then"}, note)


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As strict JSON gives it back, which has neither tuples, NaN nor infinity."""
    text = json.dumps(facts, default=lambda report: report.to_dict())
    return cast("dict[str, Any]", json.loads(text, parse_constant=lambda _: None))


def _sheet(
    report: ProbeReport | RecalibrationReport,
    title: str,
    rows: Sequence[dict[str, Cell]],
    further: set[str],
    note: str,
    **options: Any,
) -> Sheet:
    """A table of rows that have the cells of a layer by their headings."""
    title, kind = shared_kind(title, [str(row["kind"]) for row in rows])
    cells = [tuple(row.values()) for row in rows]
    nothing = ("",) * (len(rows[0]) - 3)  # is known more of a layer that was never reached
    return Sheet(
        title=title,
        columns=tuple(rows[0]),
        rows=[row[:3] + nothing if row[2] == "not reached" else row for row in cells],
        findings=report.findings,
        verdict=report.advice,
        further=kind | further,
        notes=(note,),
        **options,
    )


def _shift(shift: PerChannel) -> str:
    return f"{shift.median:.2f} … {shift.largest:.2f}"


def _ratio(ratio: PerChannel) -> str:
    return f"×{_factor(ratio.median)} … ×{_factor(ratio.largest)}"


def _factor(value: float) -> str:
    if not 1e-3 <= value < 1e4:
        return f"{value:.0e}"
    return f"{value:.1g}" if value < 0.05 else f"{value:.{2 if value < 99.5 else 0}f}"
