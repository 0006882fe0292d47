"""frozen_batch_norm against torch's own and against an fp64 reference, on every path but CUDA."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from bnfreeze.nn.activations import ACTIVATIONS
from bnfreeze.nn.functional import _apply, backend, frozen_batch_norm
from tests.helpers import Affine

EPS = 1e-3
SHAPES = [(4, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 2), (0, 3, 4, 4), (1, 1, 1, 1)]
MODES = [None, "add", "affine+add"]
COMBINATIONS = list(itertools.product(ACTIVATIONS, MODES))
# For what is slow: each activation once, with one of the modes.
ROTATION = [(activation, MODES[n % 3]) for n, activation in enumerate(ACTIVATIONS)]


def tensors(shape, dtype=torch.float32, *, grad=False, seed=0, affine=True):
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def norm():
        statistics = torch.float64 if dtype is torch.float64 else torch.float32
        return Affine(
            draw(channels).to(statistics),
            (draw(channels).square() + 0.2).to(statistics),
            draw(channels).to(statistics) if affine else None,
            draw(channels).to(statistics) if affine else None,
            EPS,
        )

    x, residual = (draw(*shape).mul(2).to(dtype).requires_grad_(grad) for _ in range(2))
    return x, residual, norm(), norm()


def call(x, residual, norm, branch, activation, mode):
    if mode == "affine+add":
        return _apply(x, norm, residual, branch, activation)
    residual = residual if mode == "add" else None
    return frozen_batch_norm(x, *norm, residual=residual, activation=activation)


def reference(x, residual, norm, branch, activation, mode):
    """The formula, written down once more and in fp64."""

    def normalise(x, norm):
        mean, var, weight, bias = (
            None if t is None else t.double().view(-1, *[1] * (x.dim() - 2)) for t in norm[:4]
        )
        z = (x.double() - mean) / (var + norm.eps).sqrt()
        z = z if weight is None else z * weight
        return z if bias is None else z + bias

    z = normalise(x, norm)
    if mode is not None:
        z = z + (normalise(residual, branch) if mode == "affine+add" else residual.double())
    return ACTIVATIONS[activation](z)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_fp32_is_bit_identical_to_batchnorm_in_eval(shape, affine):
    x, _, norm, _ = tensors(shape, affine=affine)
    ours = frozen_batch_norm(x, *norm)
    theirs = batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, False, 0.1, norm.eps)
    assert torch.equal(ours, theirs)
    assert ours.dtype is x.dtype


@pytest.mark.parametrize(("activation", "mode"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_halves_are_within_one_rounding_of_fp64(activation, mode, dtype, layout):
    x, residual, norm, branch = tensors((4, 3, 8, 7), dtype)
    x = x.to(memory_format=layout)
    ours = call(x, residual, norm, branch, activation, mode)
    exact = reference(x, residual, norm, branch, activation, mode)
    assert ours.dtype is dtype
    # Half a unit in the last place, and a little for the fp32 arithmetic before the rounding.
    unit = torch.finfo(dtype).eps * exact.abs() / 2 + torch.finfo(dtype).smallest_normal
    assert ((ours.double() - exact).abs() <= unit * 1.01 + 2e-6).all()


@pytest.mark.parametrize(("activation", "mode"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_agree_with_fp64(activation, mode, dtype, trained):
    x, residual, norm, branch = tensors((5, 3, 4, 3), dtype, grad=True)
    wanted = [x, residual] if mode else [x]
    if trained:
        norm.weight.requires_grad_()
        norm.bias.requires_grad_()
        wanted += [norm.weight, norm.bias]
    ours = call(x, residual, norm, branch, activation, mode)
    exact = reference(x, residual, norm, branch, activation, mode)
    grad = torch.randn_like(exact).to(dtype)
    got = torch.autograd.grad(ours, wanted, grad)
    expected = torch.autograd.grad(exact, wanted, grad.double())
    for actual, right in zip(got, expected, strict=True):
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        assert actual.dtype is right.dtype
        assert (actual.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_the_gradient_of_a_half_is_within_one_rounding_of_fp64(dtype, layout, activation):
    x, grad, norm, _ = tensors((4, 3, 8, 7), dtype)
    x, grad = x.to(memory_format=layout).requires_grad_(), grad.to(memory_format=layout)
    out = frozen_batch_norm(x, *norm, activation=activation)
    (got,) = torch.autograd.grad(out, x, grad)
    scale = norm.weight.double() / (norm.var.double() + norm.eps).sqrt()
    exact = grad.double() * scale.view(-1, 1, 1)
    if activation is not None:
        exact[(out <= 0) | (out >= (6 if activation == "relu6" else float("inf")))] = 0
    assert got.is_contiguous(memory_format=layout)
    unit = torch.finfo(dtype).eps * exact.abs() / 2 + torch.finfo(dtype).smallest_normal
    assert ((got.double() - exact).abs() <= unit * 1.01).all()


@pytest.mark.parametrize(("activation", "mode"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("both", [False, True])
def test_no_argument_is_written_to(activation, mode, dtype, both):
    x, residual, norm, branch = tensors((4, 3, 5, 5), dtype)
    grad = torch.randn(4, 3, 5, 5).to(dtype)
    handed = (x, residual, grad, *norm[:4], *branch[:4])
    before = [tensor.clone() for tensor in handed]
    wanted = [x, residual] if mode and both else [x]
    for tensor in wanted:
        tensor.requires_grad_()
    out = call(x, residual, norm, branch, activation, mode)
    kept = out.detach().clone()
    # Twice, for what is saved must not be used up either.
    first = torch.autograd.grad(out, wanted, grad, retain_graph=True)
    again = torch.autograd.grad(out, wanted, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(out, kept)
    assert all(torch.equal(a, b) for a, b in zip(handed, before, strict=True))


@pytest.mark.parametrize(("activation", "mode"), COMBINATIONS)
@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck_and_gradgradcheck(activation, mode, trained):
    x, residual, norm, branch = tensors((2, 2), torch.float64, grad=True)

    def function(x, residual, weight, bias):
        both = norm._replace(weight=weight, bias=bias)
        return call(x, residual, both, branch, activation, mode)

    inputs = (x, residual, norm.weight.requires_grad_(trained), norm.bias.requires_grad_(trained))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("activation", "mode"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_one_tensor_of_the_inputs_size_is_saved(activation, mode, dtype):
    x, residual, norm, branch = tensors((4, 3, 5, 5), dtype, grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        call(x, residual, norm, branch, activation, mode)
    assert [each.shape for each in saved] == [x.shape] * (activation is not None)


def test_with_relu_it_is_the_output_that_is_saved():
    x, _, norm, _ = tensors((4, 3, 5, 5), grad=True)
    out = frozen_batch_norm(x, *norm, activation="relu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mul_(2).sum().backward()


@pytest.mark.parametrize("which", ["var", "weight"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("of_branch", [False, True])
def test_a_change_of_what_backward_reads_is_an_error(which, activation, of_branch):
    x, residual, norm, branch = tensors((4, 3, 5, 5), grad=True)
    out = call(x, residual, norm, branch, activation, "affine+add" if of_branch else None)
    changed = branch if of_branch else norm
    if of_branch or activation != "silu":
        changed.mean.add_(1)  # backward does not read these two
        changed.bias.add_(1)
    out.sum().backward(retain_graph=True)
    getattr(changed, which).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_silus_backward_computes_its_input_again_and_so_reads_mean_and_bias():
    x, _, norm, _ = tensors((4, 3, 5, 5), grad=True)
    out = frozen_batch_norm(x, *norm, activation="silu")
    norm.mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_input_and_residual_are_left_alone_and_may_be_one_tensor():
    x, _, norm, _ = tensors((4, 3, 5, 5), grad=True)
    before = x.detach().clone()
    out = frozen_batch_norm(x, *norm, residual=x, activation="relu")
    out.sum().backward()
    assert torch.equal(x.detach(), before)
    exact = reference(before.requires_grad_(), before, norm, None, "relu", "add")
    exact.sum().backward()
    assert torch.allclose(x.grad, before.grad, atol=1e-5)


def test_only_what_requires_grad_gets_one():
    x, residual, norm, _ = tensors((4, 3, 5, 5))
    norm.bias.requires_grad_()
    frozen_batch_norm(
        x, *norm, residual=residual.requires_grad_(), activation="silu"
    ).sum().backward()
    assert x.grad is None
    assert norm.weight.grad is None
    assert norm.bias.grad.shape == (3,)
    assert residual.grad.shape == x.shape


@pytest.mark.parametrize("make", [lambda g: g.transpose(2, 3), lambda g: g[:, :, ::2], "expanded"])
def test_odd_strides_of_input_and_gradient(make):
    x, _, norm, _ = tensors((4, 3, 6, 6), grad=True)
    view = x.expand(4, 3, 6, 6) if make == "expanded" else make(x)
    out = frozen_batch_norm(view, *norm, activation="relu")
    exact = reference(view, None, norm, None, "relu", None)
    (got,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (right,) = torch.autograd.grad(exact.sum(), x)
    assert torch.allclose(out.double(), exact, atol=1e-5)
    assert torch.allclose(got, right, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_pass_as_in_aten(activation, dtype):
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6e4]
    x = torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1).expand(-1, 2, 1, 1)
    mean, var = torch.zeros(2), torch.ones(2)
    weight, bias = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])
    ours = frozen_batch_norm(x, mean, var, weight, bias, 1e-5, activation=activation)
    theirs = ACTIVATIONS[activation](batch_norm(x, mean, var, weight, bias, eps=1e-5))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.allclose(ours, theirs, equal_nan=True)


def test_an_eps_of_zero_is_used():
    x = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    ours = frozen_batch_norm(x, torch.zeros(2), torch.tensor([4.0, 1.0]), None, None, 0.0)
    assert ours.flatten().tolist() == [0.5, -2.0]


def test_under_autocast_the_output_has_the_inputs_dtype():
    x, _, norm, _ = tensors((2, 3, 4, 4), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_batch_norm(x, *norm).dtype is torch.bfloat16
        assert frozen_batch_norm(x.float(), *norm).dtype is torch.float32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_weights_and_half_statistics_are_read_in_fp32(half):
    x, _, norm, _ = tensors((2, 3, 4, 4), half)
    halves = Affine(*(t.to(half) for t in norm[:4]), EPS)
    wide = Affine(*(t.to(half).float() for t in norm[:4]), EPS)
    assert torch.equal(frozen_batch_norm(x, *halves), frozen_batch_norm(x, *wide))


def test_the_wrong_rank_channels_residual_activation_or_dtype_is_named():
    x, _, norm, _ = tensors((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(3,\).*C = 3"):
        frozen_batch_norm(x[0, :, 0, 0], *norm)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\).*C = 3"):
        frozen_batch_norm(x[:, :1], *norm)
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 1\).*\(2, 3, 4, 4\)"):
        frozen_batch_norm(x, *norm, residual=x[:, :, :1, :1])
    with pytest.raises(ValueError, match=r"'softmax'.*'relu', 'relu6', 'silu', 'hardswish'"):
        frozen_batch_norm(x, *norm, activation="softmax")
    with pytest.raises(TypeError, match=r"floating dtype; it is torch\.int64"):
        frozen_batch_norm(x.long(), *norm)


@pytest.mark.parametrize(
    ("activation", "mode", "dtype"),
    [("relu", "affine+add", torch.bfloat16), ("silu", "add", torch.float32)],
)
def test_compiles_as_a_whole_graph(activation, mode, dtype):
    x, residual, norm, branch = tensors((2, 3, 4, 4), dtype, grad=True)

    def function(x, residual):
        return call(x, residual, norm, branch, activation, mode)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, out = function(x, residual), compiled(x, residual)
    assert torch.allclose(eager, out, atol=1e-5)
    (got,) = torch.autograd.grad(out.float().square().sum(), x)
    (right,) = torch.autograd.grad(eager.float().square().sum(), x)
    assert (got - right).norm() <= (1e-2 if dtype is torch.bfloat16 else 1e-5) * right.norm()


class Layer(nn.Module):
    def __init__(self, norm):
        super().__init__()
        for name, value in zip(("mean", "var", "weight", "bias"), norm[:4], strict=True):
            self.register_buffer(name, value)

    def forward(self, x):
        norm = self.mean, self.var, self.weight, self.bias, EPS
        return frozen_batch_norm(x, *norm, residual=x, activation="relu")


@pytest.mark.parametrize("strict", [True, False])
def test_exports_as_plain_aten(strict):
    x, _, norm, _ = tensors((2, 3, 4, 4))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Layer(norm), (x,), dynamic_shapes=({0: batch},), strict=strict)
    other = torch.randn(5, 3, 4, 4)
    assert torch.allclose(program.module()(other), Layer(norm)(other), atol=1e-6)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert all(target.startswith("aten.") for target in targets)


def test_jit_trace_records_the_computation():
    x, _, norm, _ = tensors((2, 3, 4, 4))
    traced = torch.jit.trace(Layer(norm), (x,))
    other = torch.randn(5, 3, 4, 4)
    assert torch.equal(traced(other), Layer(norm)(other))


@pytest.mark.parametrize(("activation", "mode"), ROTATION)
def test_vmap_grad_jvp_and_batched_gradients(activation, mode):
    x, residual, norm, branch = tensors((2, 3, 4), torch.float64)

    def function(x):
        return call(x, residual, norm, branch, activation, mode)

    def plain(x):
        return reference(x, residual, norm, branch, activation, mode)

    stack = torch.stack([x, x + 1, x * 2])
    assert torch.allclose(torch.func.vmap(function)(stack), torch.stack([plain(s) for s in stack]))
    right = torch.func.grad(lambda x: plain(x).square().sum())(x)
    assert torch.allclose(torch.func.grad(lambda x: function(x).square().sum())(x), right)
    tangent = torch.ones_like(x)
    _, got = torch.func.jvp(function, (x,), (tangent,))
    assert torch.allclose(got, torch.func.jvp(plain, (x,), (tangent,))[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        _, got_dual = torch.autograd.forward_ad.unpack_dual(function(dual))
    assert torch.allclose(got_dual, got)
    jacobian = torch.autograd.functional.jacobian(function, x, vectorize=True)
    assert torch.allclose(jacobian, torch.autograd.functional.jacobian(plain, x))


def test_meta_and_fake_tensors_give_shapes():
    x, _, norm, _ = tensors((2, 3, 4, 4), torch.bfloat16)
    meta = Affine(*(t.to("meta") for t in norm[:4]), EPS)
    out = frozen_batch_norm(x.to("meta").requires_grad_(), *meta, activation="relu")
    assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")
    out.sum().backward()
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        fake = frozen_batch_norm(mode.from_tensor(x), *(mode.from_tensor(t) for t in norm[:4]), EPS)
    assert (fake.shape, fake.dtype) == (x.shape, x.dtype)


def test_modes_see_every_operation():
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, _, norm, _ = tensors((2, 3, 4, 4), grad=True)
    with Spy():
        frozen_batch_norm(x, *norm, activation="relu").sum().backward()
    assert any("batch_norm" in name for name in seen)
    assert any("relu" in name for name in seen)


def test_backend_says_which_path_and_why():
    x, residual, norm, _ = tensors((2, 3, 4, 4))
    assert backend(x, *norm[:4], residual=residual).path == "aten"
    assert str(backend(x)) == "aten: The input is not on a CUDA device."
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert "dispatch mode" in backend(x, *norm[:4]).why
    with torch.overrides.BaseTorchFunctionMode():
        assert "function mode" in backend(x).why
    with torch.device("cpu"):  # torch.set_default_device is such a mode, and harmless
        assert backend(x).path == "aten"
    with torch.autograd.forward_ad.dual_level():
        assert "Forward-mode" in backend(x).why
    found = []
    torch.func.vmap(lambda t: found.append(backend(t)) or t)(x[None])
    assert "torch.func" in found[0].why
    assert "subclass" in backend(x.as_subclass(Sub)).why
    assert "statistics require grad" in backend(x, norm.mean.clone().requires_grad_()).why
    assert "dense tensor" in backend(x.long()).why


class Sub(torch.Tensor):
    pass
