"""Which modules are norm layers, and what they are."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from bnfreeze.errors import PolicyError
from bnfreeze.patterns import MEAN_OR_VARIANCE, Pattern, hint, with_parents
from bnfreeze.torch_private import _InstanceNorm, _NormBase

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")

# torchvision.ops, detectron2 and timm name theirs FrozenBatchNorm2d and FrozenBatchNormAct2d;
# Transformers has a copy in each detection model: DetrFrozenBatchNorm2d, RTDetrFrozenBatchNorm2d.
_LOOKALIKE_NAME = re.compile(r"Frozen\w*BatchNorm", re.ASCII)

# The packages whose norm layers normalise as their mode says, and write only to their statistics.
# Their forwards are traced for the policy fused-act without asking.
KNOWN = frozenset(
    {"bnfreeze", "torch", "torchvision", "timm", "transformers", "ultralytics"}
    | {"mmcv", "mmdet", "mmpretrain", "mmseg", "detectron2", "segmentation_models_pytorch"}
)

# A flattened graph has names such as L__self___bn1_running_mean.
_MEAN_OR_VARIANCE = re.compile(rf"(?:.*[_/])?{MEAN_OR_VARIANCE}")
_STATISTIC = re.compile(r"(?:.*[_/])?(?:(?:running|moving)_\w+|num_batches_tracked)")
_OBSERVER = re.compile("Observer|FakeQuantize")

# Classes that wrap a whole model, and the attribute in which they keep it. By class name, so that
# nothing is imported.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "GradSampleModule": "_module",
    "_FabricModule": "_forward_module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


def eps_of(module: nn.Module) -> float | None:
    """The layer's eps; None if it is not known.

    Transformers' frozen batch norms have none, and compute with 1e-5.
    """
    transformers = type(module).__module__.startswith("transformers.")
    eps = getattr(module, "eps", 1e-5 if transformers else None)
    return float(eps) if isinstance(eps, int | float) else None


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the layer has running statistics now."""
    return isinstance(getattr(module, "running_mean", None), Tensor) or is_foreign(module)


def statistics_in(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the layer keeps its running statistics: each of its dicts, with a name in it.

    They are the tensors that are named so. Of a foreign norm layer all buffers count: its forward
    may write to any of them.
    """
    foreign = is_foreign(module)
    return [
        (holder, name)
        for holder in (module._buffers, module._parameters, module.__dict__)
        for name, value in holder.items()
        if isinstance(value, Tensor)
        and (_STATISTIC.fullmatch(name) or (foreign and holder is module._buffers))
    ]


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


def affine_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias, as far as the norm layer has them as parameters, or what they come from.

    Of a foreign norm layer all parameters that are no statistics: it may call them gamma.
    """
    if computed_affine(module):
        return dict(module.named_parameters())
    kept = {name for _, name in statistics_in(module)} if is_foreign(module) else None
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and (name in AFFINE if kept is None else name not in kept)
    }


def is_lazy(module: nn.Module) -> bool:
    """Whether the layer has not seen an input yet.

    It may have tensors, from `load_state_dict`; its first forward still changes its class.
    """
    return isinstance(module, LazyModuleMixin) and (
        module.cls_to_become is not None or module.has_uninitialized_params()
    )


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


def is_plain_norm(module: nn.Module) -> bool:
    """Whether the module is a norm layer whose class bnfreeze knows.

    Batch norm of every kind and any subclass; instance norm if it keeps running statistics;
    the frozen look-alikes of other libraries.
    """
    if isinstance(module, _InstanceNorm):
        has_mean = isinstance(module.running_mean, Tensor)
        return has_mean or bool(module.track_running_stats and is_lazy(module))
    return isinstance(module, _NormBase) or is_lookalike(module)


def is_foreign(module: nn.Module) -> bool:
    """Whether the module is a foreign norm layer: it keeps running statistics in a way of its own.

    Any module with a tensor such as running_mean or running_var that `is_plain_norm` does not
    know. One is enough: EvoNorm-B0 keeps only a variance. Observers of quantisation are none.
    """
    return (
        any(
            isinstance(value, Tensor) and _MEAN_OR_VARIANCE.fullmatch(name)
            for holder in (module._buffers, module._parameters, module.__dict__)
            for name, value in holder.items()
        )
        and not is_plain_norm(module)
        and not any(_OBSERVER.search(kind.__name__) for kind in type(module).__mro__)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm layer, known or foreign."""
    return is_plain_norm(module) or is_foreign(module)


def forward_owner(kind: type[nn.Module]) -> type:
    """The class that defines the forward."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def has_known_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the norm layer's forward is that of a library which is known to obey its mode.

    Args:
        module: a norm layer.
        kind: the class that it had before freezing.
    """
    owner = forward_owner(kind)
    # The function says where it was written; the class may have been patched with another's:
    # nn.BatchNorm2d.forward = mine.
    home = getattr(vars(owner)["forward"], "__module__", None) or owner.__module__
    library = home.partition(".")[0]
    known = is_lookalike(module, kind) or library in KNOWN
    return known and not is_foreign(module)


def has_replaced_forward(module: nn.Module) -> bool:
    """Whether a forward is set on the instance that is not its class's own.

    The class's own, bound to the module, is as good as none; so is a function that wraps it and
    says so by `functools.wraps`, as Accelerate's hooks do.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    inner = inspect.unwrap(forward)
    owns = [vars(base).get("forward") for base in type(module).__mro__]
    bound_to = getattr(inner, "__self__", module)
    return bound_to is not module or getattr(inner, "__func__", inner) not in owns


def is_in_graph(module: nn.Module) -> bool:
    """Whether the forward is not the module's own, but that of a graph: exported or scripted."""
    return isinstance(module, torch.fx.GraphModule | torch.jit.ScriptModule) or (
        type(module).forward is nn.Module.forward
    )


def foreign_remedy(module: nn.Module, name: str, policy: str = "eval") -> str:
    """What to do about a foreign norm layer that is not frozen."""
    if is_in_graph(module):
        return (
            "Freeze the original model, then export or script it. Of a Keras model, set "
            "layer.trainable = False."
        )
    return (
        f"Name it in a rule: freeze(model, {{{name!r}: {policy!r}}}). Or watch it with "
        f"guard(model, tensors='norm')."
    )


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

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names that a pattern may match: with the wrappers' segments, and without."""
        return self.plain_names + self.names


def named_modules(model: nn.Module) -> list[NamedModule]:
    """Every module once, in order, with all its names; a shared one has several."""
    found: dict[int, tuple[nn.Module, dict[str, str]]] = {}
    for name, plain, module in _walk(model, "", ""):
        found.setdefault(id(module), (module, {}))[1][name] = plain
    return [
        NamedModule(module, tuple(names), tuple(dict.fromkeys(names.values())))
        for module, names in found.values()
    ]


def _walk(module: nn.Module, name: str, plain: str) -> Iterator[tuple[str, str, nn.Module]]:
    """The module and all below it, each under every name, and without wrappers' segments."""
    yield name, plain, module
    kinds = [kind.__name__ for kind in type(module).__mro__]
    hidden = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
    for key, child in module._modules.items():
        if child is not None:
            shown = plain if key == hidden else f"{plain}.{key}" if plain else key
            yield from _walk(child, f"{name}.{key}" if name else key, shown)


def matching(
    modules: Sequence[NamedModule], select: str | Iterable[str], what: str = "module"
) -> list[NamedModule]:
    """Those of the modules that a pattern, or any of several, matches.

    Raises:
        PolicyError: a pattern that is malformed, or matches no such module.
    """
    patterns = [Pattern.parse(text) for text in ([select] if isinstance(select, str) else select)]
    for pattern in patterns:
        if not any(pattern.matches(*entry.all_names) for entry in modules):
            near = nearest(pattern.text, modules)
            raise PolicyError(f"Pattern {pattern.text!r} matches no {what}.{near}")
    return [entry for entry in modules if any(p.matches(*entry.all_names) for p in patterns)]


def nearest(text: str, modules: Iterable[NamedModule]) -> str:
    """Name those of the modules, or of those around them, that a pattern may have meant."""
    names = with_parents(name for entry in modules for name in entry.plain_names)
    top = list(dict.fromkeys(name.partition(".")[0] for name in names))[:6]
    there_are = " There are: " + ", ".join(map(repr, top)) + "." if top else ""
    return hint(text, names) or there_are


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
    elif isinstance(model, str | os.PathLike):
        hint = " It looks like a path: build the model and load the file into it first."
    raise TypeError(f"Expected an nn.Module, not {type(model).__name__}.{hint}")
