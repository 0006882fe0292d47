"""What the calls in a torch pickle describe: storages and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bnfreeze.checkpoint.limits import (
    MAX_DIMENSIONS,
    MAX_OPCODES,
    MAX_TENSORS,
    check_limit,
    is_size,
)
from bnfreeze.checkpoint.pickles import (
    Call,
    Global,
    Pairs,
    Unneeded,
    check_nesting,
    read_pickle,
)
from bnfreeze.checkpoint.tensors import (
    ITEM_SIZES,
    Record,
    StoredTensor,
    StridedTensor,
    Words,
)
from bnfreeze.checkpoint.torch_names import ALLOWED, DTYPES, STORAGES
from bnfreeze.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedFormat

__all__ = ["MetaTensor", "Storage", "read_torch_pickle", "refused_with_advice"]


class Storage:
    """A storage that the pickle refers to, and the dtype that it says it has."""

    __slots__ = ("dtype", "record")

    def __init__(self, record: Record, dtype: str) -> None:
        self.record = record
        self.dtype = dtype


class MetaTensor(StoredTensor):
    """A tensor that was saved from the meta device: it has a shape and no values."""

    has_values = False

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape

    def storage(self) -> tuple[object, int]:
        """Nothing, of no bytes."""
        return self, 0

    def words(self) -> Words:
        """There are none.

        Raises:
            UnsupportedFormat: always.
        """
        raise UnsupportedFormat("A tensor was saved from the meta device, without its values.")


def read_torch_pickle(
    data: bytes, find: Callable[[str, int, int], Record], *, start: int = 0
) -> tuple[Any, int]:
    """Describe what a pickle of torch.save would build, with a `StoredTensor` for each tensor.

    Args:
        data: the bytes.
        find: is given a storage's key, the bytes that it is said to have, and an element's;
            gives back its record, or raises CorruptCheckpoint.
        start: where the pickle begins.

    Returns:
        what it would build, and the position after it.

    Raises:
        CheckpointError: as `read_pickle`.
    """
    reader = _Reader(find)
    root, end = read_pickle(
        data, ALLOWED, start=start, call=reader.called, persistent=reader.storage
    )
    check_nesting(root)
    return root, end


class _Reader:
    def __init__(self, find: Callable[[str, int, int], Record]) -> None:
        self._find = find
        self._tensors = 0
        self._copied = 0
        self._builders: Mapping[str, Callable[[tuple[Any, ...]], object]] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._utils._rebuild_meta_tensor_no_storage": _meta,
            "torch._tensor._rebuild_from_type_v2": self._inner,
            "torch.nn.parameter.Parameter": _first,
            "torch.Size": _first,
            "collections.OrderedDict": self._ordered,
        }

    def called(self, call: Call) -> object:
        """What a call gives: a tensor, a dict, or, of no interest here, the call itself."""
        builder = self._builders.get(call.name)
        if builder is None:
            return call
        try:
            made = builder(call.arguments)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise CorruptCheckpoint(
                f"Damaged: {call.name} is called with arguments that it does not take."
            ) from None
        if made is None:
            return call
        if isinstance(made, StoredTensor):
            self._tensors += 1
            check_limit(self._tensors, MAX_TENSORS, "tensors")
        return made

    def storage(self, key: object) -> Storage:
        """The storage that a persistent id means."""
        if type(key) is not tuple or len(key) < 5 or key[0] not in ("storage", b"storage"):
            raise CorruptCheckpoint("Damaged: its pickle refers to something that is no storage.")
        kind, name, count = key[1], key[2], key[4]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or type(name) is not str or not is_size(count):
            raise CorruptCheckpoint("Damaged: a storage without kind, key or size.")
        if len(key) > 5 and key[5] is not None:
            raise UnsupportedFormat("Storages that are views of others, as torch 0.1 wrote them.")
        return Storage(self._find(name, count * ITEM_SIZES[dtype], ITEM_SIZES[dtype]), dtype)

    def _tensor(self, arguments: tuple[Any, ...]) -> StoredTensor | None:
        storage, offset, shape, stride = _view(arguments)
        # The values of a conjugated or negated view are not the ones that are stored.
        if len(arguments) > 6 and isinstance(arguments[6], Pairs) and arguments[6].pairs:
            return None
        return StridedTensor(storage.dtype, tuple(shape), tuple(stride), storage.record, offset)

    def _tensor_v3(self, arguments: tuple[Any, ...]) -> StoredTensor | None:
        storage, offset, shape, stride = _view(arguments)
        if len(arguments) > 7 and isinstance(arguments[7], Pairs) and arguments[7].pairs:
            return None
        dtype = DTYPES[arguments[6].name]
        return StridedTensor(dtype, tuple(shape), tuple(stride), storage.record, offset)

    def _inner(self, arguments: tuple[Any, ...]) -> object:
        """A tensor with attributes of its own: the tensor."""
        function, _, inner = arguments[:3]
        # One inside another is nothing that torch writes, and could be nested without end.
        if function.name == "torch._tensor._rebuild_from_type_v2":
            return None
        return self.called(Call(function.name, inner))

    def _ordered(self, arguments: tuple[Any, ...]) -> Pairs:
        pairs = arguments[0] if arguments else []
        # A few opcodes can ask for a long list to be copied again and again.
        self._copied += len(pairs)
        check_limit(self._copied, MAX_OPCODES, "copied entries")
        return Pairs([(key, value) for key, value in pairs])


def _view(arguments: tuple[Any, ...]) -> tuple[Storage, Any, Any, Any]:
    """The storage, offset, shape and stride of a tensor."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise TypeError
    return storage, offset, shape, stride


def _first(arguments: tuple[Any, ...]) -> object:
    return arguments[0]


def _meta(arguments: tuple[Any, ...]) -> MetaTensor:
    dtype, shape = DTYPES[arguments[0].name], tuple(arguments[1])
    check_limit(len(shape), MAX_DIMENSIONS, "dimensions of a tensor")
    if not all(map(is_size, shape)):
        raise ValueError
    return MetaTensor(dtype, shape)


def refused_with_advice(refusal: UnsafeCheckpoint) -> UnsafeCheckpoint:
    """The refusal of a torch pickle, with the way out where the file itself may be honest."""
    if not isinstance(refusal, Unneeded):
        return refusal
    is_model = any(name.startswith("torch.nn.modules.") for name in refusal.names)
    what = (
        "It holds a whole model, and loading that runs the code it was written with. Where you "
        "trust it, load the model there and save its values alone: "
        "torch.save(model.state_dict(), 'weights.pt')."
        if is_model
        else "It holds more than tensors. Where you trust it, load it yourself and save the "
        "values alone: torch.save(checkpoint['state_dict'], 'weights.pt')."
    )
    return UnsafeCheckpoint(f"{refusal} {what}")
