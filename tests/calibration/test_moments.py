"""Moments, their errors, and Student's t, against plain formulas."""

import math
from functools import reduce

import pytest
import torch

from bnfreeze.calibration.fit import student_quantile
from bnfreeze.calibration.moments import Moments, by_row

SHAPES = {"(N, C)": (7, 5), "(N, C, L)": (7, 5, 9), "images": (7, 5, 6, 4), "1×1": (7, 5, 1, 1)}


def of_parts(x, sizes, reference=None, *, within=False, **options):
    reference = torch.zeros(x.shape[1]) if reference is None else reference
    size = x[0, 0].numel()
    parts = (
        Moments.of_rows(by_row(part, **options), reference.double(), size=size, within=within)
        for part in x.split(sizes)
    )
    return reduce(Moments.merged, parts)


def by_channel(x):
    return x.double().movedim(1, 0).flatten(1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_uneven_batches_give_the_moments_of_all_values(shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5
    if layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed" and x.dim() > 2:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    for exact, close in ((True, 1e-13), (False, 1e-4)):
        found = of_parts(x, [4, 1, 2], exact=exact)
        values = by_channel(x)
        assert (found.samples, found.elements) == (7, values.shape[1])
        torch.testing.assert_close(found.mean, values.mean(1), rtol=close, atol=close)
        torch.testing.assert_close(found.variance, values.var(1), rtol=close, atol=0)


def test_a_mean_far_from_zero_does_not_lose_the_variance():
    x = torch.randn(8, 3, 50, 50) + torch.tensor([0.0, 1e3, -30.0]).view(3, 1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = of_parts(x.contiguous(memory_format=layout), 3)
        torch.testing.assert_close(found.variance, by_channel(x).var(1), rtol=1e-4, atol=0)


def test_values_beyond_fp32_squares_are_no_infinity():
    x = torch.randn(4, 2, 3, 3) * 1e30
    assert torch.isfinite(of_parts(x, 2).m2).all()
    assert not torch.isfinite(of_parts(torch.full((4, 2, 3, 3), torch.inf), 2).m2).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = torch.randn(9, 4, 5, 5).to(dtype)
    found = of_parts(x, [2, 7])
    torch.testing.assert_close(found.mean, by_channel(x).mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, by_channel(x).var(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("within", [False, True])
def test_standard_errors_are_the_scatter_over_repeated_draws(within):
    # Samples of their own level and contrast, so that pixels are far from independent.
    torch.manual_seed(0)
    n, draws = 64, 1000

    def draw():
        level, contrast = torch.randn(n, 2, 1), 0.5 + torch.rand(n, 2, 1)
        return level + contrast * torch.randn(n, 2, 10) + 2

    found = [of_parts(draw(), 40, torch.tensor([2.0, 1.0]), within=within) for _ in range(draws)]
    for value, error in (("mean", "mean_error"), ("variance", "variance_error")):
        seen = torch.stack([getattr(m, value) for m in found]).std(0)
        said = torch.stack([getattr(m, error) for m in found]).square().mean(0).sqrt()
        torch.testing.assert_close(said, seen, rtol=0.12, atol=0)


@pytest.mark.parametrize(
    ("tail", "freedom", "t"),
    # From the tables of Abramowitz and Stegun, and of NIST.
    [
        (0.025, 1, 12.706204736432095),
        (0.025, 10, 2.2281388519649385),
        (0.005, 30, 2.7499956535672243),
        (0.001, 5, 5.893429531356),
        (0.05, 120, 1.657650899),
        (0.025, 10**6, 1.959966358),
        (0.5, 3, 0.0),
    ],
)
def test_student_quantile(tail, freedom, t):
    assert student_quantile(tail, freedom) == pytest.approx(t, rel=1e-6, abs=1e-9)


def test_far_tails_of_student_have_closed_forms():
    # One degree of freedom is Cauchy's distribution; two have an elementary quantile.
    assert student_quantile(1e-7, 1) == pytest.approx(1 / math.tan(math.pi * 1e-7), rel=1e-9)
    p = 1e-7
    assert student_quantile(p, 2) == pytest.approx(
        (1 - 2 * p) / math.sqrt(2 * p * (1 - p)), rel=1e-9
    )
    # Where the series takes over from the sum, they agree.
    assert student_quantile(1e-7, 1000) == pytest.approx(student_quantile(1e-7, 999), rel=1e-5)


def test_layers_that_were_measured_as_one_do_not_keep_each_others_memory():
    """Nor do they send it to other ranks, once for each layer."""
    merged = of_parts(torch.randn(8, 40, 3), [8])
    parts = merged.split([10, 30])
    assert [len(one.mean) for one in parts] == [10, 30]
    for one in parts:
        assert one.products.untyped_storage().nbytes() == one.products.nbytes
