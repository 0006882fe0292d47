"""Moments of a norm layer's input per channel, merged over samples, batches and ranks.

Two questions are asked of the same data. What are mean and variance of all elements? That is exact:
each batch is reduced, and batches are merged in fp64 by the formula of Chan, Golub and LeVeque
(1979), so batches may have any size. And how sure are these figures? For that the unit is the
sample, not the pixel, since the pixels of one image are correlated: the standard error comes from
the scatter of the samples' own means and second moments. A sample is an item of the batch that the
model was given. A layer may be given several rows of it, as where a video's frames are the rows.

Instance norm asks for other figures: the means over samples of each sample's own mean and variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Means and variances of the rows of a layer's input: (N, C) each.
Rows = tuple[Tensor, Tensor]

# So many numbers about the rows of one layer are kept at most, until the batch is done.
_MOST_KEPT = 1 << 21


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's input; all tensors are fp64.

    Of each row two numbers count, with the number of its values as their weight: its mean a, and
    its second moment q about `reference`. Within samples q is the row's own unbiased variance,
    and each row has the weight 1. Those of a sample are the means of its rows'.

    Attributes:
        reference: what q is taken about: the stored running mean, so that q stays small. (C,).
        within: whether the variance is that within samples, as of instance norm.
        samples: the number of samples.
        rows: how many rows they were, by the first dimension of the input.
        elements: the number of values per channel, over all samples.
        batch_size: how many samples there were at once, at most.
        centre: the weighted means of a and q over samples: (2, C).
        products: the weighted means of the products of their distances from `centre`: (2, 2, C).
        m2: the sum of the squared distances of all values from their mean: (C,).
        each: of a single batch: a and q of each sample: (2, samples, C); None if it were too large.
    """

    reference: Tensor
    within: bool
    samples: int
    rows: int
    elements: int
    batch_size: int
    centre: Tensor
    products: Tensor
    m2: Tensor
    each: Tensor | None = None

    @classmethod
    def of_rows(
        cls,
        rows: Rows,
        reference: Tensor,
        *,
        size: int,
        items: int | None = None,
        within: bool = False,
    ) -> Moments:
        """Of one call of a layer; on the device of `reference`, without waiting for a GPU.

        Args:
            rows: each row's mean and variance, from `by_row`.
            reference: (C,) in fp64; the same one for all that is merged.
            size: the number of values per row and channel.
            items: how many samples the model was given; None where each row is one.
            within: as the attribute.
        """
        a, v = (t.to(reference.device).double() for t in rows)
        second = v * (size / max(size - 1, 1)) if within else v + (a - reference).square()
        both = torch.stack([a, second])
        centre = both.mean(1)
        each = _by_item(both, items)
        return cls(
            reference,
            within,
            samples=each.shape[1],
            rows=len(a),
            elements=len(a) * size,
            batch_size=each.shape[1],
            centre=centre,
            products=_products(each, centre),
            m2=len(a) * size * (v.mean(0) + (a - centre[0]).square().mean(0)),
            each=each if each.numel() <= _MOST_KEPT else None,
        )

    def merged(self, other: Moments) -> Moments:
        """Of both data together."""
        rows, elements = self.rows + other.rows, self.elements + other.elements
        share = other._weight / (self._weight + other._weight)
        step, products = other.centre - self.centre, other.products - self.products
        between = step[:, None] * step
        return replace(
            self,
            samples=self.samples + other.samples,
            rows=rows,
            elements=elements,
            batch_size=max(self.batch_size, other.batch_size),
            centre=self.centre + step * share,
            products=self.products + (products + between * (1 - share)) * share,
            m2=self.m2 + other.m2 + between[0, 0] * (self.elements * other.elements / elements),
            each=None,
        )

    def again(self, other: Moments, items: int | None) -> Moments:
        """Of both, where one batch went through the layer in several calls.

        Args:
            other: of a further call.
            items: how many samples the model was given.
        """
        both, mine, others = self.merged(other), self.each, other.each
        if items is not None and both.rows <= items:  # a part of the samples in each call
            each = None if mine is None or others is None else torch.cat([mine, others], 1)
            return replace(both, batch_size=both.samples, each=each)
        every = self.samples == other.samples == other.rows == (items or other.rows)
        if mine is None or others is None or not every:  # not known, or not kept, whose they are
            mine, others = self.centre[:, None], other.centre[:, None]
        mean = mine + (others - mine) * (other._weight / both._weight)
        samples, products = mean.shape[1], _products(mean, both.centre)
        return replace(both, samples=samples, batch_size=samples, products=products, each=mean)

    def on_cpu(self) -> Moments:
        """To send to other ranks, or to judge by."""
        return replace(self, **{name: v.cpu() for name, v in self._tensors().items()})

    def split(self, channels: Sequence[int]) -> list[Moments]:
        """Of layers that were measured as one, whose numbers of channels these are."""
        parts = {name: v.split(list(channels), -1) for name, v in self._tensors().items()}
        return [
            replace(self, **{name: v.clone() for name, v in zip(parts, one, strict=True)})
            for one in zip(*parts.values(), strict=True)
        ]

    def _tensors(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}

    @property
    def has_variance(self) -> bool:
        """Whether there are two values or more to have one: in all, or in each sample."""
        return self.elements > (self.rows if self.within else 1)

    @property
    def mean(self) -> Tensor:
        """What a running mean of this data would be."""
        return self.centre[0]

    @property
    def variance(self) -> Tensor:
        """What a running variance of this data would be, which is unbiased."""
        return self.centre[1] if self.within else self.m2 / (self.elements - 1)

    @property
    def mean_error(self) -> Tensor:
        """The standard error of `mean`; infinite for a single sample."""
        return self._error(self.products[0, 0])

    @property
    def variance_error(self) -> Tensor:
        """The standard error of `variance`; infinite for a single sample, or without variance.

        The variance is E[q] - (E[a] - reference)², so one sample moves it by
        q_i - 2 (E[a] - reference) a_i to first order. Within samples it is E[q].
        """
        (aa, aq), (_, qq) = self.products
        slope = 0 if self.within else -2 * (self.centre[0] - self.reference)
        error = self._error(qq + slope * slope * aa + 2 * slope * aq)
        return error if self.has_variance else error + torch.inf

    @property
    def _weight(self) -> int:
        return self.rows if self.within else self.elements

    def _error(self, squares: Tensor) -> Tensor:
        """The standard error of a mean over samples, from their mean squared distance."""
        if self.samples < 2:
            return torch.full_like(squares, torch.inf)
        return (squares.clamp(min=0) / (self.samples - 1)).sqrt()


def _products(each: Tensor, centre: Tensor) -> Tensor:
    off = each - centre[:, None]
    return (off[:, None] * off).mean(2)


def _by_item(rows: Tensor, items: int | None) -> Tensor:
    """The means over what belongs to one item of the batch, of (2, rows, C)."""
    count = rows.shape[1]
    if items is None or count <= items:
        return rows
    if count % items:  # regions of images, say: which row is of which item is not known
        return rows.mean(1, keepdim=True)
    # An item's rows follow one another, or lie `items` apart. They are alike, so their means differ
    # more from each other than means of rows of several items.
    near = rows.reshape(2, items, -1, rows.shape[2]).mean(2)
    apart = rows.reshape(2, -1, items, rows.shape[2]).mean(1)
    usual = rows.var(1, correction=0).clamp(min=torch.finfo(rows.dtype).tiny)
    scatter = [(each.var(1, correction=0) / usual).sum() for each in (near, apart)]
    return torch.where(scatter[0] >= scatter[1], near, apart)


# In fp32 a mean is off by up to 1e-5 of itself, and so is the second moment. So neither may be much
# larger than σ and the variance.
_FAR = 16.0  # of (mean / σ)²


def by_row(x: Tensor, *, exact: bool = False) -> Rows:
    """Each row's mean, and its variance (divided by the number of values), per channel.

    Args:
        x: (N, C, *) of a floating dtype, with a value at least.
        exact: reduce in fp64. Otherwise each row is reduced in fp32: the error is below 1e-4
            standard deviations.

    Returns:
        two tensors of (N, C), with memory of their own.
    """
    values = x.detach().unsqueeze(-1).flatten(2)  # in most layouts a view
    size, kind = values.shape[2], values.device.type
    exact = exact and kind in ("cpu", "cuda")  # other accelerators may have no fp64
    wide = values.double() if exact or values.dtype is torch.float64 else values.float()
    if size == 1:
        return wide[..., 0].clone(), torch.zeros_like(wide[..., 0])
    if kind != "cpu":
        variances, means = torch.var_mean(wide, dim=2, correction=0)
        return means, variances
    # On a CPU torch.var_mean takes a hundred times as long as what is taken here.
    if wide.stride(2) == 1:
        means = wide.sum(2).double() / size
        norms = torch.linalg.vector_norm(wide, dim=2).double()
        variances = (norms.square() / size - means.square()).clamp(min=0)
    else:  # channels_last, over which norms are slow
        stats = [torch.batch_norm_update_stats(x[None, ..., None], None, None, 0) for x in wide]
        means, variances = (torch.stack(each).double() for each in zip(*stats, strict=True))
    # Written so that NaN, and what overflows fp32, is computed again.
    typical = variances.mean(0)
    near = (means.square().amax(0) <= _FAR * typical) & typical.isfinite()
    if not bool(near.all()):
        again = torch.var_mean(values[:, ~near].double(), dim=2, correction=0)
        variances[:, ~near], means[:, ~near] = again
    return means, variances
