"""Moments of a norm layer's input per channel, merged over samples, batches and ranks.

Two questions are asked of the same data. What are mean and variance of all elements? That is exact:
each batch is reduced, and batches are merged in fp64 by the formula of Chan, Golub and LeVeque
(1979), so batches may have any size. And how sure are these figures? For that the unit is the
sample, not the pixel, since the pixels of one image are correlated: the standard error comes from
the scatter of the samples' own means and second moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's input. All tensors have the shape (C,) and are fp64.

    Attributes:
        samples: the number of samples.
        elements: the number of values per channel, over all samples.
        mean: the mean of all values.
        m2: the sum of their squared distances from `mean`.
        sample_mean: the mean of the samples' own means a_i, each sample counted once.
        sample_second: the mean of the samples' second moments q_i, taken about `reference`.
        s_aa: the sum over samples of (a_i - sample_mean)².
        s_qq: likewise of q_i.
        s_aq: the sum of the products of both.
        instance_var: the mean of the samples' own unbiased variances, which instance norm keeps.
        reference: what the q_i are taken about: the stored running mean, so that they stay small.
    """

    samples: int
    elements: int
    mean: Tensor
    m2: Tensor
    sample_mean: Tensor
    sample_second: Tensor
    s_aa: Tensor
    s_qq: Tensor
    s_aq: Tensor
    instance_var: Tensor
    reference: Tensor

    @classmethod
    def empty(cls, reference: Tensor) -> Moments:
        """Of no data; `reference` of the shape (C,)."""
        reference = reference.detach().double().cpu()
        zeros = torch.zeros_like(reference)
        return cls(0, 0, *[zeros] * 8, reference)

    @classmethod
    def of(cls, x: Tensor, reference: Tensor, *, exact: bool = False) -> Moments:
        """Of one batch.

        Args:
            x: (N, C, *) of a floating dtype.
            reference: (C,), as of the moments that these will be merged with.
            exact: reduce in fp64. Otherwise each sample is reduced in fp32, unless a mean is so
                large against its standard deviation that fp32 would lose the variance.
        """
        reference = reference.detach().double().cpu()
        size = x[0, 0].numel() if len(x) else 0
        if not len(x) or not size:
            return cls.empty(reference)
        means, variances = _by_sample(x.detach(), exact)
        if not exact and x.dtype is not torch.float64:
            # The rounding of fp32 is about 1e-7 of the mean.
            far = means.square() > 1e6 * (variances + variances.mean(0, keepdim=True))
            if bool(far.any()):
                means, variances = _by_sample(x.detach(), True)
        n = len(means)
        mean = means.mean(0)
        seconds = variances + (means - reference).square()
        second = seconds.mean(0)
        a, q = means - mean, seconds - second
        return cls(
            samples=n,
            elements=n * size,
            mean=mean,
            m2=size * (variances + a.square()).sum(0),
            sample_mean=mean,
            sample_second=second,
            s_aa=a.square().sum(0),
            s_qq=q.square().sum(0),
            s_aq=(a * q).sum(0),
            instance_var=variances.mean(0) * (size / max(size - 1, 1)),
            reference=reference,
        )

    def merged(self, other: Moments) -> Moments:
        """Of both data together."""
        if not self.samples or not other.samples:
            return other if not self.samples else self
        samples, elements = self.samples + other.samples, self.elements + other.elements
        share = other.elements / elements
        step = other.mean - self.mean
        part = other.samples / samples
        da = other.sample_mean - self.sample_mean
        dq = other.sample_second - self.sample_second
        cross = self.samples * part
        return Moments(
            samples=samples,
            elements=elements,
            mean=self.mean + step * share,
            m2=self.m2 + other.m2 + step.square() * (self.elements * share),
            sample_mean=self.sample_mean + da * part,
            sample_second=self.sample_second + dq * part,
            s_aa=self.s_aa + other.s_aa + da.square() * cross,
            s_qq=self.s_qq + other.s_qq + dq.square() * cross,
            s_aq=self.s_aq + other.s_aq + da * dq * cross,
            instance_var=self.instance_var + (other.instance_var - self.instance_var) * part,
            reference=self.reference,
        )

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of all values; infinite for a single one."""
        return self.m2 / (self.elements - 1) if self.elements > 1 else self.m2 + torch.inf

    @property
    def scatter(self) -> Tensor:
        """The standard deviation of the samples' means."""
        return (self.s_aa / max(self.samples - 1, 1)).sqrt()

    @property
    def mean_error(self) -> Tensor:
        """The standard error of `mean`; infinite for a single sample."""
        if self.samples < 2:
            return torch.full_like(self.mean, torch.inf)
        return self.scatter / self.samples**0.5

    @property
    def log_variance_error(self) -> Tensor:
        """The standard error of the natural logarithm of the variance.

        The variance is E[q] - (E[a] - reference)², so one sample moves it by
        q_i - 2 (E[a] - reference) a_i to first order.
        """
        if self.samples < 2:
            return torch.full_like(self.mean, torch.inf)
        slope = -2 * (self.sample_mean - self.reference)
        spread = self.s_qq + slope.square() * self.s_aa + 2 * slope * self.s_aq
        error = (spread.clamp(min=0) / (self.samples - 1) / self.samples).sqrt()
        return error / self.variance

    def packed(self) -> Tensor:
        """All of it as one fp64 tensor, to send to other ranks."""
        tensors = [getattr(self, field.name) for field in fields(self)[2:]]
        head = torch.tensor([self.samples, self.elements], dtype=torch.float64)
        return torch.cat([head, *tensors])

    @classmethod
    def unpacked(cls, flat: Tensor) -> Moments:
        """The way back from `packed`."""
        return cls(int(flat[0]), int(flat[1]), *flat[2:].reshape(len(fields(cls)) - 2, -1))

    @classmethod
    def pooled(cls, parts: Sequence[Moments]) -> Moments:
        """Of all parts together, merged in the order given."""
        total = parts[0]
        for part in parts[1:]:
            total = total.merged(part)
        return total


def _by_sample(x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Each sample's mean and variance (divided by the number of values), (N, C), fp64 on the CPU."""
    wide = x.double() if exact or x.dtype is torch.float64 else x.float()
    if x.dim() == 2:
        means = wide.double().cpu()
        return means, torch.zeros_like(means)
    variances, means = torch.var_mean(wide, dim=tuple(range(2, x.dim())), correction=0)
    return means.double().cpu(), variances.double().cpu()
