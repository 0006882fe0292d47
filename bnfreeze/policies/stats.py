"""The policy ``stats``: the running statistics do not change; train mode uses the batch's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from bnfreeze.errors import PolicyError
from bnfreeze.norm_layers import statistics_in
from bnfreeze.policies.class_swap import FrozenLayer
from bnfreeze.torch_private import _BatchNorm


class BatchOnly(FrozenLayer, _BatchNorm):
    """Torch's own batch norm. In train mode its forward does not get the statistics at all."""

    prefix: ClassVar[str] = "FixedStats"

    def forward(self, input: Tensor) -> Tensor:
        """As before; the statistics are read in eval mode, and never written."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean = None if self.training else self.running_mean
        var = None if self.training else self.running_var
        batch = self.training or (mean is None and var is None)
        return nn.functional.batch_norm(
            input, mean, var, self.weight, self.bias, batch, 0.0, self.eps
        )


class OnCopies(FrozenLayer):
    """Runs the layer's own forward, and its own ``train``, on copies of its statistics.

    So they stay as they are whatever these do: write in place, assign, or ignore the layer's mode
    and ``track_running_stats``. Do not run the same layer in several threads at once.
    """

    prefix: ClassVar[str] = "FixedStats"

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse: torch.jit.script calls this, and cannot compile such a forward.

        Raises:
            PolicyError: what to do instead.
        """
        raise PolicyError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script. Use torch.jit.trace or "
            f"torch.export.export; or unfreeze first: a scripted copy is not frozen anyway."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before, but the forward sees copies of the statistics."""
        with self._copies(next((arg for arg in args if isinstance(arg, Proxy)), None)):
            return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """As before, but it sees copies: a ghost batch norm averages its statistics there."""
        with self._copies():
            return super().train(mode)

    @contextlib.contextmanager
    def _copies(self, traced: Proxy | None = None) -> Iterator[None]:
        kept = [(holder, name, holder[name]) for holder, name in statistics_in(self)]
        try:
            for holder, name, tensor in kept:
                # torch.fx knows a tensor by its place; the graph has to make the copy, too.
                holder[name] = (
                    tensor.detach().clone()
                    if traced is None
                    else traced.tracer.create_proxy("call_function", torch.clone, (tensor,), {})
                )
            yield
        finally:
            for holder, name, tensor in kept:
                holder[name] = tensor
