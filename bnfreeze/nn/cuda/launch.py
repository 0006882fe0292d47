"""Launching the kernel through cuda.bindings: arguments, grids, contexts, streams.

This runs in every forward and backward pass, before a few microseconds of work on the device. So
the plan is made once for each kind of input.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bnfreeze.nn.cuda import build
from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.build import KernelError
from bnfreeze.nn.cuda.layouts import DTYPES, is_dense, like, parameters, unsupported
from bnfreeze.nn.cuda.plan import ARGS, THREADS, Plan
from bnfreeze.nn.reference import Norm
from bnfreeze.torch_private import _cuda_getCurrentRawStream, _cuda_getDevice

# The thread has another context than before, or none. cuCtxSetCurrent repairs that.
_CONTEXT_ERRORS = frozenset({201, 400, 709})

# The activation, the kind of residual (see `plans.elementwise`) and the direction.
_Op = tuple[str | None, int, plans.Direction]
# A plan, and the function loaded for it.
_Loaded = tuple[Plan, Any]
# What `layouts.parameters` returns, and this for no norm layer.
_Parameters = tuple[int, int, int, int, float, int]
_NO_PARAMETERS = (0, 0, 0, 0, 0.0, 0)


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
    """Runs the kernel on tensors that it supports; see `bnfreeze.nn.cuda.layouts`.

    `forward` and `backward` take and return the same as in `bnfreeze.nn.reference`, or return None
    if the tensors are not supported. They raise `KernelError` if the kernel cannot be compiled,
    loaded or launched.
    """

    # The compiler, and torch's functions for devices. The tests replace them.
    cubin = staticmethod(build.cubin)
    current_device = staticmethod(_cuda_getDevice)  # there are CUDA tensors: it is initialized
    on_device: Any = torch.cuda.device
    stream = staticmethod(_cuda_getCurrentRawStream)
    properties: Any = staticmethod(torch.cuda.get_device_properties)

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self._frame = _Frame()
        self._plans: dict[Any, list[_Loaded]] = {}
        self._as_stream = cache(driver.CUstream)
        self._context = cache(self._retain)
        self._function = cache(self._load)

    def forward(
        self,
        x: Tensor,
        norm: Norm,
        residual: Tensor,
        branch: Norm | None,
        activation: str | None,
        keep_sum: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Compute `bnfreeze.nn.reference.forward`, with a residual."""
        if unsupported(x, residual):
            return None
        residual = like(residual, x)
        y = torch.empty_like(x)
        total = torch.empty_like(x) if keep_sum else None
        op: _Op = activation, 1 if branch is None else 2, "forward"
        done = self._run(op, (x, residual, None, y, total), norm, branch)
        return (y, total) if done else None

    def alone(
        self, x: Tensor, norm: Norm, activation: str | None, direction: plans.Direction
    ) -> Tensor | None:
        """Make one pass from ``x`` to a new tensor; None if the tensors are not supported.

        Forward, without a residual. Backward, without an activation too: the gradient of x
        from that of the output. These are by far the most frequent calls, so this is written out.
        """
        shape, device, in0 = x.shape, x.get_device(), x.data_ptr()
        aligned = not in0 & 15  # torch's allocators align the output to more
        # All that `unsupported` checks of x. If there is a plan, x is supported.
        layout = x.is_contiguous() or x.stride()
        key = shape, layout, x.dtype, x.is_neg(), device, aligned, activation, direction
        loaded = self._plans.get(key)
        if loaded is None:
            if direction == "backward" and (x.is_neg() or not is_dense(x)):
                return self.alone(x.resolve_neg().contiguous(), norm, activation, direction)
            if unsupported(x, None):
                return None
            if x.numel():
                loaded = self._loaded(key, x, (activation, 0, direction), aligned)
        own = parameters(norm, shape[1], device)
        if own is None:
            return None
        y = torch.empty_like(x)
        if loaded is not None:
            self._launch(device, loaded[0], (in0, 0, 0, y.data_ptr(), 0), 0, own, _NO_PARAMETERS)
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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None:
        """Compute `bnfreeze.nn.reference.backward`, where the kernel has computed the forward."""
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
        passed_on = grad if activation is None and branch is None else None
        written = torch.empty_like(grad) if needs_residual and passed_on is None else None
        _, _, weight, bias, _ = norm
        make = torch.empty_like if grad.numel() else torch.zeros_like
        grad_w = make(weight) if needs_weight and weight is not None else None
        grad_b = make(bias) if needs_bias and bias is not None else None
        direction: plans.Direction = "backward"
        if needs_weight or needs_bias:
            direction = "trained"
            # For bias alone any x will do: the sum made of it is not read.
            x = grad if x is None else x
        op: _Op = activation, 0 if alone else 1 if branch is None else 2, direction
        done = self._run(op, (grad, kept, x, grad_x, written), norm, branch, grad_w, grad_b)
        grad_r = (passed_on if written is None else written) if needs_residual else None
        return (grad_x, grad_r, grad_w, grad_b) if done else None

    def _run(
        self,
        op: _Op,
        tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        norm: Norm,
        branch: Norm | None,
        grad_w: Tensor | None = None,
        grad_b: Tensor | None = None,
    ) -> bool:
        """Make one pass over tensors of one layout, and the sums for weight and bias if asked.

        Returns False if the tensors of a norm layer are not supported.
        """
        x = tensors[0]
        channels, device = x.shape[1], x.get_device()
        own = parameters(norm, channels, device)
        other = parameters(branch, channels, device) if branch else _NO_PARAMETERS
        if own is None or other is None:
            return False
        if not x.numel():
            return True
        pointers = [0 if each is None else each.data_ptr() for each in tensors]
        in0, in1, in2, out0, out1 = pointers
        aligned = not (in0 | in1 | in2 | out0 | out1) & 15
        key = x.shape, x.dtype, x.is_contiguous(), aligned, op, device
        main, *finish = self._plans.get(key) or self._loaded(key, x, op, aligned)
        partial, sums = 0, None
        if finish:
            size = 2 * main[0].blocks * channels
            sums = torch.empty(size, dtype=torch.float32, device=x.device)
            partial = sums.data_ptr()
        self._launch(device, main, pointers, partial, own, other)
        outs = [0 if each is None else each.data_ptr() for each in (grad_w, grad_b)]
        for last in finish:
            self._launch(device, last, [0, 0, 0, *outs], partial, own, _NO_PARAMETERS)
        return True

    def _loaded(self, key: Any, x: Tensor, op: _Op, aligned: bool) -> list[_Loaded]:
        """Plan a pass over ``x`` and what follows it; keep both with their functions."""
        activation, residual, direction = op
        device, shape = x.get_device(), x.shape
        # If a plane is a single element, the two layouts are the same, and rows is faster.
        rows = not x.is_contiguous() or x.numel() == shape[0] * shape[1]
        busy = self.properties(device).multi_processor_count
        plan = plans.elementwise(
            shape, DTYPES[x.dtype], rows, aligned, direction, activation, residual, busy
        )
        several = [plan, plans.finish(shape[1], plan.blocks)] if plan.blocks else [plan]
        with self.on_device(device):
            self._bind(device)
            loaded = [(each, self._function(each.variant, device)) for each in several]
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
        own: _Parameters,
        other: _Parameters,
    ) -> None:
        if self.current_device() != device:
            with self.on_device(device):
                return self._launch(device, loaded, pointers, partial, own, other)
        arguments, address, bound = self._frame.room
        if device not in bound:
            self._bind(device)
        plan, function = loaded
        across, down = plan.grid
        in0, in1, in2, out0, out1 = pointers
        mean, var, weight, bias, eps, kind = own
        mean_r, var_r, weight_r, bias_r, eps_r, kind_r = other
        ARGS.pack_into(  # unpacking a tuple here would take a third of the time more
            arguments, 0,
            in0, in1, in2, out0, out1,
            mean, var, weight, bias,
            mean_r, var_r, weight_r, bias_r,
            partial, eps, eps_r, kind, kind_r, plan.geometry,
        )  # fmt: skip
        launch, stream = self.driver.cuLaunchKernel, self._as_stream(self.stream(device))
        (error,) = launch(function, across, down, 1, THREADS, 1, 1, 0, stream, address, 0)
        if error and int(error) in _CONTEXT_ERRORS:
            self._bind(device)
            (error,) = launch(function, across, down, 1, THREADS, 1, 1, 0, stream, address, 0)
        if error:
            raise KernelError(f"the launch of {plan.variant} failed: {error!r}")

    def _bind(self, device: int) -> None:
        """Make the device's primary context, which is torch's, this thread's current one.

        torch does this at its first CUDA call in a thread. But a thread that has only got memory
        from torch's cache has made no such call yet.
        """
        self._call("cuCtxSetCurrent", self._context(device))
        self._frame.room[2].add(device)

    def _retain(self, device: int) -> Any:
        # Never released: torch keeps it until the process ends, too.
        return self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))

    def _load(self, variant: str, device: int) -> Any:
        found = self.properties(device)
        code = self.cubin(variant, f"sm_{found.major}{found.minor}")
        # While a stream of this thread is captured into a graph, loading is only allowed in
        # relaxed mode. It does not become a part of the graph.
        relaxed = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = self._call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            module = self._call("cuModuleLoadData", code)
            name = plans.entry_point(variant).encode()
            return self._call("cuModuleGetFunction", module, name)
        finally:
            self.driver.cuThreadExchangeStreamCaptureMode(before)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Return what a function of the driver returns; raise `KernelError` for an error."""
        error, *values = getattr(self.driver, name)(*arguments)
        if error:
            raise KernelError(f"{name} failed: {error!r}")
        return values[0] if values else None
