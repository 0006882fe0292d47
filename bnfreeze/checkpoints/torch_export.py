"""Archives of torch.export (`.pt2`): their weights. The graph in them is not looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.reading import OpenFile, read_json
from bnfreeze.checkpoints.stored_tensor import (
    DescribedTensor,
    StoredTensor,
    StridedTensor,
    numbered,
)
from bnfreeze.checkpoints.torch_calls import checked_shape
from bnfreeze.checkpoints.torch_zip import read_torch_zip
from bnfreeze.errors import damaged

__all__ = ["read_export"]

# The numbers that torch.export writes for dtypes.
_DTYPES: Final = numbered(
    "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool "
    "bfloat16",
    first=1,
) | numbered(
    "uint16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu uint32 uint64",
    first=28,
)
_OLD: Final = "serialized_state_dict.pt"
_CONFIG: Final = "_weights_config.json"
_UNSEEN: Final = (
    "Its graph was not looked at: if the model was in train mode when it was exported, its batch "
    "norms use the batch, and not these statistics."
)


def read_export(file: OpenFile) -> Content:
    """The weights by name; of several models in one archive, each under its name."""
    if _OLD in file.entries:
        # Before torch 2.8 the weights were a file of torch.save inside the archive.
        old = read_torch_zip(OpenFile(file.entry(_OLD).source))
        return replace(old, remarks=(*old.remarks, _UNSEEN))
    configs = [
        name for name in file.entries if name.startswith("data/weights/") and name.endswith(_CONFIG)
    ]
    check_limit(
        sum(file.entries[name].size for name in configs),
        MAX_HEADER_BYTES,
        "bytes of lists of weights",
    )
    models = {
        name.removeprefix("data/weights/").removesuffix(_CONFIG): _weights(file, name)
        for name in configs
    }
    saved = next(iter(models.values())) if len(models) == 1 else models
    return Content(saved, remarks=(_UNSEEN,))


def _weights(file: OpenFile, config: str) -> dict[str, StoredTensor]:
    text = file.entry(config).source.read()
    weights = read_json(text, "the list of weights").get("config")
    if type(weights) is not dict:
        raise damaged("the list of weights has no config.")
    check_limit(len(weights), MAX_TENSORS, "tensors")
    return {name: _tensor(file, weight) for name, weight in weights.items()}


def _tensor(file: OpenFile, weight: Any) -> StoredTensor:
    try:
        meta, name = weight["tensor_meta"], weight["path_name"]
        shape = tuple(size["as_int"] for size in meta["sizes"])
        stride = tuple(step["as_int"] for step in meta["strides"])
        dtype = _DTYPES[meta["dtype"]]
        if weight["use_pickle"]:
            return DescribedTensor(
                dtype, checked_shape(shape), "its class keeps its values in its own way"
            )
        source = file.entry(f"data/weights/{name}").source
        return StridedTensor(dtype, shape, stride, source, meta["storage_offset"]["as_int"])
    except (KeyError, TypeError, ValueError):
        raise damaged("a weight's description is none.") from None
