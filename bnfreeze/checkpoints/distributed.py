"""Folders of torch.distributed.checkpoint: `.metadata` says which bytes of which file are what.

torch reads `.metadata` with a plain `pickle.load`, which runs whatever is in it. Here it is read as
data, like any other pickle.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bnfreeze.checkpoints.limits import (
    MAX_NESTING,
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    check_limit,
    checked_shape,
    is_size,
)
from bnfreeze.checkpoints.pickled import Content, Global, Opaque, Pairs
from bnfreeze.checkpoints.pickles import PickleReader
from bnfreeze.checkpoints.placeholders import naming_calls
from bnfreeze.checkpoints.reading import OpenFile, path_beside
from bnfreeze.checkpoints.source import FilePath, Source, opened
from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES, StoredTensor, Words
from bnfreeze.checkpoints.torch_calls import DTYPES
from bnfreeze.checkpoints.torch_zip import read_torch_zip
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError, damaged

# Classes that torch itself writes into the metadata.
_EXPECTED: Final = frozenset(
    f"torch.distributed.checkpoint.{module}.{name}"
    for module, names in {
        "metadata": "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties "
        "ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        "filesystem": "_StorageInfo _StoragePrefix",
    }.items()
    for name in names.split()
)
_BYTES: Final = "torch.distributed.checkpoint.metadata.BytesStorageMetadata"
_MOST_FIELDS: Final = 20

# For each piece of a tensor, by name and offset: the bytes that hold it, a file of torch.save.
_Places = dict[tuple[str, tuple[int, ...] | None], Source]


def read_distributed(folder: FilePath) -> Content:
    """What was saved, nested as it was, with a `StoredTensor` for each tensor.

    There may be thousands of files, a few for each rank: none of them stays open.

    Args:
        folder: where `.metadata` and the files beside it lie.

    Raises:
        CheckpointError: refused, or the folder's parts contradict each other.
    """
    with opened(folder / ".metadata") as source:
        content = PickleReader().read(source)
    made = [made for made in content.made if made.name not in _EXPECTED]
    with naming_calls(made):
        return Content(_tree(content.root, folder, made), tuple(made))


def _tree(root: Any, folder: FilePath, made: list[Opaque]) -> dict[str, Any]:
    """What the metadata describe, in nested dicts; `made` gets what the objects in it make."""
    parts = ("state_dict_metadata", "storage_data", "planner_data")
    tensors, storage, planner = _fields(root, "Metadata", *parts)
    if not isinstance(tensors, Pairs) or not isinstance(storage, Pairs):
        raise damaged("its metadata lacks a part.")
    check_limit(len(tensors.pairs), MAX_TENSORS, "tensors")
    paths = planner.named() if isinstance(planner, Pairs) else {}
    places = _places(storage, folder)
    tree: dict[str, Any] = {}
    pieces = pickled = 0
    for name, entry in tensors.named().items():
        if isinstance(entry, Opaque) and entry.name == _BYTES:
            # An object that is no tensor, which torch unpickles without `weights_only`.
            content = read_torch_zip(OpenFile(_piece(places, name, None)))
            pickled += content.end
            check_limit(pickled, MAX_PICKLE_BYTES, "bytes of pickles")
            made += content.made
            _put(tree, paths.get(name), name, content.root)
        else:
            tensor = _tensor(name, entry, places)
            pieces += len(tensor.parts)
            check_limit(pieces, MAX_TENSORS, "pieces of tensors")
            _put(tree, paths.get(name), name, tensor)
    return tree


def _fields(made: object, kind: str, *names: str) -> list[Any]:
    """The values of these fields of an object of the class `kind`; None for one that it lacks."""
    name, state = (made.name, made.state) if isinstance(made, Opaque) else ("", None)
    if name not in _EXPECTED or not name.endswith(f".{kind}") or not isinstance(state, Pairs):
        raise damaged(f"its metadata has no {kind}.")
    # Few opcodes can give the same object to many names, and each looks through its fields.
    check_limit(len(state.pairs), _MOST_FIELDS, "fields of an object")
    return [state.named().get(name) for name in names]


def _numbers(value: Any) -> tuple[int, ...]:
    """The numbers of a `torch.Size`."""
    if isinstance(value, Opaque) and value.arguments:
        value = value.arguments[0]
    return checked_shape(value)


def _places(storage: Pairs, folder: FilePath) -> _Places:
    """Where each piece lies."""
    places: _Places = {}
    sizes: dict[str, int] = {}
    used: Counter[str] = Counter()
    for key, value in storage.pairs:
        name, offset = _fields(key, "MetadataIndex", "fqn", "offset")
        parts = ("relative_path", "offset", "length", "transform_descriptors")
        file, start, length, transforms = _fields(value, "_StorageInfo", *parts)
        if type(name) is not str or type(file) is not str:
            raise damaged("its metadata has a name that is no text.")
        if not (is_size(start) and is_size(length)):
            raise damaged("its metadata has a position that is no number.")
        if transforms:
            raise UnsupportedFormatError("Its files were transformed (compressed) when saved.")
        path = path_beside(folder, file)
        if file not in sizes:
            with opened(path) as source:
                sizes[file] = source.size
        if start + length > sizes[file]:
            raise CorruptCheckpointError(
                f"Damaged or truncated: {file:.80} should reach to byte {start + length:,}, "
                f"and has {sizes[file]:,}."
            )
        # So that a few bytes cannot stand for many pieces.
        used[file] += length
        if used[file] > sizes[file]:
            raise damaged(f"pieces overlap in {file:.80}.")
        place = None if offset is None else _numbers(offset)
        places[name, place] = Source(path, start, length)
    return places


def _piece(places: _Places, name: str, offsets: tuple[int, ...] | None) -> Source:
    if (name, offsets) not in places:
        raise damaged(f"a piece of {name!r:.200} is missing.")
    return places[name, offsets]


def _tensor(name: str, entry: object, places: _Places) -> _PiecedTensor:
    parts = ("properties", "chunks", "size")
    properties, chunks, size = _fields(entry, "TensorStorageMetadata", *parts)
    state = properties.state if isinstance(properties, Opaque) else None
    first = state[0] if type(state) is tuple and state else None
    dtype = DTYPES.get(first.name) if isinstance(first, Global) else None
    if dtype is None or type(chunks) is not list:
        raise damaged(f"its metadata does not describe {name!r:.200}.")
    shape = _numbers(size)
    pieces = []
    for chunk in chunks:
        offsets, sizes = map(_numbers, _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes"))
        source = _piece(places, name, offsets)
        if (
            not len(offsets) == len(sizes) == len(shape)
            or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True))
            or math.prod(sizes) * ITEM_SIZES[dtype] > source.size
        ):
            raise damaged(f"a piece of {name!r:.200} does not fit.")
        pieces.append((offsets, sizes, source))
    if sum(math.prod(sizes) for _, sizes, _ in pieces) != math.prod(shape):
        raise damaged(f"the pieces of {name!r:.200} do not make it up.")
    return _PiecedTensor(dtype, shape, pieces)


@dataclass(frozen=True, eq=False)
class _PiecedTensor(StoredTensor):
    """A tensor in pieces, each a file of torch.save inside another file.

    Attributes:
        parts: of each piece, where it begins in the tensor, its shape, and its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], tuple[int, ...], Source]]

    def words(self) -> Words:
        pair = (2,) if self.dtype == "complex128" else ()
        whole: Words | None = None
        for offsets, sizes, source in self.parts:
            # Read at once: to open the file for each part of it would take long.
            content = read_torch_zip(OpenFile(Source.of(source.read())))
            piece = content.root
            is_it = isinstance(piece, StoredTensor) and piece.shape == sizes
            with naming_calls(content.made):
                if not is_it or piece.dtype != self.dtype:
                    raise damaged("a file has another tensor than its metadata say.")
            words = piece.words()
            if whole is None:
                # The bytes are there: the pieces' sizes add up to the whole.
                whole = np.zeros((*self.shape, *pair), words.dtype)
                covered = np.zeros(self.shape, bool)
            at = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole[at] = words.reshape((*sizes, *pair))
            covered[at] = True
        if whole is None:
            return np.empty(0, np.uint8)
        if not covered.all():
            raise damaged("the pieces of a tensor overlap and leave gaps.")
        return whole.reshape(-1)


def _put(tree: dict[str, Any], path: object, name: str, value: Any) -> None:
    """Put something where it was in the nested dicts, as far as the metadata say."""
    keys = [name]
    if type(path) is tuple and path:
        check_limit(len(path), MAX_NESTING, "levels of nesting")
        if not all(type(key) is str or is_size(key) for key in path):
            raise damaged(f"the place of {name!r:.200} is none.")
        keys = [str(key) for key in path]
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise damaged(f"{name!r:.200} is said to lie inside a tensor.")
        tree = below
    if keys[-1] in tree:
        raise CorruptCheckpointError(f"Ambiguous: {name!r:.200} is there twice.")
    tree[keys[-1]] = value
