"""A half on a CPU, computed in pieces: the same bits, memory layout and gradients as in one."""

import itertools

import pytest
import torch

from bnfreeze import pieces
from bnfreeze.aten import ACTIVATIONS
from tests.test_functional import call, tensors

LAYOUTS = {
    "planes": ((3, 4, 5, 6), lambda x: x),
    "large planes": ((2, 3, 9, 11), lambda x: x),
    "channels_last": ((3, 4, 5, 6), lambda x: x.to(memory_format=torch.channels_last)),
    "3d": ((3, 4, 2, 3, 5), lambda x: x),
    "channels_last_3d": ((3, 4, 2, 3, 5), lambda x: x.to(memory_format=torch.channels_last_3d)),
    "one image": ((1, 7, 8, 5), lambda x: x.to(memory_format=torch.channels_last)),
    "rows": ((50, 6), lambda x: x),
    "turned": ((3, 4, 5, 6), lambda x: x.transpose(2, 3)),
    "sliced": ((3, 4, 5, 6), lambda x: x[:, :, 1:]),
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pieces, "SIZE", 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_in_one_piece_of_about_the_size_and_in_one_stretch(small, layout):
    shape, laid = LAYOUTS[layout]
    x = laid(torch.zeros(shape, dtype=torch.bfloat16))
    cut = pieces._pieces(x)
    assert (len(cut) > 1) == (layout not in {"turned", "sliced"})
    for where, channels in cut:
        x[where] += 1
        assert x[where].numel() < 2 * pieces.SIZE
        assert x[where].size(1) == torch.arange(x.size(1))[channels].numel()
        strides = sorted(zip(x[where].stride(), x[where].shape, strict=True))
        for (near, size), (far, more) in itertools.pairwise(s for s in strides if s[1] > 1):
            assert far == near * size or more == 1
    assert not cut or bool((x == 1).all())


def test_what_is_small_or_no_half_or_empty_stays_whole():
    assert not pieces._pieces(torch.zeros(1, 1, 1 << 10, 1 << 10, dtype=torch.half))
    assert not pieces._pieces(torch.zeros(2, 1, 1 << 10, 1 << 10))
    assert not pieces._pieces(torch.zeros(0, 1, 1 << 10, 1 << 10, dtype=torch.half))
    assert not pieces._pieces(torch.zeros(2, 1, 1 << 10, 1 << 10, device="meta").half())
    assert len(pieces._pieces(torch.zeros(2, 1, 1 << 10, 1 << 10, dtype=torch.half))) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [None, "add", "affine+add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
def test_pieces_give_the_bits_of_the_whole(layout, mode, activation, affine, monkeypatch):
    shape, laid = LAYOUTS[layout]

    def run():
        x, residual, norm, branch = tensors(shape, torch.bfloat16, affine=affine)
        x, residual = laid(x).requires_grad_(), laid(residual).requires_grad_()
        y = call(x, residual, norm, branch, activation, mode)
        inputs = [x] if mode is None else [x, residual]
        return y, *torch.autograd.grad(y, inputs, (x - residual).detach())

    whole = run()
    monkeypatch.setattr(pieces, "SIZE", 64)
    for one, other in zip(run(), whole, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_the_gradients_of_weight_and_bias_are_those_of_the_whole(trained, monkeypatch):
    def run():
        x, residual, norm, branch = tensors((3, 4, 5, 6), torch.bfloat16)
        x.requires_grad_()
        getattr(norm, trained).requires_grad_()
        y = call(x, residual, norm, branch, "silu", "add")
        return torch.autograd.grad(y.float().square().sum(), [x, getattr(norm, trained)])

    whole = run()
    monkeypatch.setattr(pieces, "SIZE", 64)
    assert all(torch.equal(one, other) for one, other in zip(run(), whole, strict=True))
