"""Whole models in a pickle: names, tensors and settings, from what their modules hold as data.

A `torch.nn.Module` is pickled as its `__dict__`, with `_parameters`, `_buffers` and `_modules` in
it. TorchScript writes the attributes of a module themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from bnfreeze.checkpoints.limits import (
    MAX_NAME_LENGTH,
    MAX_NESTING,
    MAX_OPCODES,
    MAX_TENSORS,
    check_limit,
)
from bnfreeze.checkpoints.pickled import HOLDERS, SCRIPT, Opaque, Pairs, key_text, tensor_in
from bnfreeze.checkpoints.stored_tensor import StoredTensor

_PARTS: Final = ("_parameters", "_buffers", "_modules")
_UNSAVED: Final = "_non_persistent_buffers_set"
_STATISTICS: Final = frozenset({"running_mean", "running_var"})
# What TorchScript puts between the parts of a name to keep names apart.
_MANGLED: Final = re.compile(r"___torch_mangle_\d+\.")
# Where bnfreeze notes what it froze.
_RECORD: Final = "_bnfreeze"


@dataclass(frozen=True)
class LayerSettings:
    """What a whole model in a file says about a norm layer, beyond its tensors.

    Attributes:
        class_name: the qualified name of its class; of a layer that bnfreeze froze, the class that
            it had before.
        eps: None where it is not said.
        momentum: None where it is not said.
        training: the flag it was saved with; None where it is not said.
        frozen_by: ``"bnfreeze"`` for a layer that was frozen when it was saved; else empty.
        in_graph: whether it was exported (ONNX, TorchScript), and runs as it was then.
    """

    class_name: str
    eps: float | None = None
    momentum: float | None = None
    training: bool | None = None
    frozen_by: str = ""
    in_graph: bool = False


@dataclass
class Model:
    """What a whole model holds.

    Attributes:
        tensors: by name, as its `state_dict` would have them.
        layers: the settings of its norm layers, by name.
        visited: the identities of its modules.
        besides: what its modules hold beside tensors and modules, by dotted name.
        looked: how many entries of modules were looked through, for this one and those before it.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    layers: dict[str, LayerSettings] = field(default_factory=dict)
    visited: set[int] = field(default_factory=set)
    besides: list[tuple[str, Any]] = field(default_factory=list)
    looked: int = 0


def is_module(value: object) -> bool:
    """Whether the value is a placeholder of a module, or a module's `__dict__`."""
    if not isinstance(value, (Opaque, Pairs)):
        return False
    if _is_script(value):
        return isinstance(value.state, Pairs)
    attributes = value.attributes()
    return all(isinstance(attributes.get(part), (Pairs, Opaque)) for part in _PARTS)


def model_of(root: Opaque | Pairs, looked: int) -> Model:
    """The tensors of a module and of all that are in it, in the order of its `state_dict`.

    Args:
        root: the module.
        looked: how many entries of modules were looked through before, for others of the file.

    Raises:
        UnsafeCheckpointError: nested too deep, or more than the limits allow.
    """
    model = Model(looked=looked)
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    count = 0
    while waiting:
        name, module, depth = waiting.pop()
        # A module may be in several others, and so be met more often than it is stored.
        count += 1
        check_limit(count, MAX_TENSORS, "modules")
        check_limit(depth, MAX_NESTING, "levels of modules")
        check_limit(len(name), MAX_NAME_LENGTH, "characters of a module's name")
        attributes = module.attributes()
        sizes = (_length(attributes.get(part)) for part in (*_PARTS, _UNSAVED))
        model.looked += 1 + len(attributes) + sum(sizes)
        check_limit(model.looked, MAX_OPCODES, "entries of modules")
        own, children = _parts_of(module, attributes)
        prefix = f"{name}." if name else ""
        model.tensors |= {f"{prefix}{part}": tensor for part, tensor in own.items()}
        check_limit(len(model.tensors), MAX_TENSORS, "tensors")
        if not _STATISTICS.isdisjoint(own):
            model.layers[name] = _settings(module, attributes)
        waiting += [
            (f"{prefix}{part}", child, depth + 1) for part, child in reversed(children.items())
        ]
        if id(module) not in model.visited:
            model.visited.add(id(module))
            model.besides += [
                (f"{prefix}{part}" if part else name, value)
                for part, value in _besides(module, attributes)
                if isinstance(value, HOLDERS)
            ]
    return model


def _is_script(module: Opaque | Pairs) -> TypeGuard[Opaque]:
    return isinstance(module, Opaque) and module.name.startswith(SCRIPT)


def _length(holder: object) -> int:
    content = holder.pairs if isinstance(holder, (Pairs, Opaque)) else holder
    return len(content) if isinstance(content, (list, tuple)) else 0


def _items(holder: object) -> dict[str, Any]:
    """The entries of a dict, or of a class of dict that is not interpreted."""
    pairs = holder.pairs if isinstance(holder, (Pairs, Opaque)) else []
    return {key: value for key, value in pairs if type(key) is str}


def _parts_of(
    module: Opaque | Pairs, attributes: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The tensors and the modules that a module holds directly, by name."""
    if _is_script(module):
        entries = modules = attributes
    else:
        given = attributes.get(_UNSAVED)
        unsaved = {name for name in given if type(name) is str} if type(given) is list else set()
        buffers = _items(attributes.get("_buffers"))
        entries = _items(attributes.get("_parameters")) | {
            name: value for name, value in buffers.items() if name not in unsaved
        }
        modules = _items(attributes.get("_modules"))
    found = {name: tensor_in(value) for name, value in entries.items()}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    return tensors, {name: value for name, value in modules.items() if is_module(value)}


def _besides(module: Opaque | Pairs, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What could hold another model: a list of modules that are kept out of `_modules`, say."""
    for name, value in attributes.items():
        if name not in _PARTS and not (_is_script(module) and is_module(value)):
            yield name, value
    if isinstance(module, Opaque):
        # Its class may be one of dicts or lists as well.
        yield from (("", module.arguments), ("", module.items))
        yield from ((key_text(key), value) for key, value in module.pairs)


def _settings(module: Opaque | Pairs, attributes: Mapping[str, Any]) -> LayerSettings:
    name = module.name if isinstance(module, Opaque) else ""
    training = attributes.get("training")
    return LayerSettings(
        class_name=_MANGLED.sub("", name.removeprefix(SCRIPT)),
        eps=plain_number(attributes.get("eps")),
        momentum=plain_number(attributes.get("momentum")),
        training=training if type(training) is bool else None,
        frozen_by="bnfreeze" if attributes.get(_RECORD) is not None else "",
        in_graph=_is_script(module),
    )


def plain_number(value: Any) -> float | None:
    """A setting, as far as it is a number that can be shown."""
    # JSON has neither infinity nor NaN, and no number of thousands of digits.
    return float(value) if type(value) in {int, float} and abs(value) < 1e9 else None
