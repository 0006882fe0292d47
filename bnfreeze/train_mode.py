"""Which mode each module will be in once ``model.train()`` has been called."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

__all__ = ["training_flags"]


def training_flags(model: nn.Module) -> dict[int, bool]:
    """By module identity, the training flag that ``model.train()`` would leave.

    The model is asked by calling it, because any module may override ``train`` (mmdetection's
    ``norm_eval`` backbones do, and set requires_grad there as well). The flags that the call
    changed are put back. A model that refuses to be switched keeps the flags that it has.
    """
    modules = list(model.modules())
    # Of a frozen layer, the record remembers the mode last asked for.
    kept: list[dict[str, Any]] = [
        {key: m.__dict__[key] for key in ("training", "_bnfreeze") if key in m.__dict__}
        for m in modules
    ]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.suppress(NotImplementedError):  # what torch.export gives back refuses
        model.train()
    flags = {id(module): module.training for module in modules}
    for module, attributes in zip(modules, kept, strict=True):
        module.__dict__.update(attributes)
    for parameter, flag in required:
        if parameter.requires_grad is not flag:
            parameter.requires_grad_(flag)
    return flags
