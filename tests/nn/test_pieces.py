"""A half on a CPU, computed in pieces: the same bits, memory layout and gradients as in one."""

from collections import Counter

import pytest
import torch

from bnfreeze.nn import pieces, reference
from bnfreeze.nn.functional import frozen_batch_norm
from bnfreeze.nn.reference import ACTIVATIONS
from tests.nn.test_functional import call, tensors

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


CUT = [layout for layout in LAYOUTS if layout not in {"turned", "sliced"}]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pieces, "SIZE", 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_in_one_piece_of_about_the_size_and_in_one_stretch(small, layout):
    shape, laid = LAYOUTS[layout]
    x = laid(torch.zeros(shape, dtype=torch.bfloat16))
    cut = pieces._pieces(x)
    assert (len(cut) > 1) == (layout in CUT)
    for where, channels in cut:
        x[where] += 1
        least = torch.get_num_threads() * x.shape[2:].numel() if channels != slice(None) else 0
        assert x[where].numel() <= max(2 * pieces.SIZE, least)
        assert x[where].size(1) == torch.arange(x.size(1))[channels].numel()
        stretch = 1
        for stride, size in sorted(zip(x[where].stride(), x[where].shape, strict=True)):
            assert stride == stretch or size == 1
            stretch *= size
    assert not cut or bool((x == 1).all())


def test_what_is_small_or_no_half_or_empty_stays_whole():
    assert not pieces._pieces(torch.zeros(1, 1, 1 << 10, 1 << 10, dtype=torch.half))
    assert not pieces._pieces(torch.zeros(2, 1, 1 << 10, 1 << 10))
    assert not pieces._pieces(torch.zeros(0, 1, 1 << 10, 1 << 10, dtype=torch.half))
    assert not pieces._pieces(torch.zeros(2, 1, 1 << 10, 1 << 10, device="meta").half())
    assert len(pieces._pieces(torch.zeros(2, 1, 1 << 10, 1 << 10, dtype=torch.half))) == 2


def test_each_thread_has_a_plane(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    cut = pieces._pieces(torch.zeros(1, 21, 1 << 10, 1 << 10, dtype=torch.half))
    assert [channels for _, channels in cut] == [slice(0, 7), slice(7, 14), slice(14, 21)]


@pytest.mark.parametrize("wrong", ["running_var", "weight", "bias"])
def test_a_norm_of_too_many_channels_is_not_cut_to_fit(small, wrong):
    x, _, norm, _ = tensors((2, 3, 9, 11), torch.bfloat16)
    arguments = {"running_mean": norm.mean, "running_var": norm.var, "weight": norm.weight}
    arguments["bias"] = norm.bias
    arguments[wrong] = torch.ones(6)
    with pytest.raises(RuntimeError, match="should contain 3 elements not 6"):
        frozen_batch_norm(x, **arguments, activation="silu")


@pytest.fixture
def calls(monkeypatch):
    """By name, how often `reference.forward` and `reference.backward` have computed something."""
    counted = Counter()

    def counting(name):
        function = getattr(reference, name)

        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(reference, name, counting(name))
    return counted


def run(shape, laid, dtype, mode, activation, affine=True, trained=None):
    """The output, and the gradients of what has one; nothing that is handed in may change."""
    x, residual, norm, branch = tensors(shape, dtype, affine=affine)
    x, residual = laid(x).requires_grad_(), laid(residual).requires_grad_()
    inputs = [x] if mode is None else [x, residual]
    if trained:
        inputs.append(getattr(norm, trained).requires_grad_())
    grad = (x - residual).detach()
    handed = [x, residual, grad, *(t for t in (*norm, *branch) if isinstance(t, torch.Tensor))]
    before = [t.detach().clone() for t in handed]
    y = call(x, residual, norm, branch, activation, mode)
    results = y, *torch.autograd.grad(y, inputs, grad)
    for one, other in zip(handed, before, strict=True):
        assert torch.equal(one, other)
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [None, "add", "affine+add"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_give_the_bits_of_the_whole(layout, mode, activation, dtype, calls, monkeypatch):
    shape, laid = LAYOUTS[layout]
    whole = run(shape, laid, dtype, mode, activation, affine=dtype is torch.bfloat16)
    monkeypatch.setattr(pieces, "SIZE", 64)
    calls.clear()
    for one, other in zip(
        run(shape, laid, dtype, mode, activation, affine=dtype is torch.bfloat16),
        whole,
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    curved = activation not in {None, "relu", "relu6"}
    if mode is not None or curved:
        assert (calls["forward"] > 1) == (layout in CUT)
    if curved:
        # The gradient of a slice is dense.
        assert (calls["backward"] > 1) == (layout != "turned")
    else:
        assert calls["backward"] <= 1


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_the_gradients_of_weight_and_bias_are_those_of_the_whole(trained, calls, monkeypatch):
    shape, laid = LAYOUTS["planes"]
    whole = run(shape, laid, torch.bfloat16, "add", "silu", trained=trained)
    monkeypatch.setattr(pieces, "SIZE", 64)
    calls.clear()
    again = run(shape, laid, torch.bfloat16, "add", "silu", trained=trained)
    assert all(torch.equal(one, other) for one, other in zip(again, whole, strict=True))
    assert calls["forward"] > 1
    assert calls["backward"] == 1


def test_residual_and_gradient_may_lie_in_another_layout(monkeypatch):
    def mixed():
        x, residual, norm, branch = tensors((3, 4, 5, 6), torch.bfloat16, grad=True)
        last = residual.to(memory_format=torch.channels_last)
        y = call(x, last, norm, branch, "silu", "add")
        grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(6, 5, 4, 3).permute(3, 2, 1, 0)
        return y, *torch.autograd.grad(y, [x, residual], grad)

    whole = mixed()
    monkeypatch.setattr(pieces, "SIZE", 64)
    assert all(torch.equal(one, other) for one, other in zip(mixed(), whole, strict=True))


def test_in_inference_mode_too(small):
    x, residual, norm, branch = tensors((3, 4, 5, 6), torch.bfloat16)
    expected = call(x, residual, norm, branch, "silu", "affine+add")
    with torch.inference_mode():
        assert torch.equal(call(x, residual, norm, branch, "silu", "affine+add"), expected)


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), torch.inference_mode])
def test_what_is_kept_between_calls_is_the_same_wherever_it_was_made(around):
    x, _, norm, _ = tensors((2, 3, 4, 5), torch.bfloat16, grad=True)
    grad = torch.randn(2, 3, 4, 5).bfloat16()
    reference._zeros.cache_clear()
    with around():
        reference.scaled(grad, norm, eager=True)
    assert bool((reference._zeros(3) == 0).all())
    (given,) = torch.autograd.grad(call(x, None, norm, None, None, None), x, grad)
    expected = grad.double() * (norm.weight / (norm.var + norm.eps).sqrt()).view(-1, 1, 1)
    torch.testing.assert_close(given.double(), expected, rtol=2**-8, atol=0)
    assert bool((reference._zeros(3) == 0).all())
