"""How well one layer's stored statistics fit the data: numbers, and a verdict."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Final, Literal

import torch

from bnfreeze.calibration.moments import Moments
from bnfreeze.norm_layers import STATISTICS, NamedModule, eps_of
from bnfreeze.policies.record import layer_class, policy_name

Verdict = Literal["fits", "shifted", "uncertain", "not reached"]
Origin = Literal["", "own", "carried", "unclear"]


@dataclass(frozen=True)
class Thresholds:
    """What counts as a misfit of a layer.

    A layer is ``shifted`` if more than `share` of its channels lie beyond `mean` or `ratio` for
    sure, and ``fits`` if at most `share` of them may do so. Sure is what holds for all channels at
    once with the probability `confidence`.

    Attributes:
        mean: of a channel's mean, in the layer's standard deviations.
        ratio: of a channel's variance, as a factor: as much more, or as much less.
        share: of the channels; at least one channel.
        confidence: of the intervals, over all channels of a layer.
        noise: of a batch's mean, in standard deviations, from which on a batch is too small.
    """

    mean: float
    ratio: float
    share: float = 0.05
    confidence: float = 0.95
    noise: float = 0.2


# Chosen by the rule of benchmarks/calibration_study.py, the smallest with few false alarms, on
# networks of the seeds 0 and 1; judged on those of the seeds 2 to 4.
THRESHOLDS: Final = Thresholds(mean=0.15, ratio=1.35)

# Of a layer while all layers normalise with each batch. They are a choice, and wider: small batches
# alone move the inputs of the layers behind, by up to 0.17 σ with batches of 2 on a ResNet-18.
THRESHOLDS_APART: Final = Thresholds(mean=0.25, ratio=1.5)

# From so many degrees of freedom on, the distribution is nearly normal.
_MANY = 1_000
# A channel whose variance is below this share of the stored one gives no signal on this data.
_DEAD = 1e-6
# Broken statistics must not end in NaN, which nothing is beyond of.
_TINY = 1e-30


@dataclass(frozen=True)
class PerChannel:
    """A number that each channel has, in short: the median channel, and the one farthest off."""

    median: float
    largest: float


_NO_SHIFT, _SAME_VARIANCE = PerChannel(0.0, 0.0), PerChannel(1.0, 1.0)


@dataclass(frozen=True)
class LayerFit:
    """How well the stored statistics of one layer fit the data.

    Lengths are in the layer's stored standard deviations σ = √(running_var + eps).

    Attributes:
        name: the dotted name; of a shared layer the first.
        kind: the class, as it was before freezing.
        policy: the layer's policy; ``"none"`` if it is not frozen.
        channels: how many channels it has.
        samples: how many samples it was given: items of the batches. They count as independent of
            each other. Pixels of one image do not, nor do several rows of one item, such as the
            frames of a video.
        batch_size: how many of them at once, at most.
        mean_shift: the distance of the data's mean from the running mean, in σ.
        variance_ratio: variance of the data / running variance, eps added to both. The largest is
            the one farthest from 1 as a factor.
        batch_noise: by how much the mean of a batch of `batch_size` scatters about the mean of the
            data: the standard deviation of the samples' means / √batch_size, in σ, of the median
            channel. Noise that the layers before add in train mode is not in it. NaN for a single
            sample, and for instance norm, which normalises each sample alone.
        standard_error: of the data's mean, for this many samples, in σ, of the median channel.
        margin: the half-width of the intervals that hold for all channels at once, in σ, of the
            median channel. So large may a shift be by the choice of the samples alone.
        shifted_channels: how many channels lie beyond the thresholds for sure.
        dead_channels: how many had no signal on this data, and have a stored variance.
        samples_needed: with about so many samples, margins would be half the thresholds; 0 if
            that cannot be told, as from a single sample.
        verdict: ``"fits"``, ``"shifted"``, ``"uncertain"`` or ``"not reached"``.
        origin: of a shifted layer, whether it still does not fit while all layers normalise with
            each batch: ``"own"`` if so, ``"carried"`` if it fits then, so that the shift comes
            from a layer before it, ``"unclear"`` if that is uncertain; empty if not looked at.
        shifts: the deciles over channels of the shift with its sign, in σ; empty if not reached, or
            if a stored value is NaN or infinite.
    """

    name: str
    kind: str
    policy: str
    channels: int
    samples: int = 0
    batch_size: int = 0
    mean_shift: PerChannel = _NO_SHIFT
    variance_ratio: PerChannel = _SAME_VARIANCE
    batch_noise: float = 0.0
    standard_error: float = 0.0
    margin: float = 0.0
    shifted_channels: int = 0
    dead_channels: int = 0
    samples_needed: int = 0
    verdict: Verdict = "not reached"
    origin: Origin = ""
    shifts: tuple[float, ...] = ()


def layer_fit(
    entry: NamedModule, moments: Moments | None, thresholds: Thresholds = THRESHOLDS
) -> LayerFit:
    """Compare a layer's stored statistics, as they are now, with what was measured.

    Args:
        entry: the layer.
        moments: of its input; None if it was given none.
        thresholds: what counts as a misfit.
    """
    layer = entry.module
    mean, var = (layer.get_buffer(name).detach().cpu().double() for name in STATISTICS[:2])
    head = (entry.name, layer_class(layer).__name__, policy_name(layer), len(mean))
    if moments is None:
        return LayerFit(*head)
    # A single value has no variance: what is not known counts as unchanged, and is uncertain.
    data_var = moments.variance if moments.has_variance else var
    eps = eps_of(layer) or 0.0
    square, data_square = ((v + eps).clamp(min=_TINY) for v in (var, data_var))
    sigma = square.sqrt()
    error = moments.mean_error / sigma
    # Means and variances alike: how far off, how far they may be off by chance, and the threshold.
    off = torch.stack([(moments.mean - mean) / sigma, (data_square / square).log()])
    chance = torch.stack([error, moments.variance_error / data_square])
    bound = torch.tensor([[thresholds.mean], [math.log(thresholds.ratio)]], dtype=torch.float64)
    tail = (1 - thresholds.confidence) / (4 * len(mean))  # two intervals, each with two ends
    t = student_quantile(tail, max(moments.samples - 1, 1))
    # Written so that stored NaN is beyond.
    certain = int((~(off.abs() - t * chance <= bound)).any(0).sum())
    possible = int((~(off.abs() + t * chance < bound)).any(0).sum())
    allowed = thresholds.share * len(mean)
    verdict: Verdict = (
        "shifted" if certain > allowed else "fits" if possible <= allowed else "uncertain"
    )
    usual = chance.quantile(1 - thresholds.share, dim=1, keepdim=True)
    needed = _samples_needed(moments.samples * float((2 * usual / bound).square().max()), tail)
    noise = error.median() * (moments.samples / moments.batch_size) ** 0.5
    shift, ratio = off
    deciles = shift.quantile(torch.linspace(0, 1, 11, dtype=torch.float64)).tolist()
    return LayerFit(
        *head,
        samples=moments.samples,
        batch_size=moments.batch_size,
        mean_shift=PerChannel(float(shift.abs().median()), float(shift.abs().max())),
        variance_ratio=PerChannel(
            float(ratio.median().exp()), float(ratio[ratio.abs().argmax()].exp())
        ),
        batch_noise=float(noise) if moments.samples > 1 and not moments.within else math.nan,
        standard_error=float(error.median()),
        margin=t * float(error.median()),
        shifted_channels=certain,
        dead_channels=int(((data_var <= _DEAD * var) & (var > 0)).sum()),
        samples_needed=needed,
        verdict=verdict,
        shifts=tuple(deciles) if bool(shift.isfinite().all()) else (),
    )


def _samples_needed(per_t: float, tail: float) -> int:
    """The least n that is at least t² · `per_t`, where t belongs to n; 0 if that cannot be told.

    t falls from thousands to 4 as samples are added: that of two samples would ask for millions.
    """
    if not 0 < per_t < math.inf:
        return 0

    def enough(n: int) -> bool:
        t, freedom = math.sqrt(n / per_t), max(n - 1, 1)
        if freedom >= _MANY:
            return student_quantile(tail, freedom) <= t
        return _tail(t, freedom) <= tail

    most = 10**9
    needed = bisect_left(range(most), True, key=enough)
    return needed if needed < most else 0


@cache
def student_quantile(tail: float, freedom: int) -> float:
    """The t beyond which so much of Student's distribution lies.

    Args:
        tail: the probability above t, at least 1e-9 and below 0.5.
        freedom: the degrees of freedom, at least 1.

    Returns:
        t, right to 1e-6 relative.
    """
    if freedom >= _MANY:  # Abramowitz and Stegun, 26.7.5
        z = -NormalDist().inv_cdf(tail)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    step = 2.0**-33
    beyond = bisect_left(range(1 << 62), True, key=lambda n: _tail(n * step, freedom) <= tail)
    return beyond * step


def _tail(t: float, freedom: int) -> float:
    """The probability above t: a finite sum, 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    odd, square = freedom % 2, freedom / (freedom + t * t)  # of the cosine of atan(t / √freedom)
    term = math.sqrt(square) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    total *= t / math.sqrt(freedom + t * t)
    return (math.atan2(math.sqrt(freedom), t) - total) / math.pi if odd else (1 - total) / 2
