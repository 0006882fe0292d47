"""One arm in one case of the work `layer`, ready to be called."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.setting import autocast


@dataclass(frozen=True)
class Call:
    """A layer with the inputs on which it is called."""

    layer: nn.Module
    inputs: list[tuple[Tensor, Tensor]]
    wanted: list[Tensor]
    precision: str
    grads: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def forward(self, number: int = 0) -> Tensor:
        x, residual = self.inputs[number % len(self.inputs)]
        with autocast(self.precision, x.device):
            return self.layer(x, residual)

    def backward(self, out: Tensor, number: int = 0, retain: bool = False) -> tuple[Tensor, ...]:
        x, residual = self.inputs[number % len(self.inputs)]
        inputs = [x, residual] if residual.requires_grad else [x]
        if out.dtype not in self.grads:  # which differs from arm to arm
            self.grads[out.dtype] = torch.randn_like(out)
        return torch.autograd.grad(
            out, [*inputs, *self.wanted], self.grads[out.dtype], retain_graph=retain or None
        )
