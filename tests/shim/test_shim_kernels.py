"""The very source of the CUDA kernel, run on the CPU, through the whole of the eager path.

What is checked against fp64 is `frozen_batch_norm` and its gradients; in between are the real
autograd function, plan, launcher and argument packing.
"""

import itertools
import random

import pytest
import torch

from bnfreeze.nn import functional
from bnfreeze.nn.activations import ACTIVATIONS, EXACT, FROM_INPUT
from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.layouts import DTYPES as NAMES
from bnfreeze.nn.functional import _apply, frozen_batch_norm
from tests.helpers import Affine
from tests.shim import fake_cuda
from tests.shim.fake_cuda import PROCESSORS, FakeDriver, Libraries, compile_all, fake_launcher

pytestmark = pytest.mark.skipif(fake_cuda.GXX is None, reason="needs g++")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Planes of 49 straddle a vector; 1 and 4 are shorter than one; 3136 spans blocks. 2056 channels
# are more groups than a block has threads; 123 are no whole number of vectors.
PLANES = [(2, 5, 7, 7), (3, 6, 2, 2), (2, 4, 56, 56), (5, 123, 3), (2, 3, 2, 3, 3), (1, 1, 9)]
ROWS = [(3, 16, 5, 5), (70, 123), (3, 2056), (2, 8, 3, 5, 5), (300, 8), (1, 1)]


def cases():
    """Each activation with each residual in both layouts; each shape with vectors of 4 and of 8."""
    pairs = itertools.product(ACTIVATIONS, range(3))
    for n, (activation, residual) in enumerate(pairs):
        for rows in (False, True):
            # Not 0, 1, 0, 1: an activation comes aligned and not, in either layout.
            aligned = (n + n // 3 + rows) % 2 == 0
            shapes = ROWS if rows else PLANES
            yield shapes[n % 6], rows, DTYPES[(n + rows) % 3], aligned, activation, residual
    for n, shape in enumerate(PLANES + ROWS):
        for dtype in (torch.float32, DTYPES[1 + n % 2]):
            yield shape, shape in ROWS, dtype, True, "relu", 1


CASES = list(cases())
# What single tests below need besides.
WIDE = [(s, False, d, True, "relu", 1) for s in ((2, 5, 7, 7), (2, 4, 56, 56)) for d in DTYPES]
OTHERS = [((6, 5, 7, 7), False, torch.float16, True, act, 0) for act in ACTIVATIONS]
OTHERS += [((6, 8, 5, 5), rows, torch.float16, not rows, None, 1) for rows in (False, True)]


def variants():
    yield "finish"
    for shape, rows, dtype, aligned, activation, residual in CASES + OTHERS:
        for direction in ("forward", "backward", "trained"):
            for kind in {residual, 0 if activation in EXACT else residual}:
                plan = plans.elementwise(
                    shape, NAMES[dtype], rows, aligned, direction, activation, kind, PROCESSORS
                )
                yield plan.variant
    for _, _, dtype, *_ in WIDE:
        for op in ("Forward", "Backward"):
            name = NAMES[dtype]
            yield f"planes<{name}, {plans._LANES[name]}, {op}<RELU, ADD>, true>"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return Libraries(compile_all(variants(), tmp_path_factory.mktemp("shim")))


@pytest.fixture
def driver(libraries, monkeypatch):
    driver = FakeDriver(libraries, seed=random.randrange(10**6))
    monkeypatch.setattr(functional, "_on_cuda", lambda x: True)
    monkeypatch.setattr(functional._kernel, "launcher", fake_launcher(driver))
    yield driver
    assert functional._kernel.trouble == ""


def place(tensor, rows, aligned):
    """Lay the tensor out as asked for, at an address that is a multiple of 16 or just is not."""
    if rows and tensor.dim() > 3:
        last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        tensor = tensor.contiguous(memory_format=last)
    room = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    start = -room.data_ptr() % 64 // tensor.element_size() + (not aligned)
    out = room[start:].as_strided(tensor.shape, tensor.stride())
    return out.copy_(tensor)


def norm(channels, generator, dtype=torch.float32, eps=1e-3):
    mean, var, weight, bias = torch.randn(4, channels, generator=generator)
    return Affine(mean, var.square() + 0.2, weight.to(dtype), bias.to(dtype), eps)


def run(x, residual, main, branch, activation, grad, *, trained):
    """The output and the gradients, and those of fp64."""
    x, residual = x.requires_grad_(), None if residual is None else residual.requires_grad_()
    wanted = [x] if residual is None else [x, residual]
    if trained:
        wanted += [main.weight.requires_grad_(), main.bias.requires_grad_()]

    def call(x, residual, main, activation=activation):
        if branch is None:
            return frozen_batch_norm(x, *main, residual=residual, activation=activation)
        return _apply(x, main, residual, branch, activation)

    out = call(x, residual, main)
    double = [None if t is None else t.detach().double() for t in (x, residual, *main[:4])]
    x64, residual64, mean, var, weight, bias = double
    for leaf in (x64, residual64, weight, bias):
        None if leaf is None else leaf.requires_grad_()
    main64 = Affine(mean, var, weight, bias, main.eps)
    exact = call(x64, residual64, main64)
    # Next to a kink of the activation, rounding decides which of two gradients is right.
    total = call(x64, residual64, main64, None).detach()
    unit = 2 * torch.finfo(x.dtype).eps
    for kink in (-3, 0, 3, 6):
        grad.masked_fill_((total - kink).abs() <= unit * max(1, abs(kink)), 0)
    grads = torch.autograd.grad(out, wanted, grad)
    wanted64 = [x64] if residual is None else [x64, residual64]
    wanted64 += [weight, bias] if trained else []
    grads64 = torch.autograd.grad(exact, wanted64, grad.double())
    return out, exact, grads, grads64


def compare(out, exact, grads, grads64, dtype, kept_sum):
    assert out.dtype is dtype
    unit = torch.finfo(dtype).eps / 2
    slack = 3e-6 * exact.abs().max()
    assert ((out.double() - exact).abs() <= unit * exact.abs() * 1.01 + slack + 1e-7).all()
    # A sum that is kept for backward is rounded.
    relative = (unit * 2 + 2e-6) if not kept_sum else (2e-5 if dtype is torch.float32 else 3e-2)
    for got, right in zip(grads, grads64, strict=True):
        assert (got.double() - right).norm() <= relative * (right.norm() + 0.1)


def ids(case):
    shape, rows, dtype, aligned, activation, residual = case
    size = "x".join(map(str, shape))
    kind = ("alone", "add", "affine")[residual]
    how = f"{'rows' if rows else 'planes'}-{'' if aligned else 'mis'}aligned"
    return f"{size}-{how}-{NAMES[dtype]}-{activation}-{kind}"


def check(case, driver, *, trained):
    shape, rows, dtype, aligned, activation, residual = case
    generator = torch.Generator().manual_seed(1)

    def draw():
        return place(torch.randn(shape, generator=generator).to(dtype), rows, aligned)

    x, grad = draw(), draw()
    r = draw() if residual else None
    parameters = torch.float32 if aligned else dtype
    main = norm(shape[1], generator, parameters)
    branch = norm(shape[1], generator, parameters, 0.5) if residual == 2 else None
    kept_sum = residual and activation in FROM_INPUT
    compare(*run(x, r, main, branch, activation, grad, trained=trained), dtype, kept_sum)
    launched = driver.names()
    assert len(launched) == (3 if trained else 2)
    assert ("rows" if rows else "planes") in launched[0]
    return launched


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_kernel_agrees_with_fp64(case, trained, driver):
    check(case, driver, trained=trained)


@pytest.mark.parametrize("case", WIDE, ids=ids)
def test_the_64_bit_variant_agrees_with_fp64(case, driver, monkeypatch):
    monkeypatch.setattr(plans, "_NARROW", 0)
    assert all(name.endswith("true") for name in check(case, driver, trained=False))


def test_all_mappings_and_widths_compute_the_same_bits(driver):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 8, 5, 5, generator=generator).half()
    main = norm(8, generator)
    planes, rows = (
        frozen_batch_norm(place(x, how, aligned), *main, residual=place(x, how, aligned))
        for how, aligned in ((False, True), (True, False))
    )
    assert torch.equal(planes, rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_pass_as_in_aten(activation, driver):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e4])
    x = values.view(6, 1, 1, 1).expand(6, 5, 7, 7).contiguous().half()
    main = norm(5, torch.Generator().manual_seed(3))
    main.weight[0] = 0
    # In fp64: for half and float, ATen's vectorised GELU gives NaN for inf, and its scalar one inf.
    theirs = functional.reference.forward(x.double(), main, None, None, activation)[0].half()
    ours = frozen_batch_norm(x, *main, activation=activation)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
