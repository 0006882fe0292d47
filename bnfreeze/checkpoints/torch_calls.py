"""What single calls of torch's functions describe, and those that stand for other calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_NAME_LENGTH, check_limit, checked_shape
from bnfreeze.checkpoints.pickled import Global, Opaque, Pairs, check_new, tensor_in
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    DescribedTensor,
    StoredTensor,
    StridedTensor,
)

# By the name of a typed storage, the dtype of its elements.
STORAGES: Final[dict[str, str]] = {
    f"torch.{device}{name}Storage": dtype
    # Before torch 1.0 a storage on a GPU had a name of its own.
    for device in ("", "cuda.")
    for name, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "ComplexDouble": "complex128",
        "ComplexFloat": "complex64",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "QUInt8": "quint8",
        "QInt8": "qint8",
        "QInt32": "qint32",
    }.items()
    if not (device and name.startswith("Q"))
} | {"torch.storage.UntypedStorage": "uint8"}

DTYPES: Final[dict[str, str]] = {f"torch.{dtype}": dtype for dtype in ITEM_SIZES}


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage that the pickle refers to, and what it says of the numbers in it."""

    source: Source
    dtype: str
    is_swapped: bool


_FEW: Final = 16
_REBUILD: Final = re.compile(r"bnfreeze\.policies\.\w+\._rebuild")


def meaning_of(call: Opaque) -> Opaque | Global:
    """What a call stands for: a call of the class itself, or a longer name; or else itself."""
    if len(call.arguments) > _FEW:
        return call
    match call.name, call.arguments:
        # An attribute of something that is named, as a method of a class.
        case "builtins.getattr", (Global(holder), str(attribute)):
            check_limit(len(holder) + len(attribute), MAX_NAME_LENGTH, "characters of a name")
            return Global(f"{holder}.{attribute}")
        case "copyreg.__newobj__", (Global(kind), *rest):
            check_new(kind, tuple(rest))
            return Opaque(kind, tuple(rest))
        case "copyreg._reconstructor", (Global(kind), Global("builtins.object"), None):
            return Opaque(kind, ())
        # A layer that bnfreeze froze, or a block that it fused: of its class, of how it behaves,
        # and of how it was made.
        case name, (Global(kind), Global(behaviour), Global(make), tuple(given)) if (
            _REBUILD.fullmatch(name)
            and behaviour.startswith(("bnfreeze.policies.", "bnfreeze.fusion."))
            and make in ("copyreg.__newobj__", "copyreg._reconstructor")
        ):
            made = meaning_of(Opaque(make, given))
            if isinstance(made, Opaque) and made.name == kind and not made.arguments:
                return made
    return call


# Attributes of a tensor that stand for its values: to set one is to write others.
_VALUES: Final = frozenset({"data", "real", "imag"})


def check_attributes(state: object) -> None:
    """Refuse attributes that would give a tensor other values than its storage has.

    Raises:
        ValueError: they do, or are no attributes.
    """
    for part in state if type(state) is tuple else (state,):
        if part is not None and (
            not isinstance(part, Pairs) or not _VALUES.isdisjoint(part.named())
        ):
            raise ValueError


def _tensor(
    storage: object, offset: Any, shape: Any, stride: Any, *rest: object, dtype: str | None = None
) -> StoredTensor:
    """A view. Of one that is conjugated or negated there are no values: the stored are others."""
    if not isinstance(storage, Storage):
        raise TypeError
    kind, shape, stride = dtype or storage.dtype, tuple(shape), tuple(stride)
    tensor = StridedTensor(kind, shape, stride, storage.source, offset, storage.is_swapped)
    flags = rest[2] if len(rest) > 2 else None
    if flags is None or (isinstance(flags, Pairs) and not flags.pairs):
        return tensor
    return DescribedTensor(kind, shape, "it is a conjugated or negated view")


def _tensor_v3(*arguments: Any) -> StoredTensor:
    dtype = DTYPES[arguments[6].name]
    return _tensor(*arguments[:6], *arguments[7:], dtype=dtype)


def _quantised(*arguments: Any) -> StoredTensor:
    tensor = _tensor(*arguments[:4])
    return DescribedTensor(tensor.dtype, tensor.shape, "it is quantised")


def _parameter(
    tensor: object, _grad: object = None, _hooks: object = None, state: object = None
) -> StoredTensor:
    """The tensor of a parameter."""
    if not isinstance(tensor, StoredTensor):
        raise TypeError
    check_attributes(state)
    return tensor


def _size(sizes: object) -> tuple[Any, ...]:
    # Not a list: what is put into that later would change the size.
    if type(sizes) is not tuple:
        raise TypeError
    return sizes


def _described(at: int, why: str, *arguments: Any) -> DescribedTensor:
    """A tensor of which the dtype and the shape are given, from the argument at a place."""
    return DescribedTensor(DTYPES[arguments[at].name], checked_shape(arguments[at + 1]), why)


def _elsewhere(array: Any, dtype: object, *_: object) -> DescribedTensor:
    tensor: Any = tensor_in(array)
    return _described(0, "it lay on a device of another kind", dtype, tensor.shape)


def _sparse(_layout: object, parts: Any) -> DescribedTensor:
    check_limit(len(parts), _FEW, "parts of a sparse tensor")
    indices_and_values = [part for part in parts if isinstance(part, StoredTensor)]
    shapes = [part for part in parts if type(part) is tuple]
    return DescribedTensor(indices_and_values[-1].dtype, checked_shape(shapes[0]), "it is sparse")


def _constructed(*_: object) -> object:
    """A tensor of a list or of nothing, which torch never writes."""
    raise ValueError


TORCH_BUILDERS: Final[dict[str, Callable[..., object]]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_meta_tensor_no_storage": partial(
        _described, 0, "it was saved without values"
    ),
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_wrapper_subclass": partial(
        _described, 1, "its class keeps its values in a way of its own"
    ),
    "torch._utils._rebuild_device_tensor_from_numpy": _elsewhere,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _elsewhere,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Tensor": _constructed,
    "torch.Size": _size,
}

# The names of torch that occur in what torch.save writes, as torch's own `weights_only` allows
# them. They are kept as text, so that torch is not needed; a test compares them with torch's list.
TORCH_NAMES: Final = (
    TORCH_BUILDERS.keys()
    | STORAGES.keys()
    | DTYPES.keys()
    | {
        "torch._tensor._rebuild_from_type_v2",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.per_tensor_affine",
        "torch.per_tensor_symmetric",
        "torch.per_channel_affine",
        "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams",
    }
)
