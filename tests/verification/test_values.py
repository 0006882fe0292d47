"""Bits are read, compared and located, whatever the dtype."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bnfreeze
from bnfreeze.inspection.in_memory import TensorInMemory, read_tensor, why_unreadable
from bnfreeze.verification import on_device, values

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.complex128,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint64,
    torch.bool,
]


def filled(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Any bits at all; of a bool those that it can have."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    raw = raw.to(torch.uint8)
    return (raw & 1 if dtype is torch.bool else raw).view(dtype).reshape(shape)


def unequal(before, after):
    """Whether two tensors differ: compared as live tensors, then as those of a file."""
    live = [(TensorInMemory(before), TensorInMemory(after))]
    kept = [tuple(values.KeptTensor(t.dtype, t.shape, t.words()) for t in live[0])]
    found = [bool(values.unequal(["name"], pairs)) for pairs in (live, kept)]
    assert found[0] == found[1]
    return found[0]


def locate(before, after):
    return values.locate(TensorInMemory(before), TensorInMemory(after))


def digest(name, tensor):
    return values.digest(name, TensorInMemory(tensor))


def flip(tensor: torch.Tensor, element: int, bit: int) -> None:
    octets = tensor.reshape(-1).view(torch.uint8)
    octets[element * tensor.element_size() + bit // 8] ^= 1 << bit % 8


@settings(max_examples=1000, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 5), max_size=4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_flipped_bit_is_found_and_located(dtype, shape, seed, data):
    before = filled(dtype, shape, seed)
    after = before.clone()
    assert not unequal(before, after)
    assert locate(before, after) is None
    element = data.draw(st.integers(0, before.numel() - 1))
    bit = data.draw(st.integers(0, dtype.itemsize * 8 - 1)) if dtype is not torch.bool else 0
    flip(after, element, bit)
    assert unequal(before, after)
    found = locate(before, after)
    assert found.changed == 1
    strides = torch.empty(shape, device="meta").stride()
    assert sum(i * s for i, s in zip(found.first_index, strides, strict=True)) == element
    assert repr(found.before) != repr(found.after)
    assert digest("name", before) != digest("name", after)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_a_flipped_bit_in_a_model_is_named(seed, data):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, dtype=DTYPES[0]))
    before = bnfreeze.snapshot(model, tensors="all")
    name = data.draw(st.sampled_from(before.names))
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].detach()
    element = seed % tensor.numel()
    flip(tensor, element, seed % (tensor.element_size() * 8))
    (drift,) = bnfreeze.verify(model, before).drifts
    assert (drift.name, drift.kind, drift.changed) == (name, "value", 1)
    assert drift.total == tensor.numel()
    assert tensor[drift.first_index].data_ptr() == tensor.reshape(-1)[element].data_ptr()


@pytest.mark.parametrize("offset", range(5))
def test_memory_that_no_word_lines_up_with_is_compared(offset):
    octets = torch.arange(64, dtype=torch.uint8)
    before = octets[offset : offset + 13]
    after = before.clone()
    assert not unequal(before, after)
    after[12] += 1
    assert unequal(before, after)


def test_empty_and_0_dimensional_tensors_are_equal_to_themselves():
    for tensor in (torch.empty(0), torch.empty(3, 0, 2), torch.tensor(1.5), torch.tensor(True)):
        assert not unequal(tensor, tensor.clone())
        assert len(digest("name", tensor)) == 64
    assert locate(torch.tensor(1.0), torch.tensor(2.0)).first_index == ()


def test_conjugate_and_negative_views_are_read_as_what_they_mean():
    values = torch.complex(torch.ones(2), torch.ones(2))
    assert torch.equal(read_tensor(values.conj()), torch.complex(torch.ones(2), -torch.ones(2)))
    assert torch.equal(read_tensor(values.conj().imag), -torch.ones(2))


def test_a_layout_in_memory_makes_no_difference():
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    last = images.to(memory_format=torch.channels_last)
    assert not unequal(images, last)
    assert digest("name", images) == digest("name", last)


def test_contents_are_read_in_place():
    tensor = torch.ones(3)
    assert read_tensor(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.eye(2).to_sparse(), "layout"),
        (nn.UninitializedParameter(), "not seen an input"),
    ],
)
def test_what_cannot_be_read_says_why(tensor, why):
    assert why in why_unreadable(tensor)


@pytest.mark.filterwarnings("ignore")  # quantised tensors are deprecated
def test_a_quantised_tensor_is_unverified():
    model = nn.Module()
    model.register_buffer("kept", torch.quantize_per_tensor(torch.ones(2), 0.5, 1, torch.qint8))
    (drift,) = bnfreeze.verify(model, bnfreeze.snapshot(model, tensors="all")).drifts
    assert drift.kind == "unverified"


def test_a_freed_storage_is_unverified():
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    assert "freed" in why_unreadable(tensor)


def test_two_nan_are_shown_with_their_bits():
    patterns = [0x7FC00000, 0x7FC00001]
    before, after = (torch.tensor([p], dtype=torch.int32).view(torch.float32) for p in patterns)
    found = locate(before, after)
    assert (found.before, found.after) == ("nan (0x7fc00000)", "nan (0x7fc00001)")
    assert found.max_abs is None


def test_zeros_of_both_signs_differ_by_nothing():
    found = locate(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    assert (found.first_index, found.max_abs) == ((1,), 0.0)
    assert math.copysign(1, found.after) == -1


def test_the_largest_change_of_counts_is_exact():
    before, after = torch.tensor([2**62, 5]), torch.tensor([2**62 + 1, 5])
    assert locate(before, after).max_abs == 1.0


def test_the_largest_change_passes_over_nan():
    before = torch.tensor([1.0, 1.0, 1.0])
    after = torch.tensor([float("nan"), 1.5, 1.0])
    assert locate(before, after).max_abs == 0.5


def test_a_digest_depends_on_name_dtype_and_shape():
    tensor = torch.zeros(4)
    digests = {
        digest("a", tensor),
        digest("b", tensor),
        digest("a", tensor.view(torch.int32)),
        digest("a", tensor.reshape(2, 2)),
        digest("afloat", tensor),
    }
    assert len(digests) == 5


def test_a_digest_is_what_its_definition_says():
    import hashlib

    raw = struct.pack("<2f", 1.0, -2.0)
    parts = [b"a.b", b"float32", b"2", raw]
    expected = hashlib.sha256(b"".join(struct.pack("<Q", len(p)) + p for p in parts)).hexdigest()
    assert digest("a.b", torch.tensor([1.0, -2.0])) == expected


def test_the_answer_for_an_accelerator_is_the_same():
    floats, counts = torch.randn(10), torch.arange(10)
    large = torch.randn(300_000)
    pairs = [(floats, floats.clone()), (counts, counts.clone()), (large, large.clone())]
    assert not on_device._start(pairs)()
    for before, _ in pairs:
        before[7] += 1
        assert on_device._start(pairs)()
        before[7] -= 1
    assert not on_device._start([(torch.empty(0), torch.empty(0))])()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_change_is_counted_in_units_of_the_last_place(dtype):
    before = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    after = before.clone()
    TensorInMemory(after).words()[:2] += 3
    assert locate(before, after).max_ulps == 3
    after[0] = -1
    assert locate(before, after).max_ulps is None


def test_a_large_tensor_is_compared_in_pieces():
    before = torch.zeros(3, 1 << 20, dtype=torch.complex128)
    after = before.clone()
    after[2, 5], after[2, 7] = 1j, 2
    found = locate(before, after)
    assert (found.changed, found.first_index, found.before, found.after) == (2, (2, 5), 0j, 1j)
    assert found.max_abs == 2
