"""Variants, grids and divisions: the arithmetic before a launch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.layouts import unsupported
from bnfreeze.nn.cuda.plan import ARGS, GEOMETRY, THREADS, elementwise, fast_division


def divide(n, divisor):
    """As frozen_bn.cu does it, in 32 bits."""
    magic, shift = fast_division(divisor)
    assert 0 < magic < 2**32
    assert ((n * magic) >> 32) + n < 2**32
    return (((n * magic) >> 32) + n) >> shift


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_fast_division_is_exact(n, divisor):
    assert divide(n, divisor) == n // divisor


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1), st.sampled_from([-1, 0, 1]))
def test_fast_division_is_exact_beside_multiples(divisor, n, step):
    n = n // divisor * divisor + step
    if 0 <= n < 2**31:
        assert divide(n, divisor) == n // divisor


def plan(shape, dtype="f16", rows=False, aligned=True, direction="forward", activation=None):
    return elementwise(shape, dtype, rows, aligned, direction, activation, 0, 132)


def test_vectors_are_used_where_every_access_is_aligned():
    assert "<f16, 8," in plan((2, 3, 7, 7)).variant
    assert "<f32, 4," in plan((2, 3, 7, 7), "f32").variant
    assert "<f16, 1," in plan((2, 3, 7, 7), aligned=False).variant
    # A plane shorter than a vector could end twice within one.
    assert "<f16, 1," in plan((2, 3, 7)).variant
    # Rows, and the planes of one channel, begin at multiples of a vector or not at all.
    assert "<f16, 8," in plan((2, 16, 7, 7), rows=True).variant
    assert "<f16, 1," in plan((2, 12, 7, 7), rows=True).variant
    assert "<f16, 1," in plan((2, 3, 7, 7), direction="trained").variant
    assert "<f16, 8," in plan((2, 3, 8, 7), direction="trained").variant


def test_past_two_to_the_31_elements_the_64_bit_variant_is_taken():
    assert plan((2, 1024, 1024, 1000)).variant.endswith("false>")
    assert plan((4, 1024, 1024, 1024)).variant.endswith("true>")
    assert plan((2**10, 2**10, 2**11)).geometry[:8] == (2**31).to_bytes(8, "little")


LARGEST = [(1, 2**23 - 1, 1), (1, 1, 2**30 - 1), (2**10, 2**20, 2**9)]


def test_what_cannot_be_indexed_is_refused():
    for shape in [*LARGEST, (1, 2**23, 1), (1, 1, 2**30), (2**21, 1, 2**9)]:
        why = unsupported(torch.empty(shape, device="meta"), None)
        assert why == ("" if shape in LARGEST else "The input is too large.")


@pytest.mark.parametrize("direction", ["forward", "backward", "trained"])
def test_grids_cover_the_tensor_within_the_devices_limits(direction):
    shapes = [(1, 1, 1), (64, 64, 112, 112), (64, 2048, 7, 7), (3, 100_000), (2**20, 3), (1, 7, 9)]
    shapes += LARGEST
    for shape, rows, dtype in itertools.product(shapes, (False, True), ("f32", "bf16")):
        made = plan(shape, dtype, rows, direction=direction)
        across, down = made.grid
        assert 1 <= across < 2**31
        assert 1 <= down < 2**16
        assert (made.blocks > 0) == (direction == "trained")
        if direction == "trained" and shape not in LARGEST:
            # The partial sums are few, compared to the tensor or absolutely.
            elements = 1
            for length in shape:
                elements *= length
            assert 2 * made.blocks * shape[1] <= max(elements, 2 * 132 * 8 * 4)


def test_the_arguments_have_the_layout_of_the_struct():
    # Fourteen pointers, two floats, two ints; a 64-bit size that lies on a multiple of eight.
    assert ARGS.size == 128 + 32
    assert GEOMETRY.size == 32
    assert THREADS == 256
    assert plans.finish(100, 7).grid == (4, 1)
