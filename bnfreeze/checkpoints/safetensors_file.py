"""Hugging Face's files: safetensors, and the index of shards that such files are.

A safetensors file is a header of JSON that says where each tensor lies, then their bytes. An index
is a JSON file that says in which of several files each tensor lies.
"""

from __future__ import annotations

from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_HEADER_BYTES, MAX_TENSORS, check_limit, is_size
from bnfreeze.checkpoints.opening import read_file
from bnfreeze.checkpoints.pickled import Content, Opaque, Pairs, tensor_in
from bnfreeze.checkpoints.reading import OpenFile, naming_file, read_json
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    NUMPY_DTYPES,
    StoredTensor,
    packed_tensor,
)
from bnfreeze.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsupportedFormatError,
    damaged,
)

# Safetensors' names: of most, the first letter and the bits.
DTYPES: Final = {
    f"{name[0].upper()}{8 * ITEM_SIZES[name]}": name
    for name in NUMPY_DTYPES - {"bool", "complex128"}
} | {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def read_safetensors(file: OpenFile) -> Content:
    """The tensors by name, in the order in which they lie in the file.

    As the format asks for, they must lie one after the other, without a gap, to the very end.
    """
    source = file.source
    length = int.from_bytes(source.read(0, 8), "little")
    check_limit(length, MAX_HEADER_BYTES, "bytes of a safetensors header")
    header = read_json(source.read(8, length), "its header")
    metadata = header.pop("__metadata__", None)
    check_limit(len(header), MAX_TENSORS, "tensors")
    data = source.part(8 + length, source.size - 8 - length)
    places = {name: _place(description) for name, description in header.items()}
    whole = max((end for _, end in places.values()), default=0)
    if whole != data.size:
        raise damaged(f"its tensors should take {whole:,} bytes, and there are {data.size:,}.")
    position = 0
    tensors: dict[str, StoredTensor] = {}
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != position:
            raise damaged(f"{name!r:.200} does not follow the one before.")
        dtype, shape = header[name].get("dtype"), header[name].get("shape")
        if type(dtype) is not str or type(shape) is not list:
            raise damaged("its header does not describe tensors.")
        if dtype not in DTYPES:
            raise UnsupportedFormatError(f"{name!r:.200} is of dtype {dtype!r:.40}, unknown here.")
        with naming_file(f"{name!r:.200}"):
            tensors[name] = packed_tensor(DTYPES[dtype], shape, data.part(begin, end - begin))
        position = end
    if isinstance(metadata, dict):
        # save_model writes what several names share once, and notes the other names here.
        tensors |= {
            name: tensors[kept]
            for name, kept in metadata.items()
            if name not in {"format", *tensors} and type(kept) is str and kept in tensors
        }
        check_limit(len(tensors), MAX_TENSORS, "tensors")
    return Content(tensors)


def _place(description: Any) -> tuple[int, int]:
    try:
        begin, end = description["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged("its header does not describe tensors.") from None
    if not (is_size(begin) and is_size(end) and begin <= end):
        raise damaged("its header has a place that makes no sense.")
    return begin, end


def read_shards(file: OpenFile) -> Content:
    """The tensors of all shards by name, in the order of the index. The shards lie beside it."""
    check_limit(file.source.size, MAX_HEADER_BYTES, "bytes of an index")
    places = read_json(file.source.read(), "the index").get("weight_map")
    if type(places) is not dict:
        raise UnsupportedFormatError("JSON, but no index of shards: it has no weight_map.")
    check_limit(len(places), MAX_TENSORS, "tensors")
    if any(type(place) is not str for place in places.values()):
        raise damaged("the index has a shard whose name is no text.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    made: list[Opaque] = []
    seen: set[object] = set()
    for place in dict.fromkeys(places.values()):
        with naming_file(f"Shard {place}"):
            shard = file.beside(place)
            # However it is named: reading one file again and again could go on for ever.
            if shard.source.identity() in seen:
                raise CorruptCheckpointError("It is the same file as another shard.")
            seen.add(shard.source.identity())
            _, content = read_file(shard)
            root = content.root.named() if isinstance(content.root, Pairs) else content.root
            if not isinstance(root, dict):
                raise CheckpointError("It holds no tensors by name.")
            tensors = {name: tensor_in(value) for name, value in root.items()}
            shards[place] = {name: one for name, one in tensors.items() if one is not None}
            made += content.made
            check_limit(sum(map(len, shards.values())), MAX_TENSORS, "tensors")
    for name, place in places.items():
        if name not in shards[place]:
            raise CorruptCheckpointError(
                f"Shard {place}: {name!r:.200} is said to be in it, and is not."
            )
    found = {name: shards[place][name] for name, place in places.items()}
    for held in shards.values():
        for name, tensor in held.items():
            # What the index leaves out is loaded with its shard all the same.
            if found.setdefault(name, tensor) is not tensor:
                raise CorruptCheckpointError(f"Ambiguous: {name!r:.200} is in two shards.")
    return Content(found, tuple(made))
