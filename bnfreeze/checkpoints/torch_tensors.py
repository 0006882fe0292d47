"""What the calls in a torch pickle describe: storages and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from bnfreeze.checkpoints.limits import (
    MAX_DIMENSIONS,
    MAX_OPCODES,
    MAX_TENSORS,
    check_limit,
    is_shape,
    is_size,
)
from bnfreeze.checkpoints.pickles import (
    Call,
    Global,
    Pairs,
    Unneeded,
    check_nesting,
    read_pickle,
)
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    Record,
    StoredTensor,
    StridedTensor,
    Words,
)
from bnfreeze.checkpoints.torch_names import ALLOWED, DTYPES, STORAGES
from bnfreeze.errors import CorruptCheckpointError, UnsafeCheckpointError, UnsupportedFormatError

__all__ = ["DescribedTensor", "Storage", "read_torch_pickle", "refused_with_advice"]


class Storage:
    """A storage that the pickle refers to, and the dtype that it says it has."""

    __slots__ = ("dtype", "record")

    def __init__(self, record: Record, dtype: str) -> None:
        self.record = record
        self.dtype = dtype


class DescribedTensor(StoredTensor):
    """A tensor of which the description is read, and not the values."""

    has_values = False

    def __init__(self, dtype: str, shape: tuple[int, ...], why: str) -> None:
        self.dtype = dtype
        self.shape = shape
        self.why = why

    def storage(self) -> tuple[object, int]:
        """Nothing, of no bytes."""
        return self, 0

    def words(self) -> Words:
        """There are none.

        Raises:
            UnsupportedFormatError: always.
        """
        raise UnsupportedFormatError(f"A tensor cannot be read: {self.why}.")


def read_torch_pickle(
    data: bytes, find: Callable[[str, int, int], Record], *, start: int = 0
) -> tuple[Any, int]:
    """Describe what a pickle of torch.save would build, with a `StoredTensor` for each tensor.

    Args:
        data: the bytes.
        find: is given a storage's key, the bytes that it is said to have, and an element's;
            gives back its record, or raises CorruptCheckpointError.
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
        self._dtypes: dict[str, str] = {}
        self._builders: Mapping[str, Callable[[tuple[Any, ...]], object]] = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._utils._rebuild_meta_tensor_no_storage": _meta,
            "torch._utils._rebuild_qtensor": self._quantised,
            "torch._utils._rebuild_sparse_tensor": _sparse,
            "torch._utils._rebuild_wrapper_subclass": _wrapper,
            "torch._utils._rebuild_device_tensor_from_numpy": _elsewhere,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": _elsewhere,
            _FROM_TYPE: self._inner,
            "torch.nn.parameter.Parameter": _parameter,
            "torch.Tensor": _constructed,
            "torch.Size": _size,
            "collections.OrderedDict": self._ordered,
            "collections.Counter": self._counter,
        }

    def called(self, call: Call) -> object:
        """What a call gives: a tensor, a dict, or, of no interest here, the call itself."""
        builder = self._builders.get(call.name)
        if builder is None:
            return call
        try:
            made = builder(call.arguments)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise CorruptCheckpointError(
                f"Damaged: {call.name} is called with arguments that it does not take."
            ) from None
        if isinstance(made, StoredTensor):
            self._tensors += 1
            check_limit(self._tensors, MAX_TENSORS, "tensors")
        return made

    def storage(self, key: object) -> Storage:
        """The storage that a persistent id means."""
        if type(key) is not tuple or len(key) < 5 or key[0] not in ("storage", b"storage"):
            raise CorruptCheckpointError(
                "Damaged: its pickle refers to something that is no storage."
            )
        kind, name, count = key[1], key[2], key[4]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or type(name) is not str or not is_size(count):
            raise CorruptCheckpointError("Damaged: a storage without kind, key or size.")
        if len(key) > 5 and key[5] is not None:
            raise UnsupportedFormatError(
                "Storages that are views of others, as torch 0.1 wrote them."
            )
        # torch 2.10 takes the first for all, 2.15 does not; several are written of empty ones.
        first = self._dtypes.setdefault(name, dtype) if count else dtype
        if first != dtype:
            raise CorruptCheckpointError(
                f"Ambiguous: a storage is said to hold {first} here and {dtype} there."
            )
        return Storage(self._find(name, count * ITEM_SIZES[dtype], ITEM_SIZES[dtype]), dtype)

    def _tensor(self, arguments: tuple[Any, ...]) -> StoredTensor:
        storage, offset, shape, stride = _view(arguments)
        tensor = StridedTensor(storage.dtype, tuple(shape), tuple(stride), storage.record, offset)
        return _flagged(tensor, arguments[6:7])

    def _tensor_v3(self, arguments: tuple[Any, ...]) -> StoredTensor:
        storage, offset, shape, stride = _view(arguments)
        dtype = DTYPES[arguments[6].name]
        tensor = StridedTensor(dtype, tuple(shape), tuple(stride), storage.record, offset)
        return _flagged(tensor, arguments[7:8])

    def _quantised(self, arguments: tuple[Any, ...]) -> StoredTensor:
        tensor = self._tensor(arguments[:4])
        return DescribedTensor(tensor.dtype, tensor.shape, "it is quantised")

    def _inner(self, arguments: tuple[Any, ...]) -> object:
        """A tensor with attributes of its own: the tensor."""
        function, _, inner, state = arguments
        # One inside another is nothing that torch writes, and could be nested without end.
        if function.name not in self._builders or function.name == _FROM_TYPE:
            raise ValueError
        _check_attributes(state)
        return self.called(Call(function.name, inner))

    def _ordered(self, arguments: tuple[Any, ...]) -> Pairs:
        given = arguments[0] if arguments else []
        pairs = given.pairs if isinstance(given, Pairs) else given
        # A few opcodes can ask for a long list to be copied again and again.
        self._copied += len(pairs)
        check_limit(self._copied, MAX_OPCODES, "copied entries")
        return Pairs([(key, value) for key, value in pairs])

    def _counter(self, arguments: tuple[Any, ...]) -> Pairs:
        if arguments and not isinstance(arguments[0], Pairs):
            raise TypeError
        return self._ordered(arguments)


_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"
# Attributes of a tensor that stand for its values: to set one is to write others.
_VALUES: Final = frozenset({"data", "real", "imag"})


def _check_attributes(state: object) -> None:
    """Refuse attributes that would give a tensor other values than its storage has.

    Raises:
        ValueError: they do, or are no attributes.
    """
    for part in state if type(state) is tuple else (state,):
        if part is not None and (
            not isinstance(part, Pairs) or not _VALUES.isdisjoint(part.named())
        ):
            raise ValueError


def _view(arguments: tuple[Any, ...]) -> tuple[Storage, Any, Any, Any]:
    """The storage, offset, shape and stride of a tensor."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise TypeError
    return storage, offset, shape, stride


def _flagged(tensor: StoredTensor, flags: tuple[Any, ...]) -> StoredTensor:
    """The tensor; of a conjugated or negated view, whose stored values are others, no values."""
    flag = flags[0] if flags else None
    if flag is None or (isinstance(flag, Pairs) and not flag.pairs):
        return tensor
    return DescribedTensor(tensor.dtype, tensor.shape, "it is a conjugated or negated view")


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    """The tensor of a parameter."""
    tensor: object = arguments[0]
    if not isinstance(tensor, StoredTensor):
        raise TypeError
    # Of _rebuild_parameter_with_state; the others have no fourth.
    _check_attributes(arguments[3] if len(arguments) > 3 else None)
    return tensor


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # Not a list: what is put into that later would change the size.
    if type(arguments[0]) is not tuple:
        raise TypeError
    return arguments[0]


def _meta(arguments: tuple[Any, ...]) -> DescribedTensor:
    return _described(arguments[0], arguments[1], "it was saved without values")


def _wrapper(arguments: tuple[Any, ...]) -> DescribedTensor:
    return _described(arguments[1], arguments[2], "its class keeps its values in a way of its own")


def _elsewhere(arguments: tuple[Any, ...]) -> DescribedTensor:
    return _described(arguments[1], arguments[0].shape, "it lay on a device of another kind")


def _sparse(arguments: tuple[Any, ...]) -> DescribedTensor:
    indices_and_values = [part for part in arguments[1] if isinstance(part, StoredTensor)]
    shapes = [part for part in arguments[1] if type(part) is tuple]
    return DescribedTensor(indices_and_values[-1].dtype, _sizes(shapes[0]), "it is sparse")


def _constructed(_: tuple[Any, ...]) -> object:
    """A tensor of a list or of nothing, which torch never writes."""
    raise ValueError


def _described(dtype: Any, shape: Any, why: str) -> DescribedTensor:
    return DescribedTensor(DTYPES[dtype.name], _sizes(shape), why)


def _sizes(shape: Any) -> tuple[int, ...]:
    check_limit(len(shape), MAX_DIMENSIONS, "dimensions of a tensor")
    if not is_shape(shape):
        raise ValueError
    return tuple(shape)


def refused_with_advice(refusal: UnsafeCheckpointError) -> UnsafeCheckpointError:
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
    return UnsafeCheckpointError(f"{refusal} {what}")
