"""How many kernels are launched, and that the stand-in GPU finds bugs that are put in.

Run by test_fake_gpu.py, in a process that has one.
"""

import ctypes
from contextlib import nullcontext

import pytest
import torch
import torchvision

from bnfreeze import BnfreezeWarning, freeze
from bnfreeze.nn import functional
from tests.gpu import test_gpu_kernel as on_gpu
from tests.gpu.test_gpu_kernel import launcher, there

pytestmark = pytest.mark.gpu
counters = ctypes.CDLL(None)
__all__ = ["launcher"]  # a fixture


class Launches:
    """How many kernels were launched within: ours, and torch's."""

    def __enter__(self):
        self.before = self.now()
        return self

    def __exit__(self, *error):
        self.ours, self.torchs = (a - b for a, b in zip(self.now(), self.before, strict=True))

    @staticmethod
    def now():
        torch.cuda.synchronize()
        return counters.fake_gpu_driver_launches(), counters.fake_gpu_torch_launches()


def draw():
    return there(torch.randn(2, 5, 7, 7).bfloat16())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_call_is_one_launch_and_so_is_its_backward(activation, residual):
    x, r = draw().requires_grad_(), draw().requires_grad_() if residual else None
    main, grad = there(on_gpu.norm(5)), draw()
    with Launches() as forward:
        out = functional.frozen_batch_norm(x, *main, residual=r, activation=activation)
    with Launches() as backward:
        torch.autograd.grad(out, [x, r] if residual else [x], grad)
    assert (forward.ours, forward.torchs) == (1, 0)
    assert (backward.ours, backward.torchs) == (1, 0)


def test_trained_weights_take_one_launch_more():
    x, main, grad = draw().requires_grad_(), there(on_gpu.norm(5)), draw()
    main.weight.requires_grad_()
    out = functional.frozen_batch_norm(x, *main, activation="relu")
    with Launches() as backward:
        torch.autograd.grad(out, [x, main.weight], grad)
    assert (backward.ours, backward.torchs) == (2, 0)


def step(model, images):
    """What a forward and a backward pass launch."""
    with torch.backends.cudnn.flags(enabled=False):
        with Launches() as forward:
            out = model(images)
        with Launches() as backward:
            out.backward(torch.empty_like(out))
    return forward, backward


def test_a_model_launches_as_much_less_as_is_fused():
    def model(policy):
        made = torchvision.models.resnet18().cuda()
        freeze(made, policy)
        return step(made.train(), torch.randn(2, 3, 64, 64).cuda().requires_grad_())

    before, after, fused = model("eval+affine"), model("fused"), model("fused-act")
    # Twenty norm layers, three of which end the branch that a sum takes as its residual; after the
    # others come seventeen ReLUs, and before eight of these a sum.
    for evaluated, alone, with_act in zip(before, after, fused, strict=True):
        assert (evaluated.ours, alone.ours, with_act.ours) == (0, 20, 17)
        assert alone.torchs <= evaluated.torchs - 20
    assert fused[0].torchs == after[0].torchs - 17 - 8
    assert fused[1].torchs == after[1].torchs - 17


# ---------------------------------------------------------------------------- bugs that are put in


def test_a_launch_on_the_default_stream_is_found(launcher):
    launcher.stream = lambda device: 0
    assert not on_gpu.on_a_side_stream()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_kernel_loaded_while_a_graph_is_captured_is_found(launcher, monkeypatch):
    driver = launcher.driver
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    monkeypatch.setattr(driver, "cuThreadExchangeStreamCaptureMode", lambda _: (0, mode))
    with pytest.raises(BnfreezeWarning, match="CAPTURE_UNSUPPORTED"):
        on_gpu.captured_and_replayed(8, warm=False)


@pytest.mark.parametrize("broken", [False, True])
def test_a_context_that_was_taken_away_is_put_back(broken, launcher, monkeypatch):
    made, x = on_gpu.layer().cuda(), torch.randn(2, 8, 7, 7).cuda()
    expected = made(x).cpu()
    if broken:
        monkeypatch.setattr(type(launcher), "_bind", lambda *_: None)
    launcher.driver.cuCtxSetCurrent(0)
    with pytest.raises(BnfreezeWarning, match="INVALID_CONTEXT") if broken else nullcontext():
        assert torch.equal(made(x).cpu(), expected)


def test_ptx_in_place_of_a_cubin_is_found(launcher):
    launcher.cubin = lambda variant, arch: b".version 8.0\n" + b" " * 99
    with pytest.raises(BnfreezeWarning, match="INVALID_IMAGE"):
        on_gpu.layer().cuda()(torch.randn(2, 8, 7, 7).cuda())


# ----------------------------------------------------------------- what the kernel does not support


@pytest.mark.parametrize("part", [0, 1, 2, 3, "residual"])
def test_a_tensor_on_another_device_is_refused_by_aten(part):
    x, main = draw(), list(there(on_gpu.norm(5)))
    residual = draw() if part == "residual" else None
    if residual is not None:
        residual = residual.to("cuda:1")
    else:
        main[part] = main[part].to("cuda:1")
    refused = pytest.raises(RuntimeError, match="device")
    with Launches() as launches, torch.backends.cudnn.flags(enabled=False), refused:
        functional.frozen_batch_norm(x, *main, residual=residual)
    assert launches.ours == 0


def test_a_negated_view_is_resolved_or_left_to_aten():
    x, main = draw().requires_grad_(), there(on_gpu.norm(5))
    plain = functional.frozen_batch_norm(x, *main)  # a plan is there for all but the negation
    functional.frozen_batch_norm(x, *main, residual=x)
    negated = torch._neg_view(x.detach())
    with torch.backends.cudnn.flags(enabled=False), Launches() as forward:
        functional.frozen_batch_norm(negated, *main)
        functional.frozen_batch_norm(torch._neg_view(x), *main)  # with grad
        functional.frozen_batch_norm(x.detach(), *main, residual=negated)
    assert forward.ours == 0
    with Launches() as backward:
        torch.autograd.grad(plain, x, negated)
    assert (backward.ours, backward.torchs) == (1, 1)


def test_each_device_has_its_own_architecture_and_size(launcher):
    devices = [launcher.properties(device) for device in (0, 1)]
    assert [(each.major, each.minor) for each in devices] == [(9, 0), (8, 0)]
    assert [each.multi_processor_count for each in devices] == [3, 5]
    built, cubin = [], launcher.cubin
    launcher.cubin = lambda *asked: built.append(asked[1]) or cubin(*asked)
    for device in ("cuda:0", "cuda:1"):
        on_gpu.layer().to(device)(torch.randn(2, 8, 7, 7).to(device))
    assert built == ["sm_90", "sm_80"]
