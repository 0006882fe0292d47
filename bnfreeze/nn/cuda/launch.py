"""Launching the kernel through cuda.bindings: arguments, grids, contexts, streams.

This runs in every forward and backward pass, before a few microseconds of work on the device. So
the plan is made once for each kind of input, and the rest is written out without helpers.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from bnfreeze.nn.activations import FROM_INPUT
from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.build import KernelError
from bnfreeze.nn.cuda.host import Host
from bnfreeze.nn.cuda.layouts import DTYPES, KINDS, is_dense, joins, like, pointer, serves
from bnfreeze.nn.cuda.plan import ARGS, THREADS, Plan, Variant
from bnfreeze.nn.reference import Norm

__all__ = ["Launcher"]

# The thread has another context than before, or none. cuCtxSetCurrent repairs that.
_CONTEXT_ERRORS = frozenset({201, 400, 709})

_pack = ARGS.pack_into

# The activation, the kind of residual (see `plans.elementwise`) and the direction.
_Op = tuple[str | None, int, plans.Direction]
# A plan, the function loaded for it, and its grid and geometry again, for the launch to unpack.
_Loaded = tuple[Plan, Any, int, int, bytes]


class _Frame(threading.local):
    """Each thread's own buffer for the arguments. cuLaunchKernel copies it before it returns."""

    def __init__(self) -> None:
        arguments = ctypes.create_string_buffer(ARGS.size)
        # The kernel takes one argument, a struct; the driver wants an array of their addresses.
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self.bound: set[int] = set()
        # In one tuple, because attributes of a threading.local are slow.
        self.room = arguments, ctypes.addressof(self.pointers), self.bound


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
        self._streams: dict[int, Any] = {}
        self._modules: list[Any] = []  # kept alive, because the functions live in them
        self._current_device = host.current_device
        self._stream = host.stream
        self._cu_launch = host.driver.cuLaunchKernel

    def refusal(self, x: Tensor, norm: Norm, residual: Tensor | None, branch: Norm | None) -> str:
        """Return why the kernel does not support these tensors; empty if it does."""
        shape, device = x.shape, x.get_device()
        channels = shape[1] if len(shape) > 1 else 0
        if not channels:
            return "The input has no channels."
        if x.dtype not in DTYPES:
            return "The input is fp64."
        if not is_dense(x):
            return "The input is neither contiguous nor channels_last."
        if residual is not None and not joins(residual, x):
            return "The residual has another dtype or device than the input, or is negated."
        if not serves(norm, channels, device) or (
            branch is not None and not serves(branch, channels, device)
        ):
            return (
                "Statistics, weight or bias have an unusual dtype, size, stride or device: "
                "the statistics must be fp32, weight and bias of one dtype, on the input's device."
            )
        if x.is_neg():
            return "The input is a lazily negated view."
        if x.numel() > 2**30 and (
            self._make_plan(x, x.is_contiguous(), (None, 0, "forward"), False) is None
            or self._make_plan(x, x.is_contiguous(), (None, 0, "trained"), False) is None
        ):
            return "The input is too large."
        return ""

    def forward(
        self,
        x: Tensor,
        norm: Norm,
        residual: Tensor | None = None,
        branch: Norm | None = None,
        activation: str | None = None,
        keep_sum: bool = False,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Compute `bnfreeze.nn.reference.forward`; None if the input is not supported."""
        shape, dtype, device, in0 = x.shape, x.dtype, x.get_device(), x.data_ptr()
        in1 = kind = 0
        if residual is not None:
            if not (is_dense(x) and joins(residual, x)):
                return None
            residual, kind = like(residual, x), 1 if branch is None else 2
            in1 = residual.data_ptr()
        aligned = not (in0 | in1) & 15  # torch's allocators align the output to more
        # All that `refusal` checks of the input. If there is a plan, the input is supported.
        layout = x.is_contiguous() or x.stride()
        key = shape, layout, dtype, x.is_neg(), device, aligned, activation, kind
        loaded = self._plans.get(key)
        if loaded is None:
            if self.refusal(x, norm, residual, branch):
                return None
            if x.numel():
                loaded = self._plan(x, device, (activation, kind, "forward"), aligned)
                self._plans[key] = loaded
        elif not serves(norm, shape[1], device) or (
            branch is not None and not serves(branch, shape[1], device)
        ):
            return None
        y = torch.empty_like(x)
        z, out1 = None, 0
        if keep_sum:
            z = torch.empty_like(x)
            out1 = z.data_ptr()
        if loaded is not None:
            out0 = y.data_ptr()
            self._launch(device, loaded, in0, in1, 0, out0, out1, 0, norm, branch)
        return y, z

    def alone(self, x: Tensor, norm: Norm) -> Tensor | None:
        """Compute `forward` of the two alone. The most frequent call, so nothing else is done."""
        shape, device, in0 = x.shape, x.get_device(), x.data_ptr()
        layout = x.is_contiguous() or x.stride()
        key = shape, layout, x.dtype, x.is_neg(), device, not in0 & 15
        loaded = self._plans.get(key)
        if loaded is None:
            if self.refusal(x, norm, None, None):
                return None
            if not x.numel():
                return torch.empty_like(x)
            loaded = self._plan(x, device, (None, 0, "forward"), not in0 & 15)
            self._plans[key] = loaded
        elif not serves(norm, shape[1], device):
            return None
        y = torch.empty_like(x)
        self._launch(device, loaded, in0, 0, 0, y.data_ptr(), 0, 0, norm, None)
        return y

    def scaled(self, grad: Tensor, norm: Norm) -> Tensor:
        """Compute `bnfreeze.nn.reference.scaled`. The most frequent backward."""
        if grad.is_neg():
            grad = grad.resolve_neg()
        contiguous = grad.is_contiguous()
        if not (contiguous or is_dense(grad)):
            grad, contiguous = grad.contiguous(), True
        out = torch.empty_like(grad)
        in0, device = grad.data_ptr(), grad.get_device()
        key = grad.shape, grad.dtype, contiguous, not in0 & 15, device
        loaded = self._plans.get(key)
        if loaded is None:
            if not grad.numel():
                return out
            loaded = self._plan(grad, device, (None, 0, "backward"), not in0 & 15)
            self._plans[key] = loaded
        self._launch(device, loaded, in0, 0, 0, out.data_ptr(), 0, 0, norm, None)
        return out

    def backward(
        self,
        grad: Tensor,
        norm: Norm,
        branch: Norm | None,
        activation: str | None,
        kept: Tensor | None,
        kept_is_input: bool,
        x: Tensor | None,
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Compute `bnfreeze.nn.reference.backward`."""
        needs_x, needs_residual, needs_weight, needs_bias = needs
        trained = needs_weight or needs_bias
        # All in one layout. Saved tensors have the layout of x, unless a hook changed it.
        layout = kept if kept is not None else x if x is not None else grad
        if not is_dense(layout):
            layout = layout.contiguous()
        grad = like(grad.resolve_neg(), layout)
        kept = None if kept is None else like(kept, layout)
        x = None if x is None else like(x, layout)
        residual = 0
        if needs_residual or (activation in FROM_INPUT and not kept_is_input):
            residual = 1 if branch is None else 2
        grad_x = torch.empty_like(grad) if needs_x else None
        # Without an activation and a branch, the residual's gradient is the output's.
        passes_on = needs_residual and activation is None and branch is None
        grad_r = None
        if needs_residual:
            grad_r = grad if passes_on else torch.empty_like(grad)
        _, _, weight, bias, _ = norm
        grad_w = torch.empty_like(weight) if needs_weight and weight is not None else None
        grad_b = torch.empty_like(bias) if needs_bias and bias is not None else None
        if not grad.numel():
            for total in (grad_w, grad_b):
                if total is not None:
                    total.zero_()
            return grad_x, grad_r, grad_w, grad_b
        in0, in1, in2 = grad.data_ptr(), pointer(kept), pointer(x)
        if trained and x is None:
            in2 = in0  # the sum made of it is only read for the gradient of weight
        out0, out1 = pointer(grad_x), 0 if passes_on else pointer(grad_r)
        aligned = not (in0 | in1 | in2 | out0 | out1) & 15
        device = grad.get_device()
        op: _Op = activation, residual, "trained" if trained else "backward"
        loaded = self._plan(grad, device, op, aligned)
        if not trained:
            self._launch(device, loaded, in0, in1, in2, out0, out1, 0, norm, branch)
            return grad_x, grad_r, None, None
        channels, blocks = grad.size(1), loaded[0].blocks
        sums = torch.empty(2 * blocks * channels, dtype=torch.float32, device=grad.device)
        partial = sums.data_ptr()
        self._launch(device, loaded, in0, in1, in2, out0, out1, partial, norm, branch)
        out0, out1 = pointer(grad_w), pointer(grad_b)
        key = channels, blocks, device
        last = self._plans.get(key)
        if last is None:
            last = self._plans[key] = self._loaded(plans.finish(channels, blocks), device)
        self._launch(device, last, 0, 0, 0, out0, out1, partial, norm, None)
        return grad_x, grad_r, grad_w, grad_b

    def _plan(self, x: Tensor, device: int, op: _Op, aligned: bool) -> _Loaded:
        """The plan for a tensor like ``x``, and the function loaded for it; cached."""
        contiguous = x.is_contiguous()
        key = x.shape, x.dtype, contiguous, aligned, op, device
        loaded = self._plans.get(key)
        if loaded is None:
            plan = self._make_plan(x, contiguous, op, aligned)
            assert plan is not None  # `refusal` has checked it
            loaded = self._loaded(plan, device)
            if len(self._plans) >= 10_000:  # every input has a new shape
                self._plans.clear()
            self._plans[key] = loaded
        return loaded

    def _make_plan(self, x: Tensor, contiguous: bool, op: _Op, aligned: bool) -> Plan | None:
        activation, residual, direction = op
        # If a plane is a single element, the two layouts are the same, and rows is faster.
        rows = not contiguous or x.numel() == x.shape[0] * x.shape[1]
        return plans.elementwise(
            x.shape,
            DTYPES[x.dtype],
            rows,
            aligned,
            direction,
            activation,
            residual,
            self._host.processors(x.get_device()),
        )

    def _loaded(self, plan: Plan, device: int) -> _Loaded:
        with self._host.on_device(device):
            self._bind(device, self._frame)
            return plan, self._load(plan.variant, device), *plan.grid, plan.geometry

    def _launch(
        self,
        device: int,
        loaded: _Loaded,
        in0: int,
        in1: int,
        in2: int,
        out0: int,
        out1: int,
        partial: int,
        norm: Norm,
        branch: Norm | None,
    ) -> None:
        arguments, address, bound = self._frame.room
        if self._current_device() != device:
            with self._host.on_device(device):
                return self._launch(
                    device, loaded, in0, in1, in2, out0, out1, partial, norm, branch
                )
        if device not in bound:
            self._bind(device, self._frame)
        plan, function, across, down, geometry = loaded
        mean, var, weight, bias, eps = norm
        kind = mean_r = var_r = weight_r = bias_r = kind_r = 0
        eps_r = 0.0
        if weight is not None:
            kind = KINDS[weight.dtype]
        elif bias is not None:
            kind = KINDS[bias.dtype]
        if branch is not None:
            other_mean, other_var, other_weight, other_bias, eps_r = branch
            mean_r, var_r = other_mean.data_ptr(), other_var.data_ptr()
            weight_r, bias_r = pointer(other_weight), pointer(other_bias)
            parameter = other_weight if other_weight is not None else other_bias
            kind_r = 0 if parameter is None else KINDS[parameter.dtype]
        _pack(
            arguments, 0,
            in0, in1, in2, out0, out1,
            mean.data_ptr(), var.data_ptr(),
            0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            mean_r, var_r, weight_r, bias_r,
            partial,
            eps, eps_r,
            kind, kind_r,
            geometry,
        )  # fmt: skip
        raw = self._stream(device)
        stream = self._streams.get(raw)
        if stream is None:
            stream = self._streams[raw] = self._host.driver.CUstream(raw)
        (error,) = self._cu_launch(function, across, down, 1, THREADS, 1, 1, 0, stream, address, 0)
        if error and int(error) in _CONTEXT_ERRORS:
            self._bind(device, self._frame)
            (error,) = self._cu_launch(
                function, across, down, 1, THREADS, 1, 1, 0, stream, address, 0
            )
        if error:
            raise KernelError(f"the launch of {plan.variant.expression} failed: {error!r}")

    def _bind(self, device: int, frame: _Frame) -> None:
        """Make the device's primary context, which is torch's, this thread's current one.

        torch does this at its first CUDA call in a thread. But a thread that has only got memory
        from torch's cache has made no such call yet.
        """
        driver = self._host.driver
        with self._lock:
            if device not in self._contexts:
                handle = self._checked(driver.cuDeviceGet(device), "cuDeviceGet")
                # Never released: torch keeps it until the process ends, too.
                self._contexts[device] = self._checked(
                    driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain"
                )
        current = self._checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")
        if int(current) != int(self._contexts[device]):
            self._checked(driver.cuCtxSetCurrent(self._contexts[device]), "cuCtxSetCurrent")
        frame.bound.add(device)

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
            before = self._checked(
                driver.cuThreadExchangeStreamCaptureMode(relaxed), "the capture mode"
            )
            try:
                module = self._checked(driver.cuModuleLoadData(code), "cuModuleLoadData")
                name = variant.name.encode()
                function = self._checked(
                    driver.cuModuleGetFunction(module, name), "cuModuleGetFunction"
                )
            finally:
                driver.cuThreadExchangeStreamCaptureMode(before)
            self._modules.append(module)
            self._functions[variant, device] = function
            return function

    @staticmethod
    def _checked(result: tuple[Any, ...], what: str) -> Any:
        error, *values = result
        if error:
            raise KernelError(f"{what} failed: {error!r}")
        return values[0] if values else None
