"""Zip files of torch: of torch.save since torch 1.6, of torch.jit.save and of torch.export.save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from bnfreeze.checkpoints.limits import (
    MAX_HEADER_BYTES,
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    check_limit,
    checked_shape,
)
from bnfreeze.checkpoints.pickled import SCRIPT, Content
from bnfreeze.checkpoints.reading import OpenFile, read_json
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    DescribedTensor,
    StoredTensor,
    StridedTensor,
    numbered,
)
from bnfreeze.checkpoints.torch_tensors import TorchPickleReader
from bnfreeze.errors import CorruptCheckpointError, damaged

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


def read_torchscript(file: OpenFile) -> Content:
    """The module that was saved, as a placeholder with its tensors.

    Its code entries are compressed; they are never read. What its pickle names are classes of that
    code, and not of Python: loading it calls nothing by these names.
    """
    content = read_torch_zip(file)
    return replace(
        content,
        made=tuple(made for made in content.made if not made.name.startswith(SCRIPT)),
        remarks=("TorchScript: its code was not looked at. Calling the model runs that code.",),
    )


def read_torch_zip(file: OpenFile) -> Content:
    """What was saved, with a `StoredTensor` for each tensor."""
    folders = {name.partition("/")[0] for name in file.entries}
    if "data.pkl" not in file.entries and len(folders) > 1:
        raise CorruptCheckpointError("Ambiguous: the zip file has several folders at its top.")
    pickle = file.entry("data.pkl").source
    check_limit(pickle.size, MAX_PICKLE_BYTES, "bytes of a pickle")
    order = file.entries["byteorder"].source.head(10) if "byteorder" in file.entries else b"little"
    if order not in (b"little", b"big"):
        raise damaged(f"a byte order that does not exist: {order!r}.")

    def find(key: str, size: int, _: int) -> Source:
        entry = file.entries.get(f"data/{key}")
        if entry is None:
            raise damaged(f"a tensor's storage 'data/{key:.80}' is missing.")
        if entry.source.size != size:
            raise damaged(
                f"a storage is said to have {size:,} bytes, and 'data/{key:.80}' has "
                f"{entry.size:,}."
            )
        return entry.source

    reader = TorchPickleReader(find, is_big_endian=order == b"big")
    return reader.read(Source.of(pickle.read()))


def read_export(file: OpenFile) -> Content:
    """The weights by name; of several models in one archive, each under its name.

    The graph in it is not looked at.
    """
    if _OLD in file.entries:
        # Before torch 2.8 the weights were a file of torch.save inside the archive.
        old = read_torch_zip(OpenFile(file.entry(_OLD).source))
        return replace(old, remarks=(*old.remarks, _UNSEEN))
    configs = [
        name for name in file.entries if name.startswith("data/weights/") and name.endswith(_CONFIG)
    ]
    total = sum(file.entries[name].size for name in configs)
    check_limit(total, MAX_HEADER_BYTES, "bytes of lists of weights")
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
