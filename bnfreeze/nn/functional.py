"""Frozen batch norm as a function, with the residual and the activation that follow it.

Each call takes one of three paths: the fused CUDA kernel; ATen with a backward of our own, which
saves next to nothing; or the formula in plain differentiable ATen. `backend` says which, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from bnfreeze.nn import reference
from bnfreeze.nn.activations import ACTIVATIONS, FROM_INPUT
from bnfreeze.nn.cuda.layouts import UNUSUAL, unsupported
from bnfreeze.nn.cuda.load import kernel as _kernel
from bnfreeze.nn.eager import TRACING, backward_needs_formula, why_formula
from bnfreeze.nn.reference import Norm

__all__ = ["Backend", "backend", "frozen_batch_norm"]


def frozen_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalise with the running statistics; add ``residual``; apply ``activation``.

    ``activation((x - running_mean) * weight / sqrt(running_var + eps) + bias + residual)``,
    per channel (Ioffe and Szegedy 2015, algorithm 2), in one kernel where the CUDA kernel runs.

    Args:
        x: (N, C, *) of any floating dtype; channels_last or not.
        running_mean: (C,), not differentiated. It is read and never written.
        running_var: (C,), as ``running_mean``.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        residual: of the shape of ``x``, or None. It is not broadcast.
        activation: None, or a name from `bnfreeze.nn.activations`, such as ``"relu"``.

    Returns:
        A new tensor of the shape and dtype of ``x``. The arithmetic is in fp32 (fp64 for fp64)
        and rounds once, under autocast too.

    If weight and bias do not require grad, backward saves nothing of the size of ``x``; with an
    activation it saves one tensor, which for relu and relu6 is the output.

    Raises:
        ValueError: ``x`` has no channel dimension or not C channels; ``residual`` has another
            shape; ``activation`` is unknown (the message lists the names).
        TypeError: ``x`` is not of a floating dtype.
    """
    norm = running_mean, running_var, weight, bias, eps
    return _apply(x, norm, residual, None, activation)


@dataclass(frozen=True)
class Backend:
    """Which path an input takes, and why.

    ``path`` is ``"kernel"`` (the fused CUDA kernel), ``"aten"`` (ATen, with a backward that saves
    next to nothing) or ``"formula"`` (plain differentiable ATen). ``why`` is a sentence.
    """

    path: Literal["kernel", "aten", "formula"]
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def backend(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
) -> Backend:
    """Return which path `frozen_batch_norm` takes for these tensors, here and now, and why.

    Args as in `frozen_batch_norm`; those left out are taken as ordinary fp32 tensors on the device
    of ``x``. If the answer would be the kernel, it is first launched on the first image, to make
    sure that it works.
    """
    if running_mean is None:
        running_mean = torch.empty(x.shape[1], device=x.device)
    if running_var is None:
        running_var = running_mean
    norm = running_mean, running_var, weight, bias, 1e-5
    if why := why_formula(x, norm, residual, None):
        return Backend("formula", why)
    why = unsupported(x, residual) if _on_cuda(x) else "The input is not on a CUDA device."
    if not why and _kernel.run("alone", x[:1].detach(), norm, None, "forward") is None:
        why = _kernel.trouble or UNUSUAL
    if why:
        return Backend("aten", why)
    return Backend("kernel", "The CUDA kernel supports this input.")


class _FrozenBatchNormAlone(torch.autograd.Function):
    """A norm layer alone, with frozen weight and bias: the most frequent case. It saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        (y, _), on_kernel = _computed(x, norm, None, None, None)
        _, var, weight, _, _ = norm
        # Autograd would check the versions of saved tensors itself, in twice the time.
        ctx.how = norm, on_kernel, var._version, weight is not None and weight._version
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        norm, on_kernel, version, weight_version = ctx.how
        _, var, weight, _, _ = norm
        if var._version != version or (weight is not None and weight._version != weight_version):
            raise RuntimeError(_MODIFIED)
        eager = not backward_needs_formula(grad)
        out = _kernel.run("alone", grad, norm, None, "backward") if eager and on_kernel else None
        return reference.scaled(grad, norm, eager) if out is None else out, None


class _FrozenBatchNorm(torch.autograd.Function):
    """Saves the least: what each activation needs, and ``x`` only for the gradient of weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,  # of the norm layer, if it is trained; the same for bias
        bias: Tensor | None,
        norm: Norm,
        branch: Norm | None,
        activation: str | None,
    ) -> Any:
        # With a residual, x alone does not give the sum. The sum becomes a second output, so that
        # double backward can go through it.
        alone, from_input = residual is None, activation in FROM_INPUT
        keep_sum = from_input and not alone
        (y, total), on_kernel = _computed(x, norm, residual, branch, activation, keep_sum)
        kept = total if keep_sum else x if from_input else None if activation is None else y
        needs_x = None if weight is None else x
        ctx.save_for_backward(kept, needs_x)
        # Mean and bias are read in backward only if x is.
        read = norm[:4] if kept is x or needs_x is not None else norm[1:3]
        read = read if branch is None else (*read, *branch[1:3])
        versions = [each._version for each in read if each is not None]
        ctx.how = norm, branch, activation, alone, on_kernel, read, versions
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None) -> Any:
        norm, branch, activation, alone, on_kernel, read, versions = ctx.how
        if [each._version for each in read if each is not None] != versions:
            raise RuntimeError(_MODIFIED)
        kept, x = ctx.saved_tensors
        if grad is None:  # only the sum has a gradient, in a double backward
            if grad_sum is None:
                return (None,) * 7
            grad = torch.zeros_like(grad_sum)
        arguments = grad, norm, branch, activation, kept, alone, x, ctx.needs_input_grad[:4]
        eager = grad_sum is None and not backward_needs_formula(grad)
        grads = _kernel.run("backward", *arguments) if eager and on_kernel else None
        if grads is None:
            grads = reference.backward(*arguments, grad_sum=grad_sum, eager=eager)
        return *grads, None, None, None


def _apply(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    branch: Norm | None,
    activation: str | None,
) -> Tensor:
    """Compute ``activation(norm(x) + branch(residual))``, as `frozen_batch_norm` describes it."""
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name is not None)
        raise ValueError(f"Unknown activation {activation!r}; choose {names} or None.")
    why = why_formula(x, norm, residual, branch)
    if why:
        if why is not TRACING:  # where a size is a traced value, and comparing it warns
            _check_shapes(x, norm, residual)
        if not x.is_floating_point():
            raise TypeError(f"The input must be of a floating dtype; it is {x.dtype}.")
        return reference.forward(x, norm, residual, branch, activation)[0]
    if not torch.is_grad_enabled():
        return _computed(x, norm, residual, branch, activation)[0][0]
    _, _, weight, bias, _ = norm
    # Autograd takes a microsecond for each tensor, so it gets only those that are trained.
    weight = weight if weight is not None and weight.requires_grad else None
    bias = bias if bias is not None and bias.requires_grad else None
    trained = weight is not None or bias is not None
    if not trained and activation is None and residual is None:
        if x.requires_grad:
            return _FrozenBatchNormAlone.apply(x, norm)  # type: ignore[no-any-return]
    elif trained or x.requires_grad or (residual is not None and residual.requires_grad):
        out: Any = _FrozenBatchNorm.apply(x, residual, weight, bias, norm, branch, activation)
        return out[0]  # type: ignore[no-any-return]
    return _computed(x, norm, residual, branch, activation)[0][0]


def _computed(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    branch: Norm | None,
    activation: str | None,
    keep_sum: bool = False,
) -> tuple[tuple[Tensor, Tensor | None], bool]:
    """Return the results of `reference.forward`, and whether the kernel computed them."""
    if _on_cuda(x):
        done: Any
        if residual is None:
            y = _kernel.run("alone", x, norm, activation, "forward")
            done = None if y is None else (y, None)
        else:
            done = _kernel.run("forward", x, norm, residual, branch, activation, keep_sum)
        if done is not None:
            return done, True
    _check_shapes(x, norm, residual)
    both = reference.forward(x, norm, residual, branch, activation, keep_sum=keep_sum, eager=True)
    return both, False


def _check_shapes(x: Tensor, norm: Norm, residual: Tensor | None) -> None:
    """Raise a ValueError if the shapes do not fit. The kernel checks them itself."""
    shape, channels = x.shape, norm[0].numel()
    if len(shape) < 2 or shape[1] != channels:
        raise ValueError(
            f"The input has the shape {tuple(shape)}; it must be (N, C, *) with "
            f"C = {channels} channels, as the running statistics have."
        )
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"The residual has the shape {tuple(residual.shape)} and the input "
            f"{tuple(shape)}; they must be equal, because a residual is not broadcast."
        )


_on_cuda = attrgetter("is_cuda")
_MODIFIED = (
    "A statistic, weight or bias of a frozen norm layer has been modified by an inplace operation "
    "between forward and backward."
)
