"""Putting back everything that freezing, or ``model.train()``, may change on modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from bnfreeze.norm_layers import STATISTICS


@contextlib.contextmanager
def transaction(modules: Iterable[nn.Module], *, keep: bool = True) -> Iterator[None]:
    """Undo on an error everything that is changed on the modules inside the block.

    Args:
        modules: all of the model's.
        keep: False to undo it also if there was no error.
    """
    before = [_saved(module) for module in modules]
    done = False
    try:
        yield
        done = keep
    finally:
        if not done:
            for put_back in before:
                put_back()


def _saved(module: nn.Module) -> Callable[[], None]:
    """What puts back the module's class, attributes, flags, gradients and dtypes of statistics."""
    kind, attributes = type(module), dict(module.__dict__)
    parameters = [
        (p, p.requires_grad, p.grad) for p in module._parameters.values() if p is not None
    ]
    buffers = module.named_buffers(recurse=False)
    statistics = [(buffer, buffer.data) for name, buffer in buffers if name in STATISTICS]

    def put_back() -> None:
        if type(module) is not kind:
            module.__class__ = kind
        for name in module.__dict__.keys() - attributes.keys():
            del module.__dict__[name]
        module.__dict__.update(attributes)
        for parameter, flag, grad in parameters:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
            if parameter.grad is not grad:
                parameter.grad = grad
        for buffer, data in statistics:
            if buffer.dtype is not data.dtype:
                buffer.data = data

    return put_back
