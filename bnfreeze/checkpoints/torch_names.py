"""The names that occur in what torch.save writes, as torch's own `weights_only` allows them.

They are kept as text, so that torch is not needed. A test compares them with torch's list.
"""

from __future__ import annotations

from typing import Final

from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES

__all__ = ["DTYPES", "STORAGES", "TORCH_NAMES"]

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

# What builds a tensor out of a storage, or out of another tensor.
_TENSOR_BUILDERS: Final = frozenset(
    {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._tensor._rebuild_from_type_v2",
    }
)

TORCH_NAMES: Final = (
    frozenset(
        {
            "collections.OrderedDict",
            "collections.Counter",
            "builtins.set",
            "builtins.bytearray",
            "builtins.complex",
            "_codecs.encode",
            "torch.Size",
            "torch.Tensor",
            "torch.device",
            "torch.nn.parameter.Parameter",
            "torch.serialization._get_layout",
            "torch._utils._rebuild_sparse_tensor",
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_wrapper_subclass",
            "torch._utils._rebuild_device_tensor_from_numpy",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            "torch.per_tensor_affine",
            "torch.per_tensor_symmetric",
            "torch.per_channel_affine",
            "torch.per_channel_symmetric",
            "torch.per_channel_affine_float_qparams",
        }
    )
    | _TENSOR_BUILDERS
    | STORAGES.keys()
    | DTYPES.keys()
)
