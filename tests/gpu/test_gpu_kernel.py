"""The kernel on a real device: what the CPU shim cannot show."""

import itertools
import threading

import pytest
import torch
from torch import nn

from bnfreeze import FrozenBatchNorm2d
from bnfreeze.aten import ACTIVATIONS
from bnfreeze.aten import forward as aten_forward
from bnfreeze.functional import _frozen_batch_norm_add, backend, frozen_batch_norm
from tests.helpers import Affine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Planes that straddle vectors, planes of one, more channel groups than a block has threads, and
# tensors of many blocks.
SHAPES = [(3, 5, 7, 7), (4, 24, 1, 1), (2, 2056, 3, 3), (8, 64, 56, 56), (1, 3, 2, 2)]


def draw(shape, dtype, layout, *, grad=False):
    x = torch.randn(shape, device="cuda").to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=layout)
    return x.requires_grad_(grad)


def norm(channels):
    mean, var, weight, bias = torch.randn(4, channels, device="cuda")
    return Affine(mean, var.square() + 0.2, weight, bias, 1e-3)


def reference(x, residual, main, branch, activation):
    """ATen in fp64."""

    def wide(affine):
        return None if affine is None else Affine(*(t.double() for t in affine[:4]), affine.eps)

    residual = None if residual is None else residual.double()
    return aten_forward(x.double(), wide(main), residual, wide(branch), activation)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_every_variant_agrees_with_fp64(shape, layout, dtype, trained):
    unit = torch.finfo(dtype).eps
    for activation, kind in itertools.product(ACTIVATIONS, range(3)):
        x, r = draw(shape, dtype, layout, grad=True), draw(shape, dtype, layout, grad=True)
        main, branch = norm(shape[1]), norm(shape[1])
        assert backend(x, *main[:4]).path == "kernel"
        wanted = [x, r] if kind else [x]
        if trained:
            wanted += [main.weight.requires_grad_(), main.bias.requires_grad_()]
        if kind == 2:
            out = _frozen_batch_norm_add(x, main, r, branch, activation)
        else:
            out = frozen_batch_norm(x, *main, residual=r if kind else None, activation=activation)
        exact = reference(x, r if kind else None, main, branch if kind == 2 else None, activation)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, wanted, grad)
        right = torch.autograd.grad(exact, wanted, grad.double())
        assert out.dtype is dtype
        assert (out.double() - exact).norm() <= unit * exact.norm()
        kept_sum = kind and activation in ("silu", "hardswish")
        for a, b in zip(got, right, strict=True):
            tolerance = 2 * unit + (3e-2 if kept_sum and unit > 1e-5 else 1e-5)
            assert (a.double() - b).norm() <= tolerance * (b.norm() + 0.1)


def test_trained_gradients_are_deterministic():
    x, main = draw((32, 64, 28, 28), torch.bfloat16, torch.channels_last), norm(64)
    main.weight.requires_grad_()
    grads = [
        torch.autograd.grad(frozen_batch_norm(x, *main).float().square().sum(), main.weight)[0]
        for _ in range(5)
    ]
    assert all(torch.equal(grads[0], other) for other in grads)


def test_past_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    shape, main = (2**31 // (64 * 4096) + 1, 64, 64, 64), norm(64)
    x = torch.full(shape, 0.5, device="cuda", dtype=torch.float16)
    assert backend(x, *main[:4]).path == "kernel"
    out = frozen_batch_norm(x, *main)
    for image in (0, shape[0] - 1):
        assert torch.equal(out[image : image + 1], frozen_batch_norm(x[:1], *main))


def test_a_misaligned_view():
    base, main = torch.randn(2 * 8 * 49 + 1, device="cuda").half(), norm(8)
    x = base[1:].view(2, 8, 7, 7)
    assert torch.equal(frozen_batch_norm(x, *main), frozen_batch_norm(x.clone(), *main))


def test_a_bare_thread_and_a_side_stream():
    layer = FrozenBatchNorm2d(8).cuda()
    x = torch.randn(4, 8, 7, 7, device="cuda")
    expected, outs = layer(x), []
    torch.cuda.synchronize()

    def work():
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            outs.append(layer(x))
            torch.cuda.current_stream().synchronize()

    for target in (lambda: outs.append(layer(x)), work):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)
    assert len(outs) == 2


@pytest.mark.parametrize("warm", [True, False])
def test_capture_and_replay_in_a_graph(warm):
    layer = FrozenBatchNorm2d(8 if warm else 12).cuda()
    x = torch.randn(4, layer.num_features, 7, 7, device="cuda")
    if warm:
        layer(x, None, "relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x, None, "relu")
    x.normal_()
    graph.replay()
    assert torch.equal(out, layer(x, None, "relu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_current():
    layer, x = FrozenBatchNorm2d(8).to("cuda:1"), torch.randn(4, 8, 7, 7, device="cuda:1")
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.device == x.device
    assert torch.cuda.current_device() == 0


def test_under_autocast_the_output_keeps_its_dtype_and_matches_eval():
    bn = nn.BatchNorm2d(16).cuda().eval()
    layer = FrozenBatchNorm2d.from_batchnorm(bn)
    x = torch.randn(4, 16, 9, 9, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype is torch.bfloat16
    assert torch.allclose(layer(x), bn(x), atol=1e-5)
