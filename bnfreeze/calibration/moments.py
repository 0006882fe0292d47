"""Moments of a norm layer's input per channel, merged over samples, batches and ranks.

Two questions are asked of the same data. What are mean and variance of all elements? That is exact:
each batch is reduced, and batches are merged in fp64 by the formula of Chan, Golub and LeVeque
(1979), so batches may have any size. And how sure are these figures? For that the unit is the
sample, not the pixel, since the pixels of one image are correlated: the standard error comes from
the scatter of the samples' own means and second moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's input; all tensors are fp64.

    Of each sample three numbers count: its mean a, its second moment q about `reference`, and its
    own unbiased variance v, which instance norm keeps.

    Attributes:
        samples: the number of samples.
        elements: the number of values per channel, over all samples.
        mean: the mean of all values: (C,).
        m2: the sum of their squared distances from `mean`: (C,).
        centre: the means of a, q and v over samples, each sample counted once: (3, C).
        products: the sums over samples of the products of their distances from `centre`: (3, 3, C).
        reference: what q is taken about: the stored running mean, so that q stays small. (C,).
    """

    samples: int
    elements: int
    mean: Tensor
    m2: Tensor
    centre: Tensor
    products: Tensor
    reference: Tensor

    @classmethod
    def empty(cls, reference: Tensor) -> Moments:
        """Of no data; `reference` of the shape (C,)."""
        # Not every accelerator has fp64.
        where = reference.device if reference.device.type == "cuda" else "cpu"
        reference = reference.detach().to(where, torch.float64, copy=True)
        zeros = torch.zeros_like(reference)
        return cls(
            0, 0, zeros, zeros, zeros.expand(3, -1), zeros.expand(3, 3, -1), reference=reference
        )

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
        a, v = (t.to(reference.device).double() for t in _by_sample(x.detach(), exact))
        each = torch.stack([a, v + (a - reference).square(), v * (size / max(size - 1, 1))])
        centre = each.mean(1)
        off = each - centre[:, None]
        return cls(
            samples=len(a),
            elements=len(a) * size,
            mean=centre[0],
            m2=size * (v + off[0].square()).sum(0),
            centre=centre,
            products=torch.einsum("inc,jnc->ijc", off, off),
            reference=reference,
        )

    def merged(self, other: Moments) -> Moments:
        """Of both data together."""
        if not self.samples or not other.samples:
            return other if not self.samples else self
        samples, elements = self.samples + other.samples, self.elements + other.elements
        share, part = other.elements / elements, other.samples / samples
        step, d = other.mean - self.mean, other.centre - self.centre
        return Moments(
            samples=samples,
            elements=elements,
            mean=self.mean + step * share,
            m2=self.m2 + other.m2 + step.square() * (self.elements * share),
            centre=self.centre + d * part,
            products=self.products + other.products + d[:, None] * d * (self.samples * part),
            reference=self.reference,
        )

    def on_cpu(self) -> Moments:
        """To send to other ranks."""
        tensors: dict[str, Any] = {
            n: v.cpu() for n, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **tensors)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of all values; infinite for a single one."""
        return self.m2 / (self.elements - 1) if self.elements > 1 else self.m2 + torch.inf

    @property
    def sample_variance(self) -> Tensor:
        """The mean of the samples' own unbiased variances."""
        return self.centre[2]

    @property
    def scatter(self) -> Tensor:
        """The standard deviation of the samples' means."""
        return (self.products[0, 0] / max(self.samples - 1, 1)).sqrt()

    @property
    def mean_error(self) -> Tensor:
        """The standard error of `mean`; infinite for a single sample, as the others."""
        return self._error(self.products[0, 0])

    @property
    def variance_error(self) -> Tensor:
        """The standard error of `variance`.

        The variance is E[q] - (E[a] - reference)², so one sample moves it by
        q_i - 2 (E[a] - reference) a_i to first order.
        """
        slope = -2 * (self.centre[0] - self.reference)
        (aa, aq, _), (_, qq, _), _ = self.products
        return self._error(qq + slope.square() * aa + 2 * slope * aq)

    @property
    def sample_variance_error(self) -> Tensor:
        """The standard error of `sample_variance`."""
        return self._error(self.products[2, 2])

    def _error(self, squares: Tensor) -> Tensor:
        """The standard error of a mean over samples, from the sum of squared distances."""
        if self.samples < 2:
            return torch.full_like(squares, torch.inf)
        return (squares.clamp(min=0) / (self.samples - 1) / self.samples).sqrt()


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
