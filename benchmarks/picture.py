"""Bar charts in SVG: of the training steps of a run, or of what `folded` gains and does not gain.

`python -m benchmarks.picture benchmarks/results/cpu.json > docs/benchmarks.svg`, and likewise of
`h100.json`;
`python -m benchmarks.picture benchmarks/results/folded.json > docs/folded.svg`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from benchmarks import report, runs
from benchmarks.arms import ARMS
from benchmarks.facts import BASE, Record, Run
from benchmarks.setting import LAYOUTS, PRECISIONS

_LABELS, _PANEL, _GAP, _BAR, _ROW, _TOP = 250, 190, 24, 9, 28, 64
# bnfreeze, and all others; dark for NCHW, light for channels_last.
_COLOURS = {True: ("#1a7f5a", "#7cc9a8"), False: ("#6b7280", "#c2c7d0")}


def steps(run: Run) -> str:
    """Draw the training steps with the largest batch.

    Raises:
        LookupError: the run has no training steps.
    """
    found = [one for one in run.records if one.work == "step" and one.case.get("launch") != "graph"]
    if not found:
        raise LookupError("the run has no training steps")
    batch = max((one.case["batch"] for one in found), key=lambda batch: int(batch.split()[0]))
    measured = {one.case["precision"] for one in found}
    return draw(
        [one for one in found if one.case["batch"] == batch],
        [precision for precision in PRECISIONS if precision in measured],
        lambda one: one.case["precision"],
        f"A training step of a ResNet-50, batch {batch}",
        _footer(run, "Time"),
    )


def folded(run: Run) -> str:
    """Draw where `folded` gains most and where it gains least, in fp32.

    Raises:
        LookupError: the run has not measured `folded`.
    """
    plain = {"precision": "fp32", "malloc": "default"}
    found = [
        one for one in run.records if one.work == "folded" and plain.items() <= one.case.items()
    ]
    ours = [
        one
        for one in found
        if one.arm.startswith("bnfreeze folded") and one.case["layout"] == "channels_last"
    ]
    if not ours:
        raise LookupError("the run has not measured `folded` in fp32, channels_last")
    ours.sort(key=lambda one: one.median)
    panels = [_case(ours[0]), _case(ours[-1])]
    return draw(
        [one for one in found if _case(one) in panels],
        panels,
        _case,
        "Frozen parts on a CPU, in fp32: the largest gain and the smallest",
        _footer(run, "CPU time"),
    )


def _case(one: Record) -> str:
    return f"{one.case['model']}: {one.case['what']}"


def _footer(run: Run, time: str) -> str:
    return (
        f"{time} divided by that of {BASE}, with quartiles. {report.machine(run)}, "
        f"torch {run.versions['torch'].partition('+')[0]}."
    )


def draw(
    records: Sequence[Record],
    panels: Sequence[str],
    panel_of: Callable[[Record], str],
    title: str,
    footer: str,
) -> str:
    """Return an SVG of some panels, with two bars for each arm, one a layout."""
    plain = [arm.name for arm in ARMS if arm.compiled is None]
    measured = {one.arm for one in records}
    arms = [name for name in plain if name in measured]
    found = {(one.arm, panel_of(one), one.case["layout"]): one for one in records}
    most = max((one.high for one in records if one.arm in arms), default=1.0)
    most = max(1.25, math.ceil(most * 4) / 4)
    wide = _PANEL * len(PRECISIONS) // len(panels)
    width = _LABELS + len(panels) * (wide + _GAP)
    bottom = _TOP + _ROW * len(arms)
    parts = [_text(12, 22, title, size=15, weight=600)]
    parts += [
        _text(_LABELS - 10, _TOP + _ROW * row + 15, name, anchor="end", weight=_weight(name))
        for row, name in enumerate(arms)
    ]
    for number, panel in enumerate(panels):
        left = _LABELS + number * (wide + _GAP)
        parts.append(_text(left, _TOP - 10, panel, weight=600))
        labels = []  # above the line at 1
        for row, name in enumerate(arms):
            for place, layout in enumerate(LAYOUTS):
                one = found.get((name, panel, layout))
                if one is not None:
                    y = _TOP + _ROW * row + 4 + place * (_BAR + 1)
                    colour = _COLOURS[name.startswith("bnfreeze")][place]
                    parts += _bar(one, left, y, wide / most, colour)
                    labels += _label(one, left, y, wide / most)
        one_at = left + wide / most
        parts.append(
            f'<line x1="{one_at:.1f}" x2="{one_at:.1f}" y1="{_TOP}" y2="{bottom}" '
            'stroke="#b91c1c" stroke-dasharray="3 3"/>'
        )
        parts += labels
        parts.append(_text(one_at, bottom + 14, "1", anchor="middle", size=11))
    for place, layout in enumerate(LAYOUTS):
        x = width - 190 + 70 * place
        parts.append(_rectangle(x, 14, 10, 10, _COLOURS[False][place]))
        parts.append(_text(x + 15, 23, layout, size=11))
    parts.append(_text(12, bottom + 34, footer, size=11, colour="#4b5563"))
    height = bottom + 46
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _bar(one: Record, left: float, y: float, scale: float, colour: str) -> Iterable[str]:
    middle = y + _BAR / 2
    yield _rectangle(left, y, one.median * scale, _BAR, colour)
    if one.high > one.low:
        yield (
            f'<line x1="{left + one.low * scale:.1f}" x2="{left + one.high * scale:.1f}" '
            f'y1="{middle}" y2="{middle}" stroke="#111827"/>'
        )


def _label(one: Record, left: float, y: float, scale: float) -> Iterable[str]:
    x = left + one.high * scale + 4
    yield _rectangle(x - 1, y, 22, _BAR, "#ffffff")
    yield _text(x, y + _BAR - 1, f"{one.median:.2f}", size=9)


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 12,
    weight: int = 400,
    anchor: str = "start",
    colour: str = "#111827",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
    )


def _weight(name: str) -> int:
    return 600 if name.startswith("bnfreeze") else 400


if __name__ == "__main__":
    loaded = runs.load(Path(sys.argv[1]))
    has_steps = any(one.work == "step" for one in loaded.records)
    print(steps(loaded) if has_steps else folded(loaded), end="")
