"""Launching the kernel through cuda.bindings: arguments, grids, contexts, streams.

This runs in every forward and backward pass, before a few microseconds of work on the device. So
the plan is made once for each kind of input.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.build import KernelError
from bnfreeze.nn.cuda.layouts import DTYPES, KINDS, fits, is_dense, like, unsupported
from bnfreeze.nn.cuda.plan import ARGS, THREADS, Plan, Variant
from bnfreeze.nn.reference import Norm

__all__ = ["Host", "Launcher"]

# The thread has another context than before, or none. cuCtxSetCurrent repairs that.
_CONTEXT_ERRORS = frozenset({201, 400, 709})

# The activation, the kind of residual (see `plans.elementwise`) and the direction.
_Op = tuple[str | None, int, plans.Direction]
# A plan, and the function loaded for it.
_Loaded = tuple[Plan, Any]


@dataclass(frozen=True)
class Host:
    """The driver, the compiler, and torch's functions for devices. The tests replace them."""

    driver: Any
    cubin: Callable[[Variant, str], bytes]
    current_device: Callable[[], int]
    on_device: Callable[[int], Any]
    stream: Callable[[int], int]
    capability: Callable[[int], tuple[int, int]]
    processors: Callable[[int], int]


class _Frame(threading.local):
    """Each thread's own buffer for the arguments. cuLaunchKernel copies it before it returns."""

    def __init__(self) -> None:
        arguments = ctypes.create_string_buffer(ARGS.size)
        # The kernel takes one argument, a struct; the driver wants an array of their addresses.
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        bound: set[int] = set()  # the devices whose context this thread has
        # In one tuple, because attributes of a threading.local are slow.
        self.room = arguments, ctypes.addressof(self.pointers), bound


class Launcher:
    """Runs the kernel on tensors that it supports (`refusal` returns an empty string for them).

    `forward` and `backward` take and return the same as in `bnfreeze.nn.reference`. They raise
    `KernelError` if the kernel cannot be compiled, loaded or launched.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._frame = _Frame()
        self._lock = threading.Lock()
        self._functions: dict[tuple[Variant, int], Any] = {}
        self._contexts: dict[int, Any] = {}
        self._plans: dict[Any, _Loaded] = {}
        self._as_stream = cache(host.driver.CUstream)

    def refusal(self, x: Tensor, norm: Norm, residual: Tensor | None, branch: Norm | None) -> str:
        """Return why the kernel does not support these tensors; empty if it does."""
        why = unsupported(x, norm, residual, branch)
        if not why and x.numel() > 2**30:
            forward: _Op = None, 0, "forward"
            trained: _Op = None, 0, "trained"
            if not (self._plan(x, forward, False) and self._plan(x, trained, False)):
                return "The input is too large."
        return why

    def forward(
        self,
        x: Tensor,
        norm: Norm,
        residual: Tensor | None = None,
        branch: Norm | None = None,
        activation: str | None = None,
        keep_sum: bool = False,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Compute `bnfreeze.nn.reference.forward`; None if the tensors are not supported."""
        if residual is None:
            y = self.alone(x, norm, activation, "forward")
            return None if y is None else (y, None)
        if self.refusal(x, norm, residual, branch):
            return None
        residual = like(residual, x)
        y = torch.empty_like(x)
        total = torch.empty_like(x) if keep_sum else None
        op: _Op = activation, _kind(False, branch), "forward"
        self._run(op, (x, residual, None, y, total), norm, branch)
        return y, total

    def alone(
        self, x: Tensor, norm: Norm, activation: str | None, direction: plans.Direction
    ) -> Tensor | None:
        """Make one pass from ``x`` to a new tensor; None if the tensors are not supported.

        Forward: `forward` without a residual. Backward, without an activation: the gradient of x
        from that of the output. These are by far the most frequent calls, so this is written out.
        """
        shape, device, in0 = x.shape, x.get_device(), x.data_ptr()
        aligned = not in0 & 15  # torch's allocators align the output to more
        # All that `refusal` checks of x. If there is a plan, x is supported.
        layout = x.is_contiguous() or x.stride()
        key = shape, layout, x.dtype, x.is_neg(), device, aligned, activation, direction
        loaded = self._plans.get(key)
        if loaded is None:
            if direction == "backward" and (x.is_neg() or not is_dense(x)):
                return self.alone(x.resolve_neg().contiguous(), norm, activation, direction)
            if self.refusal(x, norm, None, None):
                return None
            if not x.numel():
                return torch.empty_like(x)
            plan = self._plan(x, (activation, 0, direction), aligned)
            loaded = self._loaded(key, plan, device)
        elif direction == "forward" and not fits(norm, shape[1], device):
            return None
        y = torch.empty_like(x)
        self._launch(device, loaded, (in0, 0, 0, y.data_ptr(), 0), 0, norm, None)
        return y

    def backward(
        self,
        grad: Tensor,
        norm: Norm,
        branch: Norm | None,
        activation: str | None,
        kept: Tensor | None,
        alone: bool,
        x: Tensor | None,
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Compute `bnfreeze.nn.reference.backward`."""
        needs_x, needs_residual, needs_weight, needs_bias = needs
        # All in one layout. Saved tensors have the layout of x, unless a hook changed it.
        layout = kept if kept is not None else x if x is not None else grad
        if not is_dense(layout):
            layout = layout.contiguous()
        grad = like(grad.resolve_neg() if grad.is_neg() else grad, layout)
        kept = None if kept is None else like(kept, layout)
        x = None if x is None else like(x, layout)
        grad_x = torch.empty_like(grad) if needs_x else None
        # Without an activation and a branch, the residual's gradient is the output's.
        grad_r = passed_on = grad if needs_residual and activation is None and not branch else None
        if needs_residual and passed_on is None:
            grad_r = torch.empty_like(grad)
        _, _, weight, bias, _ = norm
        make = torch.empty_like if grad.numel() else torch.zeros_like
        grad_w = make(weight) if needs_weight and weight is not None else None
        grad_b = make(bias) if needs_bias and bias is not None else None
        direction: plans.Direction = "backward"
        if needs_weight or needs_bias:
            direction = "trained"
            # For bias alone any x will do: the sum made of it is not read.
            x = grad if x is None else x
        op: _Op = activation, _kind(alone, branch), direction
        written = grad_r if passed_on is None else None
        self._run(op, (grad, kept, x, grad_x, written), norm, branch, grad_w, grad_b)
        return grad_x, grad_r, grad_w, grad_b

    def _run(
        self,
        op: _Op,
        tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        norm: Norm,
        branch: Norm | None,
        grad_w: Tensor | None = None,
        grad_b: Tensor | None = None,
    ) -> None:
        """Make one pass over tensors of one layout, and the sums for weight and bias if asked."""
        x = tensors[0]
        if not x.numel():
            return
        pointers = [0 if each is None else each.data_ptr() for each in tensors]
        in0, in1, in2, out0, out1 = pointers
        aligned = not (in0 | in1 | in2 | out0 | out1) & 15
        device = x.get_device()
        key = x.shape, x.dtype, x.is_contiguous(), aligned, op, device
        loaded = self._plans.get(key)
        if loaded is None:
            loaded = self._loaded(key, self._plan(x, op, aligned), device)
        blocks = loaded[0].blocks
        if not blocks:
            return self._launch(device, loaded, pointers, 0, norm, branch)
        channels = x.shape[1]
        sums = torch.empty(2 * blocks * channels, dtype=torch.float32, device=x.device)
        partial = sums.data_ptr()
        self._launch(device, loaded, pointers, partial, norm, branch)
        last = self._plans.get((channels, blocks, device)) or self._loaded(
            (channels, blocks, device), plans.finish(channels, blocks), device
        )
        outs = [0 if each is None else each.data_ptr() for each in (grad_w, grad_b)]
        self._launch(device, last, [0, 0, 0, *outs], partial, norm, None)

    def _plan(self, x: Tensor, op: _Op, aligned: bool) -> Plan | None:
        activation, residual, direction = op
        # If a plane is a single element, the two layouts are the same, and rows is faster.
        rows = not x.is_contiguous() or x.numel() == x.shape[0] * x.shape[1]
        processors = self._host.processors(x.get_device())
        return plans.elementwise(
            x.shape, DTYPES[x.dtype], rows, aligned, direction, activation, residual, processors
        )

    def _loaded(self, key: Any, plan: Plan | None, device: int) -> _Loaded:
        """Load the plan's function, and keep both under the key."""
        assert plan is not None  # `refusal` has checked it
        with self._host.on_device(device):
            self._bind(device)
            loaded = plan, self._load(plan.variant, device)
        if len(self._plans) >= 10_000:  # every input has a new shape
            self._plans.clear()
        self._plans[key] = loaded
        return loaded

    def _launch(
        self,
        device: int,
        loaded: _Loaded,
        pointers: Sequence[int],  # of three inputs and two outputs; 0 for none
        partial: int,
        norm: Norm,
        branch: Norm | None,
    ) -> None:
        host = self._host
        if host.current_device() != device:
            with host.on_device(device):
                return self._launch(device, loaded, pointers, partial, norm, branch)
        arguments, address, bound = self._frame.room
        if device not in bound:
            self._bind(device)
        plan, function = loaded
        across, down = plan.grid
        in0, in1, in2, out0, out1 = pointers
        mean, var, weight, bias, eps, kind = _parameters(norm)
        mean_r = var_r = weight_r = bias_r = kind_r = 0
        eps_r = 0.0
        if branch is not None:
            mean_r, var_r, weight_r, bias_r, eps_r, kind_r = _parameters(branch)
        ARGS.pack_into(  # unpacking a tuple here would take a third of the time more
            arguments, 0,
            in0, in1, in2, out0, out1,
            mean, var, weight, bias,
            mean_r, var_r, weight_r, bias_r,
            partial, eps, eps_r, kind, kind_r, plan.geometry,
        )  # fmt: skip
        launch, stream = host.driver.cuLaunchKernel, self._as_stream(host.stream(device))
        (error,) = launch(function, across, down, 1, THREADS, 1, 1, 0, stream, address, 0)
        if error and int(error) in _CONTEXT_ERRORS:
            self._bind(device)
            (error,) = launch(function, across, down, 1, THREADS, 1, 1, 0, stream, address, 0)
        if error:
            raise KernelError(f"the launch of {plan.variant.expression} failed: {error!r}")

    def _bind(self, device: int) -> None:
        """Make the device's primary context, which is torch's, this thread's current one.

        torch does this at its first CUDA call in a thread. But a thread that has only got memory
        from torch's cache has made no such call yet.
        """
        driver = self._host.driver
        with self._lock:
            if device not in self._contexts:
                handle = _checked(driver.cuDeviceGet(device), "cuDeviceGet")
                # Never released: torch keeps it until the process ends, too.
                self._contexts[device] = _checked(
                    driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain"
                )
        current = _checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
        if int(current) != int(self._contexts[device]):
            _checked(driver.cuCtxSetCurrent(self._contexts[device]), "cuCtxSetCurrent")
        self._frame.room[2].add(device)

    def _load(self, variant: Variant, device: int) -> Any:
        driver = self._host.driver
        with self._lock:
            if (variant, device) in self._functions:
                return self._functions[variant, device]
            major, minor = self._host.capability(device)
            code = self._host.cubin(variant, f"sm_{major}{minor}")
            # While a stream of this thread is captured into a graph, loading is only allowed in
            # relaxed mode. It does not become a part of the graph.
            relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            before = _checked(driver.cuThreadExchangeStreamCaptureMode(relaxed), "the capture mode")
            try:
                module = _checked(driver.cuModuleLoadData(code), "cuModuleLoadData")
                name = variant.name.encode()
                function = _checked(driver.cuModuleGetFunction(module, name), "cuModuleGetFunction")
            finally:
                driver.cuThreadExchangeStreamCaptureMode(before)
            self._functions[variant, device] = function
            return function


def _parameters(norm: Norm) -> tuple[int, int, int, int, float, int]:
    """The addresses of a norm layer's tensors, its eps, and the dtype of weight and bias."""
    mean, var, weight, bias, eps = norm
    one = bias if weight is None else weight
    return (
        mean.data_ptr(),
        var.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        0 if one is None else KINDS[one.dtype],
    )


def _kind(alone: bool, branch: Norm | None) -> int:
    """The kind of residual, as in `plans.elementwise`."""
    return 0 if alone else 1 if branch is None else 2


def _checked(result: tuple[Any, ...], what: str) -> Any:
    """Return what a driver's function returned; raise `KernelError` for an error."""
    error, *values = result
    if error:
        raise KernelError(f"{what} failed: {error!r}")
    return values[0] if values else None
