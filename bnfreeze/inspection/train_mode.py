"""Which mode each module will be in once ``model.train()`` has been called; and a way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.norm_layers import is_norm
from bnfreeze.policies.record import record_of, set_record

__all__ = ["modes_put_back", "training_flags"]


def training_flags(model: nn.Module) -> dict[int, bool]:
    """By module identity, the training flag that ``model.train()`` would leave.

    ``model.train()`` is really called, because any module may override ``train`` (mmdetection's
    ``norm_eval`` backbones do, and set requires_grad there as well), and then undone. An override
    in a module without a norm layer inside is not called: a LoRA layer, for example, merges its
    weights there. If the call raises, the flags at that moment count.
    """
    modules = list(model.modules())
    # An error here will come again in the user's own loop; it is not reported twice.
    with _without_overrides(modules), modes_put_back(modules, True):
        with contextlib.suppress(Exception):
            model.train()
        return {id(module): module.training for module in modules}


@contextlib.contextmanager
def modes_put_back(
    modules: Sequence[nn.Module], mode: bool, *, buffers: bool = False
) -> Iterator[None]:
    """Undo on leaving what ``train`` and ``eval`` have done inside: flags, and bits of tensors.

    A module's own ``train`` may do more than set flags: LoRA layers merge their weights, LeViT's
    attention caches a bias. So it is called again with the mode that the module had.

    Args:
        modules: all of the model's, as ``model.modules()`` gives them.
        mode: what is called inside. The tensors below a module with a ``train`` of its own are put
            back if it has another mode.
        buffers: put back all buffers.
    """
    # Of a frozen layer, the record remembers the mode last asked for.
    flags = [(module, module.training, record_of(module)) for module in modules]
    required = [(p, p.requires_grad) for module in modules for p in _parameters(module)]
    changed = {
        id(inner)
        for module, flag, _ in flags
        if flag is not mode and _overrides_train(module)
        for inner in module.modules()
    }
    holders: list[tuple[nn.Module, dict[str, Any]]] = [
        (module, holder) for module in modules for holder in (module._parameters, module._buffers)
    ]
    tensors = [
        (holder, name, tensor, None if tensor.is_meta else tensor.detach().clone())
        for module, holder in holders
        for name, tensor in holder.items()
        # Not a shard of FSDP2.
        if (id(module) in changed and type(tensor) in (Tensor, nn.Parameter))
        or (buffers and holder is module._buffers and tensor is not None)
    ]
    try:
        yield
    finally:
        for module, flag, _ in flags:  # outer modules first, as their train() sets inner flags
            if module.training is not flag and _overrides_train(module):
                with contextlib.suppress(Exception):
                    module.train(flag)
        for module, flag, record in flags:
            if module.training is not flag:
                module.training = flag
            if record_of(module) is not record:
                set_record(module, record)
        for parameter, flag in required:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)
        with torch.no_grad():
            for holder, name, tensor, before in tensors:
                # Some layers put others in their place.
                if holder.get(name) is not tensor:
                    holder[name] = tensor
                if before is not None and not torch.equal(_bytes(tensor), _bytes(before)):
                    tensor.copy_(before)


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module._parameters.values() if p is not None)


def _overrides_train(module: nn.Module) -> bool:
    # torch's own, such as that of DistributedDataParallel, set flags and nothing else.
    home = getattr(module.train, "__module__", None) or ""
    return home.partition(".")[0] != "torch"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def _without_overrides(modules: list[nn.Module]) -> Iterator[None]:
    """Let no module's own ``train`` run that has no norm layer inside."""
    passed = [
        module
        for module in modules
        if _overrides_train(module)
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
