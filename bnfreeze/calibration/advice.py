"""What the numbers support: findings, and a sentence of advice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from bnfreeze.calibration.fit import THRESHOLDS, LayerFit, Verdict
from bnfreeze.calibration.report import RecalibrationReport
from bnfreeze.findings import Finding, finding
from bnfreeze.policies.policy import Policy
from bnfreeze.text import counted, listed

_UNSEEN = "Unlabelled data cannot show whether the features suit"
_CHECK = f"{_UNSEEN}: compare the accuracy before and after."


def probe_findings(layers: Sequence[LayerFit]) -> Iterator[Finding]:
    """What a person should know about the fit of the layers."""
    for layer in layers:
        if layer.verdict == "not reached":
            yield finding("layer-not-reached", layer.name, "no batch reached this layer.")
        elif layer.origin == "carried":
            yield finding(
                "stats-shifted",
                layer.name,
                "this layer fits once the layers before it normalise their inputs.",
                level="note",
            )
        elif layer.verdict == "shifted":
            yield finding(
                "stats-shifted",
                layer.name,
                f"{layer.shifted_channels} of {layer.channels} channels are off for sure; the "
                f"median channel's mean by {layer.mean_shift.median:.2f} σ, its variance is "
                f"{layer.variance_ratio.median:.2f} times the stored one.",
            )
        if layer.dead_channels:
            yield finding(
                "dead-on-this-data",
                layer.name,
                f"{layer.dead_channels} of {layer.channels} channels do not vary on this data.",
            )
    if noisy := _noisy(layers):
        noises = [layer.batch_noise for layer in noisy]
        yield finding(
            "batch-too-small",
            "",
            f"with batches of {_most(layers)}, the mean that a layer normalises with in train "
            f"mode is off by {median(noises):.2f} σ (median of {len(noises)} layers), up to "
            f"{max(noises):.2f} σ.",
        )
    if short := _short_of_samples(layers):
        yield finding("too-few-samples", "", short)


def _of(layers: Sequence[LayerFit], *verdicts: Verdict) -> list[LayerFit]:
    return [layer for layer in layers if layer.verdict in verdicts]


def _reached(layers: Sequence[LayerFit]) -> list[LayerFit]:
    return _of(layers, "fits", "shifted", "uncertain")


def _policy(layer: LayerFit) -> Policy:
    # Another library's frozen layer keeps everything.
    return Policy.parse("fused" if layer.policy == "frozen" else layer.policy)


def _noisy(layers: Sequence[LayerFit]) -> list[LayerFit]:
    """The layers that normalise with the batch in train mode, if most of them get a noisy mean."""
    live = [
        layer
        for layer in _reached(layers)
        if math.isfinite(layer.batch_noise) and not _policy(layer).forces_eval
    ]
    return live if live and median(x.batch_noise for x in live) > THRESHOLDS.noise else []


def _most(layers: Sequence[LayerFit]) -> int:
    """The samples of a batch. Layers that see rows of unknown samples count one."""
    return max(layer.batch_size for layer in layers)


def _short_of_samples(layers: Sequence[LayerFit]) -> str:
    """How many layers are uncertain that more samples would decide; empty for none."""
    short = [
        layer for layer in _of(layers, "uncertain") if not 0 < layer.samples_needed <= layer.samples
    ]
    if not short:
        return ""
    needed = max(layer.samples_needed for layer in short)
    return (
        f"{len(short)} of {len(_reached(layers))} layers are uncertain: too few samples "
        f"({min(layer.samples for layer in short):,}). "
        + (f"About {float(f'{needed:.1e}'):,.0f} would tell." if needed else "More would tell.")
    )


def advice_before(layers: Sequence[LayerFit]) -> str:
    """What to do with a model whose layers fit like this."""
    reached, shifted, unsure = _reached(layers), _of(layers, "shifted"), _of(layers, "uncertain")
    if not reached:
        return "No norm layer was reached, so nothing is known: run the model as you use it."
    frozen = any(_policy(layer).freezes_statistics for layer in shifted or unsure)
    call = "recalibrate(model, batches, score=...{})".format(", select='**'" if frozen else "")
    sure = f"{THRESHOLDS.confidence:.0%} sure in each layer"
    if shifted:
        start = (
            f"The stored statistics do not fit this data in {len(shifted)} of {len(reached)} "
            f"layers ({sure}). "
        )
        own = [layer for layer in shifted if layer.origin == "own"]
        if not own:
            return (
                f"{start}Worst in {_worst(shifted, named=True)}. Do not freeze them like this: "
                f"{call} first. {_CHECK}"
            )
        if _are_most(own, reached):
            return (
                f"{start}In {len(own)} layers that remains even when all layers before are "
                f"normalised, so new statistics alone are unlikely to be enough: fine-tune "
                f"without freezing, or see what {call} says."
            )
        names = [layer.name or "the model" for layer in own]
        carried = sum(layer.origin == "carried" for layer in shifted)
        return (
            f"{start}The shift starts in {listed(names, 3)} ({_worst(own, named=len(own) > 1)})"
            + (f"; {carried} other layers seem to follow from it" if carried else "")
            + f". Do not freeze them like this: {call} is likely to mend it; then freeze. {_CHECK}"
        )
    if not unsure:
        kept = all(_policy(layer).forces_eval for layer in reached)
        then = "keep them frozen" if kept else "freeze(model, 'eval+affine') keeps them"
        if _noisy(layers):
            then += f", and ends the noise of batches of {_most(layers)}"
        return (
            f"The stored statistics fit this data in all {len(reached)} layers ({sure}): {then}. "
            f"{_UNSEEN}."
        )
    if short := _short_of_samples(layers):
        return f"Nothing shows a misfit, but {short} Probe again with more."
    return (
        f"Nothing shows a clear misfit; in {len(unsure)} of {len(reached)} layers the difference "
        f"lies near the threshold ({THRESHOLDS.mean} σ, a factor of {THRESHOLDS.ratio}). Try "
        f"{call} before you freeze. {_CHECK}"
    )


def _worst(layers: Sequence[LayerFit], *, named: bool) -> str:
    """By how much statistics are off, in the layer where it is most."""

    def size(layer: LayerFit) -> float:
        return max(
            layer.mean_shift.median / THRESHOLDS.mean,
            abs(math.log(max(layer.variance_ratio.median, 1e-300))) / math.log(THRESHOLDS.ratio),
        )

    layer = max(layers, key=size)
    where = f"{layer.name or 'the model'}: " if named else ""
    return (
        f"{where}means are off by {layer.mean_shift.median:.2f} σ, variances are "
        f"{layer.variance_ratio.median:.2f} times the stored ones"
    )


def _are_most(own: Sequence[LayerFit], reached: Sequence[LayerFit]) -> bool:
    """Whether the inputs of most layers have changed, and not only their scale."""
    return len(reached) > 2 and 2 * len(own) > len(reached)


def advice_after(report: RecalibrationReport) -> str:
    """What to do with a model that was recalibrated; the report has no advice yet."""
    if report.mode == "keep-function":
        return (
            "The model computes what it did before, and its statistics are those of this data: "
            "fine-tune it. Freezing alone changes nothing for the better."
        )
    reached = _reached(report.before.layers)
    left = ""
    if shifted := {layer.name for layer in _of(report.after.layers, "shifted")}:
        untouched = len(shifted.difference(report.recalibrated))
        left = f" {len(shifted)} of {len(reached)} layers still do not fit"
        left += f", {untouched} of them left as they were" if untouched else ""
        left += "." if untouched or report.exact else ": try exact=True."
    given = [layer for layer in reached if layer.name in report.recalibrated]
    if dead := sum(layer.dead_channels for layer in given):
        left += f" {counted(dead, 'channel')} with no signal got a variance of 0, or nearly 0."
    old, new = report.score_before, report.score_after
    if old is not None and new is not None:
        figures = f"({old:.4g} before, {new:.4g} after)"
        said = f"says nothing {figures}."
        if new > old:
            enough = "If it is good enough, freeze the model; if not, fine-tune without freezing."
            said = f"rose {figures}. {enough}"
        elif new == old:
            said = f"is the same {figures}. Recalibrating brought nothing."
        elif new < old:
            train = ", and fine-tune without freezing" if _of(reached, "shifted") else ""
            said = f"fell {figures}: take it back with report.undo(){train}."
        return f"The score {said}{left}"
    own = [layer for layer in reached if layer.origin == "own"]
    then = (
        f" But {len(own)} of {len(reached)} layers were off even with normalised inputs, so the "
        f"features are unlikely to suit this data: measure the accuracy, or pass score=, before "
        f"you freeze; fine-tune without freezing if it is low."
        if _are_most(own, reached)
        else " Freeze the model once the accuracy on labelled data has shown that it is no worse "
        "than before."
    )
    return f"The statistics are those of this data now.{left}{then}"
