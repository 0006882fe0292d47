"""What the numbers support: findings, and a sentence of advice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from statistics import median

from bnfreeze.calibration.fit import THRESHOLDS, LayerFit
from bnfreeze.findings import Finding, finding
from bnfreeze.policies.policy import Policy

__all__ = ["advice_after", "advice_before", "probe_findings"]

_CHECK = (
    "Unlabelled data cannot show whether the features suit: compare the accuracy before and after"
)


def probe_findings(layers: Sequence[LayerFit]) -> Iterator[Finding]:
    """What a person should know about the fit of the layers."""
    reached = [layer for layer in layers if layer.verdict != "not reached"]
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
    batch, noises = _noises(reached)
    if noises and median(noises) > THRESHOLDS.noise:
        yield finding(
            "batch-too-small",
            "",
            f"with batches of {batch}, the mean that a layer normalises with in train mode is off "
            f"by {median(noises):.2f} σ (median of {len(noises)} layers), up to "
            f"{max(noises):.2f} σ.",
        )
    if short := _short_of_samples(reached):
        needed = max(layer.samples_needed for layer in short)
        yield finding(
            "too-few-samples",
            "",
            f"{len(short)} of {len(reached)} layers are uncertain with {_samples(short)}."
            + (f" About {_rounded(needed)} would tell." if needed else ""),
        )


def _noises(layers: Sequence[LayerFit]) -> tuple[int, list[float]]:
    """The size of a batch, and its noise in each layer that normalises with it in train mode."""
    live = [layer for layer in layers if not _policy(layer).forces_eval]
    noises = [layer.batch_noise for layer in live if math.isfinite(layer.batch_noise)]
    return (live[0].batch_size if live else 0), noises


def _policy(layer: LayerFit) -> Policy:
    # Another library's frozen layer keeps everything.
    return Policy.parse("fused" if layer.policy == "frozen" else layer.policy)


def _short_of_samples(layers: Sequence[LayerFit]) -> list[LayerFit]:
    """Those that are uncertain, where more samples would help."""
    return [
        layer
        for layer in layers
        if layer.verdict == "uncertain" and not 0 < layer.samples_needed <= layer.samples
    ]


def _samples(layers: Sequence[LayerFit]) -> str:
    count = min(layer.samples for layer in layers)
    return f"{count:,} sample{'' if count == 1 else 's'}"


def _rounded(count: int) -> str:
    digits = max(len(str(count)) - 2, 0)
    return f"{math.ceil(count / 10**digits) * 10**digits:,}"


def advice_before(layers: Sequence[LayerFit]) -> str:
    """What to do with a model whose layers fit like this."""
    reached = [layer for layer in layers if layer.verdict != "not reached"]
    if not reached:
        return "No norm layer was reached, so nothing is known: run the model as you use it."
    shifted = [layer for layer in reached if layer.verdict == "shifted"]
    unsure = [layer for layer in reached if layer.verdict == "uncertain"]
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
            return start + (
                f"Worst: {_worst(shifted)}. Do not freeze them like this: {call} first. {_CHECK}."
            )
        if _is_most(own, reached):
            return start + (
                f"In {len(own)} layers that remains even when all layers before are normalised, so "
                f"new statistics alone are unlikely to be enough: fine-tune without freezing, or "
                f"see what {call} says."
            )
        rest = len(shifted) - len(own)
        carried = sum(layer.origin == "carried" for layer in shifted)
        others = f"the other {rest}" if carried == rest else f"{carried} of the other {rest}"
        return start + (
            f"The shift starts in {_names(own)} ({_worst(own)})"
            + (f"; {others} seem to follow from it" if carried else "")
            + f". Do not freeze them like this: {call} is likely to mend it; then freeze. {_CHECK}."
        )
    if not unsure:
        batch, noises = _noises(reached)
        noisy = noises and median(noises) > THRESHOLDS.noise
        if all(_policy(layer).forces_eval for layer in reached):
            then = "keep them frozen"
        else:
            then = "freeze(model, 'eval+affine') keeps them"
            then += f", and ends the noise of batches of {batch}" if noisy else ""
        return (
            f"The stored statistics fit this data in all {len(reached)} layers ({sure}): {then}. "
            f"{_CHECK.partition(':')[0]}."
        )
    if short := _short_of_samples(unsure):
        needed = max(layer.samples_needed for layer in short)
        more = f" Probe again with about {_rounded(needed)}." if needed else " Probe with more."
        return (
            f"Nothing shows a misfit, and {len(unsure)} of {len(reached)} layers are uncertain: "
            f"{_samples(short)} are too few.{more}"
        )
    return (
        f"Nothing shows a clear misfit; in {len(unsure)} of {len(reached)} layers the difference "
        f"lies near the threshold ({THRESHOLDS.mean} σ, a factor of {THRESHOLDS.ratio}). Try "
        f"{call} before you freeze. {_CHECK}."
    )


def _worst(layers: Sequence[LayerFit]) -> str:
    def size(layer: LayerFit) -> tuple[float, float]:
        return (
            layer.mean_shift.median / THRESHOLDS.mean,
            abs(math.log(layer.variance_ratio.median)) / math.log(THRESHOLDS.ratio),
        )

    layer = max(layers, key=lambda one: max(size(one)))
    by_mean, by_variance = size(layer)
    if by_mean > by_variance:
        how = f"means are off by {layer.mean_shift.median:.2f} σ"
    else:
        how = f"variances are {layer.variance_ratio.median:.2f} times the stored ones"
    return f"{layer.name or 'the model'}, where {how}" if len(layers) > 1 else how


def _is_most(own: Sequence[LayerFit], reached: Sequence[LayerFit]) -> bool:
    """Whether the inputs of most layers have changed, and not only their scale."""
    return len(reached) > 2 and 2 * len(own) > len(reached)


def _names(layers: Sequence[LayerFit]) -> str:
    named = [layer.name or "the model" for layer in layers]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def advice_after(
    before: Sequence[LayerFit],
    after: Sequence[LayerFit],
    recalibrated: Collection[str],
    mode: str,
    exact: bool,
    scores: Sequence[float],
) -> str:
    """What to do with a model that was recalibrated.

    Args:
        before: the layers' fit before.
        after: and with the new statistics.
        recalibrated: the names of the layers that were.
        mode: how.
        exact: likewise.
        scores: before and after, or none; more is better.
    """
    if mode == "keep-function":
        return (
            "The model computes what it did before, and its statistics are those of this data: "
            "fine-tune it. Freezing alone changes nothing for the better."
        )
    reached = [layer for layer in before if layer.verdict != "not reached"]
    own = [layer for layer in reached if layer.origin == "own"]
    shifted = [layer.name for layer in after if layer.verdict == "shifted"]
    left = f" {len(shifted)} of {len(reached)} layers still do not fit" if shifted else ""
    if untouched := [name for name in shifted if name not in recalibrated]:
        left += f", {len(untouched)} of them left as they were"
    elif left and not exact:
        left += ": try exact=True"
    left += "." if left else ""
    if not scores:
        if _is_most(own, reached):
            return (
                f"The statistics are those of this data now.{left} But {len(own)} of "
                f"{len(reached)} layers were off even with normalised inputs, so the features are "
                f"unlikely to suit this data: measure the accuracy, or pass score=, before you "
                f"freeze; fine-tune without freezing if it is low."
            )
        return (
            f"The statistics are those of this data now.{left} Freeze the model once the accuracy "
            f"on labelled data has shown that it is no worse than before."
        )
    first, then = scores
    figures = f"({first:.4g} before, {then:.4g} after)"
    if math.isnan(first) or math.isnan(then):
        return f"The score says nothing {figures}.{left}"
    if then > first:
        return (
            f"The score rose {figures}.{left} If it is good enough, freeze the model; if not, "
            f"fine-tune without freezing."
        )
    if then == first:
        return f"The score is the same {figures}.{left} Recalibrating brought nothing."
    misfit = any(layer.verdict == "shifted" for layer in before)
    then_train = ", and fine-tune without freezing" if misfit else ""
    return f"The score fell {figures}: take it back with report.undo(){then_train}.{left}"
