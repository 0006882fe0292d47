"""The kernel on a real device: what the CPU shim cannot show.

The device only runs bnfreeze's kernel and copies from and to the host. Inputs are drawn on the CPU,
and outputs are compared with fp64 there. So these tests run on the stand-in GPU of tests/shim too,
except those marked `hardware`.
"""

import itertools
import threading

import pytest
import torch
from torch import nn

from bnfreeze import FrozenBatchNorm2d
from bnfreeze.nn import functional
from bnfreeze.nn.activations import ACTIVATIONS, FROM_INPUT
from bnfreeze.nn.functional import _apply, backend, frozen_batch_norm
from bnfreeze.nn.reference import forward as aten_forward
from tests.helpers import FAKE, Affine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
hardware = pytest.mark.skipif(FAKE, reason="needs a GPU that computes")

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Planes that straddle vectors, and planes of one; more channel groups than a block has threads, and
# tensors of many blocks.
SHAPES = [(3, 5, 7, 7), (4, 24, 1, 1)]
DTYPES = [torch.bfloat16]
if FAKE:
    from tests.shim.fake_gpu import COMBINATIONS
else:
    SHAPES += [(2, 2056, 3, 3), (8, 64, 56, 56), (1, 3, 2, 2)]
    DTYPES += [torch.float32, torch.float16]
    COMBINATIONS = list(itertools.product(ACTIVATIONS, range(3)))


@pytest.fixture
def launcher(monkeypatch):
    """A launcher that has not loaded a kernel yet, in place of the process's."""
    monkeypatch.setattr(functional._kernel, "launcher", None)
    monkeypatch.setattr(functional._kernel, "trouble", "")
    return functional._kernel.load()


def there(value, device="cuda", *, aligned=True):
    """A tensor, or those of a norm layer, on the GPU: leaves, laid out as they are here.

    The address is a multiple of 16, or just is not.
    """
    if value is None:
        return None
    if isinstance(value, Affine):
        return Affine(*(there(tensor, device) for tensor in value[:4]), value.eps)
    start = 0 if aligned else 1
    room = torch.empty(value.numel() + 1, dtype=value.dtype, device=device)
    made = room.as_strided(value.shape, value.stride(), start)
    return made.copy_(value.detach()).requires_grad_(value.requires_grad)


def trainable(x, residual, main, branch):
    return [t for t in (x, residual, *main[:4]) if t is not None and t.requires_grad]


def draw(shape, dtype, layout=torch.contiguous_format):
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


def norm(channels, eps=1e-3):
    mean, var, weight, bias = torch.randn(4, channels)
    return Affine(mean, var.square() + 0.2, weight, bias, eps)


def layer(channels=8):
    made = FrozenBatchNorm2d(channels)
    main = norm(channels)
    with torch.no_grad():
        made.running_mean.copy_(main.mean)
        made.running_var.copy_(main.var)
        made.weight.copy_(main.weight)
        made.bias.copy_(main.bias)
    return made


def norm_of(made):
    return Affine(*made._norm())


def call(x, residual, main, branch, activation):
    if branch is not None:
        return _apply(x, main, residual, branch, activation)
    return frozen_batch_norm(x, *main, residual=residual, activation=activation)


def reference(x, residual, main, branch, activation):
    """ATen in fp64; differentiated where the kernel is, which rounds a sum that it keeps."""
    other, beyond = (None if each is None else each.double() for each in (residual, branch))
    total = aten_forward(x.double(), main.double(), other, beyond, None)[0]
    out = ACTIVATIONS[activation](total)
    if residual is None or activation not in FROM_INPUT:
        return out
    kept = ACTIVATIONS[activation](total + (total.to(x.dtype) - total).detach())
    return kept + (out - kept).detach()


def agree(made, right, tolerance=1e-5):
    return (made.cpu().double() - right).norm() <= tolerance * (right.norm() + 0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
def test_every_variant_agrees_with_fp64(shape, layout, dtype, trained):
    unit = torch.finfo(dtype).eps
    for activation, kind in COMBINATIONS:
        x = draw(shape, dtype, layout).requires_grad_()
        r = draw(shape, dtype, layout).requires_grad_() if kind else None
        main, branch = norm(shape[1]), norm(shape[1], 0.5) if kind == 2 else None
        main.weight.requires_grad_(trained)
        main.bias.requires_grad_(trained)
        inputs = x, r, main, branch
        exact = reference(*inputs, activation)
        on_gpu = tuple(there(value) for value in inputs)
        assert backend(on_gpu[0], *on_gpu[2][:4]).path == "kernel"
        out = call(*on_gpu, activation)
        assert out.dtype is dtype
        assert agree(out.detach(), exact, max(unit, 1e-5))
        # Where an activation has a kink, a rounding decides which of two gradients it is.
        total = reference(*inputs, None).detach()
        near = sum((total - kink).abs() <= 2 * unit * max(1, abs(kink)) for kink in (-3, 0, 3, 6))
        grad = draw(shape, dtype, layout).masked_fill_(near > 0, 0)
        made = torch.autograd.grad(out, trainable(*on_gpu), grad.cuda())
        right = torch.autograd.grad(exact, trainable(*inputs), grad.double())
        assert all(agree(a, b, 2 * unit + 1e-5) for a, b in zip(made, right, strict=True))


def test_trained_gradients_are_deterministic():
    shape = (32, 64, 28, 28) if not FAKE else (8, 16, 7, 7)
    x, main = draw(shape, torch.bfloat16, torch.channels_last).cuda(), there(norm(shape[1]))
    main.weight.requires_grad_()
    grad = draw(shape, torch.bfloat16, torch.channels_last).cuda()
    first, *others = (
        torch.autograd.grad(frozen_batch_norm(x, *main), main.weight, grad)[0].cpu()
        for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)


@hardware
def test_past_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    shape, main = (2**31 // (64 * 4096) + 1, 64, 64, 64), there(norm(64))
    x = torch.full(shape, 0.5, device="cuda", dtype=torch.float16)
    assert backend(x, *main[:4]).path == "kernel"
    out = frozen_batch_norm(x, *main)
    for image in (0, shape[0] - 1):
        assert torch.equal(out[image : image + 1], frozen_batch_norm(x[:1], *main))


DEVICES = [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_plan_of_one_input_is_not_used_for_another(residual, trained, launcher):
    activation = "relu" if residual else None
    usual = (torch.float32, torch.contiguous_format, True, True, DEVICES[0])
    others = (torch.bfloat16, torch.channels_last, False, False, DEVICES[-1])
    # Each differs from the first in one thing, and all have one shape.
    kinds = [usual, *((*usual[:n], other, *usual[n + 1 :]) for n, other in enumerate(others))]
    for dtype, layout, aligned, same, device in kinds:
        x = draw((2, 8, 8, 8), dtype, layout).requires_grad_()
        r = draw(x.shape, dtype, layout).requires_grad_() if residual else None
        main, grad = norm(8), draw(x.shape, dtype, layout)
        main.weight.requires_grad_(trained)
        exact = reference(x, r, main, None, activation)
        right = torch.autograd.grad(exact, trainable(x, r, main, None), grad.double())
        gpu_x, gpu_main = there(x, device, aligned=aligned), there(main, device)
        gpu_r = there(r, device, aligned=aligned is same)
        out = call(gpu_x, gpu_r, gpu_main, None, activation)
        gpu_grad = there(grad, device, aligned=aligned is same)
        wanted = trainable(gpu_x, gpu_r, gpu_main, None)
        found = torch.autograd.grad(out, wanted, gpu_grad)
        unit = torch.finfo(dtype).eps
        assert agree(out.detach(), exact, 2 * unit + 1e-5)
        assert all(agree(a, b, 2 * unit + 1e-5) for a, b in zip(found, right, strict=True))


def test_sums_over_few_blocks_and_over_many(launcher):
    main = norm(8)
    main.weight.requires_grad_()
    for shape in [(2, 8, 7, 7), (16, 8, 56, 56), (2, 8, 7, 7)]:
        x, grad = draw(shape, torch.bfloat16), draw(shape, torch.bfloat16)
        exact = reference(x, None, main, None, None)
        (right,) = torch.autograd.grad(exact, main.weight, grad.double())
        gpu_main = there(main)
        out = call(there(x), None, gpu_main, None, None)
        assert agree(torch.autograd.grad(out, gpu_main.weight, there(grad))[0], right, 1e-4)


def test_saved_tensors_that_come_back_at_another_address():
    x = draw((2, 8, 8, 8), torch.bfloat16).requires_grad_()
    main, grad = norm(8), draw(x.shape, x.dtype)
    main.weight.requires_grad_()
    exact = reference(x, None, main, None, "relu")
    right = torch.autograd.grad(exact, [x, main.weight], grad.double())
    gpu_x, gpu_main = there(x), there(main)

    def unpack(tensor):
        return there(tensor.cpu(), aligned=False) if tensor.dim() == 4 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = call(gpu_x, None, gpu_main, None, "relu")
    found = torch.autograd.grad(out, [gpu_x, gpu_main.weight], there(grad))
    assert all(agree(a, b, 1e-2) for a, b in zip(found, right, strict=True))


def test_an_empty_batch():
    x = torch.empty(0, 8, 7, 7, device="cuda", requires_grad=True)
    out = layer().cuda()(x, None, "relu")
    out.backward(torch.empty(0, 8, 7, 7, device="cuda"))
    assert out.shape == x.grad.shape == x.shape


@hardware  # which brings them into one layout
def test_a_gradient_in_another_layout_and_an_expanded_one():
    made, x = layer(), draw((3, 8, 5, 5), torch.float32, torch.channels_last).requires_grad_()
    main, gpu_x = norm_of(made), there(x)
    gpu_main = there(main)
    grads = torch.randn(x.shape, device="cuda"), torch.randn((), device="cuda").expand(x.shape)
    for activation, grad in itertools.product([None, "relu"], grads):
        exact = reference(x, None, main, None, activation)
        (right,) = torch.autograd.grad(exact, x, grad.cpu().double())
        out = call(gpu_x, None, gpu_main, None, activation)
        assert agree(torch.autograd.grad(out, gpu_x, grad)[0], right)


def test_a_fresh_thread():
    made, x = layer(), draw((4, 8, 7, 7), torch.float32)
    expected, outs = reference(x, None, norm_of(made), None, None), []
    made, gpu_x = made.cuda(), x.cuda()
    made(gpu_x)  # so that the thread finds all but a context

    def work():
        outs.append(made(gpu_x).cpu())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert agree(*outs, expected)


def on_a_side_stream():
    """Everything, forward and backward, on a stream that is not the current one elsewhere."""
    made, x = layer(), draw((4, 8, 7, 7), torch.float32).requires_grad_()
    expected = reference(x, None, norm_of(made), None, "relu")
    grad = torch.randn(x.shape)
    (right,) = torch.autograd.grad(expected, x, grad.double())
    made = made.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Only what follows on the stream waits for these copies.
        gpu_x = x.detach().to("cuda", non_blocking=True).requires_grad_()
        gpu_grad = grad.to("cuda", non_blocking=True)
        out = made(gpu_x, None, "relu")
        (found,) = torch.autograd.grad(out, gpu_x, gpu_grad)
        return agree(out.detach(), expected) and agree(found, right)


def test_a_side_stream():
    assert on_a_side_stream()


def captured_and_replayed(channels, *, warm):
    made, x = layer(channels), draw((4, channels, 7, 7), torch.float32)
    other = draw(x.shape, x.dtype)
    expected = reference(other, None, norm_of(made), None, "relu")
    made, gpu_x = made.cuda(), x.cuda()
    if warm:
        made(gpu_x, None, "relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = made(gpu_x, None, "relu")
    gpu_x.copy_(other)
    graph.replay()
    return agree(out, expected)


@pytest.mark.parametrize("warm", [True, False])
def test_capture_and_replay_in_a_graph(warm, launcher):
    assert captured_and_replayed(8, warm=warm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_current():
    made, x = layer(), draw((4, 8, 7, 7), torch.float32).requires_grad_()
    expected, grad = reference(x, None, norm_of(made), None, None), torch.randn(x.shape)
    (right,) = torch.autograd.grad(expected, x, grad.double())
    made, gpu_x = made.to("cuda:1"), x.detach().to("cuda:1").requires_grad_()
    out = made(gpu_x)
    out.backward(grad.to("cuda:1"))
    assert out.device == gpu_x.grad.device == gpu_x.device
    assert agree(out.detach(), expected)
    assert agree(gpu_x.grad, right)
    assert torch.cuda.current_device() == 0


@hardware
def test_under_autocast_the_output_keeps_its_dtype_and_matches_eval():
    bn = nn.BatchNorm2d(16).cuda().eval()
    made = FrozenBatchNorm2d.from_batchnorm(bn)
    x = torch.randn(4, 16, 9, 9, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert made(x.bfloat16()).dtype is torch.bfloat16
    assert torch.allclose(made(x), bn(x), atol=1e-5)
