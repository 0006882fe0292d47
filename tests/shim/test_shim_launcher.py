"""The launcher and the fallback to ATen, against a driver that says what a test wants it to say."""

import threading
import warnings
from contextlib import contextmanager

import pytest
import torch

from bnfreeze import BnfreezeWarning, FrozenBatchNorm2d
from bnfreeze.nn import functional
from bnfreeze.nn.cuda import load
from bnfreeze.nn.cuda.build import KernelError
from bnfreeze.nn.cuda.plan import entry_point
from bnfreeze.nn.functional import backend, frozen_batch_norm
from tests.helpers import Affine
from tests.shim import fake_cuda
from tests.shim.fake_cuda import FakeDriver, Libraries, compile_all, fake_launcher

pytestmark = pytest.mark.skipif(fake_cuda.GXX is None, reason="needs g++")

NAMES = [
    "planes<f32, 4, Forward<NONE, ALONE>, false>",
    "planes<f32, 4, Forward<RELU, ADD>, false>",
    "planes<f32, 4, Backward<NONE, ALONE>, false>",
    "planes<f32, 4, Backward<RELU, ADD>, false>",
    "planes<f32, 1, Forward<NONE, ALONE>, false>",
    "rows<f32, 4, Forward<NONE, ALONE>, false>",
    "rows<f32, 4, Forward<RELU, ADD>, false>",
    "rows<f32, 4, Backward<NONE, ALONE>, false>",
    "rows<f32, 4, Backward<RELU, ADD>, false>",
    "rows<f32, 4, Backward<RELU, ADD>, true>",
    "planes_trained<f32, 4, Backward<NONE, ALONE>>",
    "planes_trained<f32, 4, Backward<RELU, ADD>>",
    "finish",
]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return Libraries(compile_all(NAMES, tmp_path_factory.mktemp("launcher")))


@pytest.fixture
def driver(libraries):
    return FakeDriver(libraries)


@pytest.fixture
def install(driver, monkeypatch):
    """Send CPU tensors to a launcher; what differs from the usual one is given by name."""

    def install(**changes):
        launcher = fake_launcher(driver, **changes)
        monkeypatch.setattr(functional, "_on_cuda", lambda x: True)
        monkeypatch.setattr(functional, "_kernel", load.Kernel())
        functional._kernel.launcher = launcher
        return launcher

    return install


def layer(channels=8, *, trains=False):
    torch.manual_seed(0)
    made = FrozenBatchNorm2d(channels)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    made.weight.normal_().requires_grad_(trains)
    made.bias.normal_().requires_grad_(trains)
    return made


def exact(made, x, residual=None, activation=None):
    """What ATen computes, in fp64."""
    wide = Affine(*made._norm()).double()
    residual = None if residual is None else residual.double()
    return functional.reference.forward(x.double(), wide, residual, None, activation)[0]


def scale(made):
    return (made.weight / (made.running_var + made.eps).sqrt()).view(1, -1, 1, 1)


def test_a_variant_is_compiled_and_loaded_once_for_each_device(driver, install):
    asked = []

    def cubin(variant, arch):
        asked.append((variant, arch))
        return entry_point(variant).encode()

    install(cubin=cubin)
    x = torch.randn(2, 8, 4, 4)
    for _ in range(3):
        layer()(x)
    layer()(torch.randn(5, 8, 4, 4))
    assert asked == [("planes<f32, 4, Forward<NONE, ALONE>, false>", "sm_90")]
    assert driver.calls.count("cuModuleLoadData") == 1
    assert len(driver.names()) == 4
    assert driver.capture_mode == 0  # relaxed while it was loaded, and put back


def test_a_fresh_thread_gets_the_primary_context(driver, install):
    install()
    made, x = layer(), torch.randn(2, 8, 4, 4)
    made(x)
    assert driver.context == 99  # of the device, here -1
    driver.context = 0
    made(x)
    assert driver.context == 0  # this thread has had it; the driver is not asked again
    thread = threading.Thread(target=made, args=(x,))
    thread.start()
    thread.join()
    assert driver.context == 99
    assert driver.calls.count("cuDevicePrimaryCtxRetain") == 1


@pytest.mark.parametrize("error", [201, 400, 709])
def test_a_context_that_somebody_took_away_is_put_back(error, driver, install):
    install()
    made, x = layer(), torch.randn(2, 8, 4, 4)
    made(x)
    driver.context, driver.errors = 5, {"cuLaunchKernel": [error]}
    out = made(x)
    assert driver.context == 99
    assert torch.allclose(out.double(), exact(made, x), atol=1e-5)
    assert functional._kernel.trouble == ""


def test_a_tensor_on_another_device_is_launched_there(driver, install):
    current = [3]

    @contextmanager
    def on_device(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    seen = []
    install(
        current_device=lambda: current[0],
        on_device=on_device,
        stream=lambda device: seen.append((device, current[0])) or 11,
    )
    layer()(torch.randn(2, 8, 4, 4))
    assert seen == [(-1, -1)]
    assert current == [3]
    assert driver.calls[-1][2] == 11


def test_a_residual_and_a_gradient_in_another_layout_are_brought_into_the_inputs(driver, install):
    install()
    made = layer()
    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    residual = torch.randn(3, 8, 4, 4).requires_grad_()
    out = made(x, residual, "relu")
    grad = torch.randn(4, 4, 3, 8).permute(2, 3, 0, 1)
    got = torch.autograd.grad(out, (x, residual), grad)
    expected = exact(made, x, residual, "relu")
    right = torch.autograd.grad(expected, (x, residual), grad.double())
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, right, strict=True))
    assert driver.names() == [
        "bnfreeze_rows_f32_4_Forward_RELU_ADD_false",
        "bnfreeze_rows_f32_4_Backward_RELU_ADD_false",
    ]


def test_an_expanded_gradient_and_a_saved_tensor_that_comes_back_changed(driver, install):
    install()
    made = layer(trains=True)
    x = torch.randn(3, 8, 4, 4, requires_grad=True)

    def unpack(tensor):  # as an offloading hook may: another layout, another address
        if tensor.dim() < 4:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = made(x, x, "relu")
    out.sum().backward()
    x64 = x.detach().double().requires_grad_()
    exact(made, x64, x64, "relu").sum().backward()
    assert torch.allclose(x.grad.double(), x64.grad, atol=1e-5)


def test_an_expanded_and_a_negated_gradient(driver, install):
    install()
    made, x = layer(), torch.randn(3, 8, 4, 4, requires_grad=True)
    for grad in (torch.randn(4).expand(x.shape), torch._neg_view(torch.randn_like(x))):
        (found,) = torch.autograd.grad(made(x), x, grad)
        (right,) = torch.autograd.grad(exact(made, x), x, grad.double())
        assert torch.allclose(found.double(), right.double(), atol=1e-5)
    assert len(driver.names()) == 4


@pytest.mark.parametrize("which", ["input", "residual"])
def test_a_negated_view_is_left_to_aten(which, driver, install):
    install()
    made, x, r = layer(), torch.randn(3, 8, 4, 4).requires_grad_(), torch.randn(3, 8, 4, 4)
    made(x)
    made(x, r, "relu")  # plans are there for all but the negation
    before = len(driver.names())
    x, r = (torch._neg_view(x), r) if which == "input" else (x, torch._neg_view(r))
    assert torch.allclose(made(x).double(), exact(made, x), atol=1e-5)
    assert torch.allclose(made(x, r, "relu").double(), exact(made, x, r, "relu"), atol=1e-5)
    assert len(driver.names()) == before + (which == "residual")


def test_an_empty_batch_launches_nothing(driver, install):
    install()
    made = layer(trains=True)
    x = torch.randn(0, 8, 4, 4, requires_grad=True)
    out = made(x, x, "silu")
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape
    assert torch.equal(made.weight.grad, torch.zeros(8))
    assert torch.equal(made.bias.grad, torch.zeros(8))
    assert driver.names() == []


@pytest.mark.parametrize("only", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_or_bias_alone(only, dtype, driver, install):
    install()
    x, twins = torch.randn(3, 8, 4, 4), [layer(), layer()]
    for made in twins:
        setattr(made, "bias" if only == "weight" else "weight", None)
        setattr(made, only, getattr(made, only).to(dtype).requires_grad_())
    ours, right = twins[0](x), exact(twins[1], x)
    assert torch.allclose(ours.double(), right, atol=1e-5)
    ours.square().sum().backward()
    right.square().sum().backward()
    found, expected = (getattr(made, only).grad for made in twins)
    assert torch.allclose(found, expected, rtol=1e-4 if dtype is torch.float32 else 1e-2)
    assert driver.names()[-1] == "bnfreeze_finish"


def test_what_the_kernel_cannot_do_goes_to_aten_and_says_why(driver, install):
    install()
    x = torch.randn(2, 8, 4, 4)
    mean, var, weight, bias, _ = [torch.ones(8) for _ in range(5)]
    assert backend(x).path == "kernel"
    assert "fp64" in backend(x.double()).why
    assert "neither contiguous nor" in backend(x[:, :, ::2]).why
    assert "residual has another" in backend(x, residual=x.half()).why
    for unusual in (
        (mean.half(), var),
        (mean, torch.ones(1).expand(8)),
        (mean, var, weight.double(), bias.double()),
        (mean, var, weight.half(), bias),
        (mean, var, weight[:4], bias),
    ):
        assert "unusual" in backend(x, *unusual).why
    negated = torch.complex(torch.zeros(1, 1, 1, 1), x[:1, :1, :1, :1]).conj().imag
    assert negated.is_neg()
    assert "negated" in backend(negated).why
    launched = len(driver.names())
    with pytest.raises(RuntimeError):
        frozen_batch_norm(x, mean, var, weight[:4], bias[:4])
    assert len(driver.names()) == launched


def test_a_double_backward_takes_aten(driver, install):
    install()
    made, x = layer(), torch.randn(2, 8, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    assert driver.names() == ["bnfreeze_planes_f32_4_Forward_NONE_ALONE_false"]
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, (2 * scale(made) ** 2).expand_as(x), rtol=1e-4)


@pytest.mark.parametrize(
    "call", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuDeviceGet"]
)
def test_a_driver_that_fails_is_reported_once_and_aten_takes_over(call, driver, install):
    install()
    driver.errors = {call: [999, 999]}
    made, x = layer(), torch.randn(2, 8, 4, 4)
    with pytest.warns(BnfreezeWarning, match="999") as caught:
        out = made(x)
    assert len(caught) == 1
    assert torch.allclose(out.double(), exact(made, x), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(x.requires_grad_()).sum().backward()
    assert "999" in backend(x).why
    assert backend(x).path == "aten"
    assert driver.capture_mode == 0


def test_a_compiler_that_refuses_in_backward_is_survived_there(driver, install):
    def cubin(variant, arch):
        if "Backward" in variant:
            raise KernelError("no such luck")
        return entry_point(variant).encode()

    install(cubin=cubin)
    made, x = layer(), torch.randn(2, 8, 4, 4, requires_grad=True)
    out = made(x)
    with pytest.warns(BnfreezeWarning, match="no such luck"):
        out.sum().backward()
    assert torch.allclose(x.grad, scale(made).expand_as(x), rtol=1e-5)


def test_a_kernel_that_is_turned_off_or_not_installed(install, monkeypatch):
    def nothing(part):
        raise KernelError("cuda.bindings is not there")

    install()
    x = torch.randn(2, 8, 4, 4)
    monkeypatch.setattr(load, "bindings", nothing)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with monkeypatch.context() as patch:
        patch.setenv("BNFREEZE_KERNEL", "0")
        patch.setattr(functional, "_kernel", load.Kernel())
        assert "BNFREEZE_KERNEL=0" in backend(x).why
    functional._kernel.launcher = None
    with pytest.warns(BnfreezeWarning, match=r"cuda\.bindings is not there"):
        assert backend(x).path == "aten"
    assert backend(x).path == "aten"  # without a second warning


def test_threads_may_use_one_layer_at_once(driver, install):
    install()
    made = layer()
    inputs = [torch.randn(2, 8, 4, 4) for _ in range(8)]
    lock, outs = threading.Lock(), {}
    run = driver.cuLaunchKernel

    def one_at_a_time(*args):
        with lock:  # the shim has but one block
            return run(*args)

    driver.cuLaunchKernel = one_at_a_time
    threads = [
        threading.Thread(target=lambda n=n: outs.__setitem__(n, made(inputs[n])))
        for n in range(len(inputs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, x in enumerate(inputs):
        assert torch.allclose(outs[n].double(), exact(made, x), atol=1e-5)
