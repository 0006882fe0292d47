"""Moments of a norm layer's input per channel, merged over samples, batches and ranks.

Two questions are asked of the same data. What are mean and variance of all elements? That is exact:
each batch is reduced, and batches are merged in fp64 by the formula of Chan, Golub and LeVeque
(1979), so batches may have any size. And how sure are these figures? For that the unit is the
sample, not the pixel, since the pixels of one image are correlated: the standard error comes from
the scatter of the samples' own means and second moments.
"""

from __future__ import annotations

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
        sample_variance: the mean of the samples' own unbiased variances, which instance norm keeps.
        s_aa: the sum over samples of (a_i - sample_mean)².
        s_qq: likewise of q_i.
        s_aq: the sum of the products of both.
        s_vv: the sum over samples of their own variances' squared distances from their mean.
        reference: what the q_i are taken about: the stored running mean, so that they stay small.
    """

    samples: int
    elements: int
    mean: Tensor
    m2: Tensor
    sample_mean: Tensor
    sample_second: Tensor
    sample_variance: Tensor
    s_aa: Tensor
    s_qq: Tensor
    s_aq: Tensor
    s_vv: Tensor
    reference: Tensor

    @classmethod
    def empty(cls, reference: Tensor) -> Moments:
        """Of no data; `reference` of the shape (C,)."""
        # Not every accelerator has fp64.
        where = reference.device if reference.device.type == "cuda" else "cpu"
        reference = reference.detach().to(where, torch.float64, copy=True)
        zeros = torch.zeros_like(reference)
        return cls(0, 0, *(zeros,) * 9, reference)

    @classmethod
    def of(cls, x: Tensor, reference: Tensor, *, exact: bool = False) -> Moments:
        """Of one batch, on the device of `reference`, without waiting for a GPU.

        Args:
            x: (N, C, *) of a floating dtype.
            reference: (C,), fp64, as of the moments that these will be merged with.
            exact: reduce in fp64. Otherwise each sample is reduced in fp32: the error is below
                1e-4 standard deviations.
        """
        size = x[0, 0].numel() if len(x) else 0
        if not size:
            return cls.empty(reference)
        means, variances = _by_sample(x.detach(), exact)
        means = means.to(reference.device).double()
        variances = variances.to(reference.device).double()
        n = len(means)
        mean = means.mean(0)
        seconds = variances + (means - reference).square()
        second = seconds.mean(0)
        a, q = means - mean, seconds - second
        variance = variances.mean(0)
        bessel = size / max(size - 1, 1)
        return cls(
            samples=n,
            elements=n * size,
            mean=mean,
            m2=size * (variances + a.square()).sum(0),
            sample_mean=mean,
            sample_second=second,
            sample_variance=variance * bessel,
            s_aa=a.square().sum(0),
            s_qq=q.square().sum(0),
            s_aq=(a * q).sum(0),
            s_vv=(variances - variance).square().sum(0) * bessel**2,
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
        dv = other.sample_variance - self.sample_variance
        cross = self.samples * part
        return Moments(
            samples=samples,
            elements=elements,
            mean=self.mean + step * share,
            m2=self.m2 + other.m2 + step.square() * (self.elements * share),
            sample_mean=self.sample_mean + da * part,
            sample_second=self.sample_second + dq * part,
            sample_variance=self.sample_variance + dv * part,
            s_aa=self.s_aa + other.s_aa + da.square() * cross,
            s_qq=self.s_qq + other.s_qq + dq.square() * cross,
            s_aq=self.s_aq + other.s_aq + da * dq * cross,
            s_vv=self.s_vv + other.s_vv + dv.square() * cross,
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
        return self._error(self.s_aa)

    @property
    def variance_error(self) -> Tensor:
        """The standard error of `variance`; infinite for a single sample.

        The variance is E[q] - (E[a] - reference)², so one sample moves it by
        q_i - 2 (E[a] - reference) a_i to first order.
        """
        slope = -2 * (self.sample_mean - self.reference)
        return self._error(self.s_qq + slope.square() * self.s_aa + 2 * slope * self.s_aq)

    @property
    def sample_variance_error(self) -> Tensor:
        """The standard error of `sample_variance`; infinite for a single sample."""
        return self._error(self.s_vv)

    def _error(self, squares: Tensor) -> Tensor:
        """The standard error of a mean over samples, from the sum of squared distances."""
        if self.samples < 2:
            return torch.full_like(squares, torch.inf)
        return (squares.clamp(min=0) / (self.samples - 1) / self.samples).sqrt()

    def packed(self) -> Tensor:
        """All of it as one fp64 tensor, to send to other ranks."""
        tensors = [getattr(self, field.name) for field in fields(self)[2:]]
        head = torch.tensor([self.samples, self.elements], dtype=torch.float64)
        return torch.cat([head, *(tensor.cpu() for tensor in tensors)])

    @classmethod
    def unpacked(cls, flat: Tensor) -> Moments:
        """The way back from `packed`."""
        return cls(int(flat[0]), int(flat[1]), *flat[2:].reshape(len(fields(cls)) - 2, -1))


# fp32 sums are off by about 1e-6 of the second moment, so the variance by that times (mean/σ)².
_FAR = 64.0
_PIECE = 2**17  # values


def _by_sample(x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Each sample's mean and variance (divided by the number of values): (N, C), fp64 or fp32."""
    if x.device.type not in ("cpu", "cuda"):
        exact = False  # there may be no fp64
    wide = x.double() if exact or x.dtype is torch.float64 else x.float()
    if x.dim() == 2:
        return wide, torch.zeros_like(wide)
    dims = tuple(range(2, x.dim()))
    if wide.dtype is torch.float32 and x.device.type == "cpu":
        # torch.var_mean is accurate, and takes a hundred times as long as sums on a CPU.
        size = x[0, 0].numel()
        means = wide.sum(dims).double() / size
        if wide.stride(-1) == 1:
            squares = torch.linalg.vector_norm(wide, 2, dim=dims).double().square()
        else:  # channels_last, over which norms are slow
            squares = _squares(wide.movedim(1, -1).reshape(len(x), size, -1)).double()
        variances = squares / size - means.square()
        # Written so that NaN, and what overflows fp32, is computed again.
        near = means.square() <= _FAR * (variances + variances.mean(0, keepdim=True))
        near &= variances.isfinite()
        far = ~near.all(0)
        if bool(far.any()):
            v, m = torch.var_mean(x[:, far].double(), dim=dims, correction=0)
            means[:, far], variances[:, far] = m, v
        return means, variances.clamp(min=0)
    variances, means = torch.var_mean(wide, dim=dims, correction=0)
    return means, variances


def _squares(x: Tensor) -> Tensor:
    """The sums of squares of (N, values, C) over the values, in pieces that fit a CPU's cache."""
    rows = max(_PIECE // x.shape[2], 1)
    piece, total = x.new_empty(rows, x.shape[2]), x.new_zeros(len(x), x.shape[2])
    for sample, own in zip(x, total, strict=True):
        for part in sample.split(rows):
            own += torch.mul(part, part, out=piece[: len(part)]).sum(0)
    return total
