"""Which modules are norm layers, and what they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from bnfreeze.torch_private import _InstanceNorm, _NormBase

__all__ = [
    "AFFINE",
    "STATISTICS",
    "NamedModule",
    "check_model",
    "computed_affine",
    "eps_of",
    "is_lazy",
    "is_lookalike",
    "is_norm",
    "keeps_statistics",
    "keeps_unknown_statistics",
    "named_modules",
]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")

# torchvision.ops, detectron2 and timm name theirs FrozenBatchNorm2d and FrozenBatchNormAct2d;
# Transformers has a copy in each detection model: DetrFrozenBatchNorm2d, RTDetrFrozenBatchNorm2d.
_LOOKALIKE_NAME = re.compile(r"Frozen\w*BatchNorm", re.ASCII)

# Classes that wrap a whole model, and the attribute in which they keep it. By class name, so that
# nothing is imported.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "_FabricModule": "_forward_module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def eps_of(module: nn.Module) -> float:
    """The layer's eps. Transformers' frozen batch norms have none, and compute with 1e-5."""
    return float(getattr(module, "eps", 1e-5))


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the layer has running statistics now."""
    return isinstance(getattr(module, "running_mean", None), Tensor)


def computed_affine(module: nn.Module) -> list[str]:
    """Which of weight and bias are computed from other tensors.

    A parametrization does that, and so do pruning and wrappers that flatten parameters.
    """
    return [
        name
        for name in AFFINE
        if name not in module._parameters
        and name not in module._buffers
        and isinstance(getattr(module, name, None), Tensor)
    ]


def is_lazy(module: nn.Module) -> bool:
    """Whether the layer has not seen an input yet and so has no tensors."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def is_lookalike(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether this is a frozen batch norm of another library, recognised by name and shape.

    Args:
        module: any module.
        kind: the class to look at, if not the module's own: the one it had before freezing.
    """
    kind = kind or type(module)
    if issubclass(kind, _NormBase):
        return False
    if not any(_LOOKALIKE_NAME.search(base.__name__) for base in kind.__mro__):
        return False
    mean, var = (getattr(module, name, None) for name in STATISTICS[:2])
    return (
        isinstance(mean, Tensor)
        and isinstance(var, Tensor)
        and mean.dim() == 1
        and mean.shape == var.shape
    )


def is_norm(module: nn.Module) -> bool:
    """Whether bnfreeze treats the module as a norm layer.

    Batch norm of every kind and any subclass; instance norm if it keeps running statistics;
    the frozen look-alikes of other libraries.
    """
    if isinstance(module, _InstanceNorm):
        return keeps_statistics(module) or bool(module.track_running_stats and is_lazy(module))
    return isinstance(module, _NormBase) or is_lookalike(module)


def keeps_unknown_statistics(module: nn.Module) -> bool:
    """Whether a module that bnfreeze does not know as a norm layer keeps running statistics.

    A mean or a variance is enough: EvoNorm-B0 keeps only a variance.
    """
    buffers = {name for name, _ in module.named_buffers(recurse=False)}
    return not is_norm(module) and not buffers.isdisjoint(STATISTICS[:2])


@dataclass(frozen=True)
class NamedModule:
    """A module of a model, with every dotted name under which it is registered."""

    module: nn.Module
    names: tuple[str, ...]
    # The names as people write them: without the segments that wrappers such as
    # DistributedDataParallel and torch.compile add.
    plain_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first name, as `nn.Module.named_modules` gives it."""
        return self.names[0]


def named_modules(model: nn.Module) -> list[NamedModule]:
    """Every module once, in order, with all its names; a shared one has several."""
    names: dict[int, list[tuple[str, str]]] = {}
    modules: dict[int, nn.Module] = {}
    for name, plain, module in _walk(model):
        names.setdefault(id(module), []).append((name, plain))
        modules[id(module)] = module
    return [
        NamedModule(
            modules[key],
            tuple(dict.fromkeys(name for name, _ in pairs)),
            tuple(dict.fromkeys(plain for _, plain in pairs)),
        )
        for key, pairs in names.items()
    ]


def _walk(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    hidden: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        inner = next(
            (_WRAPPERS[b.__name__] for b in type(module).__mro__ if b.__name__ in _WRAPPERS), None
        )
        if inner is not None:
            hidden.add(f"{name}.{inner}" if name else inner)
        plain = name
        if hidden:
            segments = name.split(".")
            plain = ".".join(
                segment
                for depth, segment in enumerate(segments, 1)
                if ".".join(segments[:depth]) not in hidden
            )
        yield name, plain, module


def check_model(model: object) -> nn.Module:
    """Return `model` if it can be frozen and inspected.

    Raises:
        TypeError: not an `nn.Module`, or a TorchScript module, whose layers cannot be changed.
    """
    if isinstance(model, type):
        raise TypeError(
            f"Expected a model, not the class {model.__name__}: make an instance of it."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "A TorchScript module's layers are compiled and cannot be changed: "
            "freeze the original nn.Module, then script or trace it."
        )
    if isinstance(model, nn.Module):
        return model
    hint = ""
    if isinstance(model, dict) and any(isinstance(value, Tensor) for value in model.values()):
        hint = " It looks like a state_dict: build the model and load_state_dict() it first."
    elif model is None:
        hint = " Is there a return missing in the function that builds it?"
    raise TypeError(f"Expected an nn.Module, not {type(model).__name__}.{hint}")
