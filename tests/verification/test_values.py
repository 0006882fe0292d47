"""Bits are read, compared and located, whatever the dtype."""

import hashlib
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

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
COMPLEX = [torch.complex128, torch.complex64]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint64, torch.bool]


def filled(dtype, shape, seed):
    """Any bits at all; of a bool those that it can have."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator)
    raw = raw.to(torch.uint8)
    return (raw & 1 if dtype is torch.bool else raw).view(dtype).reshape(shape)


def locate(before, after):
    """The difference, in live tensors and in those of a file: both say the same."""
    live = TensorInMemory(before), TensorInMemory(after)
    kept = (values.KeptTensor(one.dtype, one.shape, one.words()) for one in live)
    found = values.locate("name", *live)
    assert repr(values.locate("name", *kept)) == repr(found)
    unequal = on_device.unequal_tensors({"name": (live[0].tensor, live[1].tensor)})
    assert bool(unequal) == (found is not None)
    return found


def sha256(name, tensor):
    return values.sha256(name, TensorInMemory(tensor))


def flip(tensor, element, bit):
    octets = tensor.reshape(-1).view(torch.uint8)
    octets[element * tensor.element_size() + bit // 8] ^= 1 << bit % 8


@settings(max_examples=500, deadline=None)
@given(
    dtype=st.sampled_from([*FLOATS, *OTHERS, *COMPLEX, *INTEGERS, *UNSIGNED]),
    shape=st.lists(st.integers(1, 5), max_size=4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_flipped_bit_is_found_and_located(dtype, shape, seed, data):
    before = filled(dtype, shape, seed)
    after = before.clone()
    assert locate(before, after) is None
    element = data.draw(st.integers(0, before.numel() - 1))
    bit = data.draw(st.integers(0, dtype.itemsize * 8 - 1)) if dtype is not torch.bool else 0
    flip(after, element, bit)
    found = locate(before, after)
    assert (found.changed, found.total) == (1, before.numel())
    strides = torch.empty(shape, device="meta").stride()
    assert sum(i * s for i, s in zip(found.first_index, strides, strict=True)) == element
    assert repr(found.before) != repr(found.after)
    assert sha256("name", before) != sha256("name", after)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_a_flipped_bit_in_a_model_is_named(seed, data):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, dtype=FLOATS[0]))
    before = bnfreeze.snapshot(model, tensors="all")
    name = data.draw(st.sampled_from(before.names))
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].detach()
    element = seed % tensor.numel()
    flip(tensor, element, seed % (tensor.element_size() * 8))
    (drift,) = bnfreeze.verify(model, before).drifts
    assert (drift.name, drift.kind, drift.changed) == (name, "value", 1)
    assert tensor[drift.first_index].data_ptr() == tensor.reshape(-1)[element].data_ptr()


def test_layout_and_alignment_in_memory_make_no_difference():
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    last = images.to(memory_format=torch.channels_last)
    assert locate(images, last) is None
    assert sha256("name", images) == sha256("name", last)
    octets = torch.arange(64, dtype=torch.uint8)
    for offset in range(5):
        after = octets[offset : offset + 13].clone()
        assert locate(octets[offset : offset + 13], after) is None
        after[12] += 1
        assert locate(octets[offset : offset + 13], after).first_index == (12,)


def test_empty_and_0_dimensional_tensors_are_compared():
    for tensor in (torch.empty(0), torch.empty(3, 0, 2), torch.tensor(1.5), torch.tensor(True)):
        assert locate(tensor, tensor.clone()) is None
        assert len(sha256("name", tensor)) == 64
    assert locate(torch.tensor(1.0), torch.tensor(2.0)).first_index == ()


def test_values_are_read_in_place_and_lazy_views_as_what_they_mean():
    tensor = torch.ones(3)
    assert read_tensor(tensor).data_ptr() == tensor.data_ptr()
    numbers = torch.complex(torch.ones(2), torch.ones(2))
    assert torch.equal(read_tensor(numbers.conj()), torch.complex(torch.ones(2), -torch.ones(2)))
    assert torch.equal(read_tensor(numbers.conj().imag), -torch.ones(2))


@pytest.mark.filterwarnings("ignore")  # quantised tensors are deprecated
def test_what_cannot_be_read_says_why_and_is_unverified():
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    unreadable = {
        "meta device": torch.empty(2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "not seen an input": nn.UninitializedParameter(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.5, 1, torch.qint8),
        "freed": freed,
    }
    for why, tensor in unreadable.items():
        assert why in why_unreadable(tensor)
        model = nn.Module()
        model.tensor = tensor
        report = bnfreeze.verify(model, bnfreeze.snapshot(model, tensors="all"))
        assert [(drift.name, drift.kind) for drift in report.drifts] == [("tensor", "unverified")]
        assert report.checked == 0


def test_values_that_look_alike_are_shown_with_their_bits():
    patterns = [0x7FC00000, 0x7FC00001]
    before, after = (torch.tensor([p], dtype=torch.int32).view(torch.float32) for p in patterns)
    found = locate(before, after)
    assert (found.before, found.after) == ("nan (0x7fc00000)", "nan (0x7fc00001)")
    assert found.max_abs is None
    found = locate(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    assert (found.first_index, found.max_abs) == ((1,), 0.0)
    assert math.copysign(1, found.after) == -1


def test_the_largest_change_of_counts_is_exact_and_passes_over_nan():
    assert locate(torch.tensor([2**62, 5]), torch.tensor([2**62 + 1, 5])).max_abs == 1.0
    assert locate(torch.ones(3), torch.tensor([float("nan"), 1.5, 1.0])).max_abs == 0.5


@pytest.mark.parametrize("dtype", FLOATS)
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
    found = values.locate("name", TensorInMemory(before), TensorInMemory(after))
    assert (found.changed, found.first_index, found.before, found.after) == (2, (2, 5), 0j, 1j)
    assert found.max_abs == 2


def test_a_digest_is_of_name_dtype_shape_and_bytes():
    raw = struct.pack("<2f", 1.0, -2.0)
    parts = [b"a.b", b"float32", b"2", raw]
    expected = hashlib.sha256(b"".join(struct.pack("<Q", len(p)) + p for p in parts)).hexdigest()
    assert sha256("a.b", torch.tensor([1.0, -2.0])) == expected
    zeros = torch.zeros(4)
    like = {"a": zeros, "b": zeros, "afloat": zeros}
    digests = {sha256(name, tensor) for name, tensor in like.items()}
    digests |= {sha256("a", zeros.view(torch.int32)), sha256("a", zeros.reshape(2, 2))}
    assert len(digests) == 5


def test_the_answer_for_an_accelerator_is_the_same(monkeypatch):
    monkeypatch.setattr(on_device, "_on_cpu", lambda tensor: False)
    tensors = torch.randn(10), torch.arange(10), torch.randn(300_000)
    pairs = {str(number): (one, one.clone()) for number, one in enumerate(tensors)}
    assert not on_device.unequal_tensors(pairs)
    for number, before in enumerate(tensors):
        before[7].neg_()
        assert on_device.unequal_tensors(pairs) == {str(number)}
        before[7].neg_()
    assert not on_device.unequal_tensors({"empty": (torch.empty(0), torch.empty(0))})
