"""Calling ``model.train()`` or ``eval()`` for a look, and undoing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.inspection.in_memory import read_tensor, why_unreadable
from bnfreeze.norm_layers import is_norm
from bnfreeze.policies.record import record_of, set_record
from bnfreeze.policies.transaction import transaction


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Inside, modes and requires_grad are as ``model.train()`` leaves them.

    ``model.train()`` is really called, because any module may override ``train`` (mmdetection's
    ``norm_eval`` backbones do, and set requires_grad there as well), and then undone. An override
    in a module without a norm layer inside is not called: a LoRA layer, for example, merges its
    weights there. If the call raises, what it had done by then counts.
    """
    modules = list(model.modules())
    with modes_put_back(modules, True):
        for module in modules:
            if _has_own_train(module) and not any(map(is_norm, module.modules())):
                vars(module)["train"] = lambda mode=True, module=module: module
        # An error here will come again in the user's own loop; it is not reported twice.
        with contextlib.suppress(Exception):
            model.train()
        yield


@contextlib.contextmanager
def modes_put_back(
    modules: Sequence[nn.Module], mode: bool, *, buffers: bool = False
) -> Iterator[None]:
    """Undo on leaving what ``train`` and ``eval`` have done inside: flags, and bits of tensors.

    A module's own ``train`` may do more than set flags: LoRA layers merge their weights there, and
    torchvision's feature extractors change their graph. So it is called again with the mode that
    the module had.

    Args:
        modules: all of the model's, as ``model.modules()`` gives them.
        mode: what is called inside. The tensors below a module with a ``train`` of its own are put
            back if it has another mode.
        buffers: put back all buffers; and modules without a ``train`` of their own keep what the
            forwards inside have left on them.
    """
    flags = [(module, module.training, record_of(module)) for module in modules]
    own = [(module, flag) for module, flag, _ in flags if _has_own_train(module)]
    below = {id(inner) for module, _ in own for inner in module.modules()}
    switched = {id(inner) for module, flag in own if flag is not mode for inner in module.modules()}
    owners: list[tuple[nn.Module, dict[str, Any]]] = [
        (module, owner) for module in modules for owner in (module._parameters, module._buffers)
    ]
    held = [
        (owner, name, tensor)
        for module, owner in owners
        for name, tensor in owner.items()
        # Not a shard of FSDP2.
        if (id(module) in switched and type(tensor) in (Tensor, nn.Parameter))
        or (buffers and owner is module._buffers and tensor is not None)
    ]
    values = [None if why_unreadable(tensor) else tensor.detach().clone() for _, _, tensor in held]
    # What a forward leaves on a module stays there: a lazy layer gets its class, for example.
    undone = [module for module in modules if not buffers or id(module) in below]
    with transaction(undone, keep=False):
        try:
            yield
        finally:
            for module, flag in own:  # outer modules first, as their train() sets inner flags
                if module.training is not flag:
                    with contextlib.suppress(Exception):
                        module.train(flag)
            for module, flag, record in flags:
                if module.training is not flag:
                    module.training = flag  # a scripted module keeps it elsewhere
                if record_of(module) is not record:
                    set_record(module, record)
            with torch.no_grad():
                for (owner, name, tensor), before in zip(held, values, strict=True):
                    if owner.get(name) is not tensor:
                        owner[name] = tensor
                    if before is not None and not torch.equal(_bytes(tensor), _bytes(before)):
                        tensor.copy_(before)


def _bytes(tensor: Tensor) -> Tensor:
    return read_tensor(tensor).reshape(-1).view(torch.uint8)


def _has_own_train(module: nn.Module) -> bool:
    # torch's own, such as that of DistributedDataParallel, set flags and nothing else.
    home = getattr(module.train, "__module__", None) or ""
    return home.partition(".")[0] != "torch"
