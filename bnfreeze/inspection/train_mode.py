"""Which mode each module will be in once ``model.train()`` has been called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from bnfreeze.norm_layers import is_norm

__all__ = ["training_flags"]


def training_flags(model: nn.Module) -> dict[int, bool]:
    """By module identity, the training flag that ``model.train()`` would leave.

    ``model.train()`` is really called, because any module may override ``train`` (mmdetection's
    ``norm_eval`` backbones do, and set requires_grad there as well). The flags that the call
    changed are put back. An override in a module without a norm layer inside is not called: a
    LoRA layer, for example, merges its weights there. If the call raises, the flags at that moment
    count.
    """
    modules = list(model.modules())
    # Of a frozen layer, the record remembers the mode last asked for.
    kept: list[dict[str, Any]] = [
        {key: m.__dict__[key] for key in ("training", "_bnfreeze") if key in m.__dict__}
        for m in modules
    ]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        # An error here will come again in the user's own loop; it is not reported twice.
        with _without_overrides(modules), contextlib.suppress(Exception):
            model.train()
        return {id(module): module.training for module in modules}
    finally:
        for module, attributes in zip(modules, kept, strict=True):
            module.__dict__.update(attributes)
        for parameter, flag in required:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def _without_overrides(modules: list[nn.Module]) -> Iterator[None]:
    """Let no module's own ``train`` run that has no norm layer inside."""
    passed = [
        module
        for module in modules
        if type(module).train is not nn.Module.train
        and "train" not in module.__dict__
        and not any(is_norm(inner) for inner in module.modules())
    ]
    for module in passed:
        module.__dict__["train"] = lambda mode=True, module=module: module
    try:
        yield
    finally:
        for module in passed:
            del module.__dict__["train"]
