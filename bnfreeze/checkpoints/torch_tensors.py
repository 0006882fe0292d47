"""What the calls in a pickle of torch or NumPy describe: storages, tensors, arrays, dicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from bnfreeze.checkpoints.code_names import is_ordinary
from bnfreeze.checkpoints.limits import (
    MAX_DIMENSIONS,
    MAX_NAME_LENGTH,
    MAX_OPCODES,
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    check_limit,
    is_shape,
    is_size,
)
from bnfreeze.checkpoints.numpy_arrays import NUMPY_BUILDERS
from bnfreeze.checkpoints.pickled import Global, Opaque, Pairs
from bnfreeze.checkpoints.pickles import Described, check_new, read_pickle
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    Record,
    StoredTensor,
    StridedTensor,
    Words,
)
from bnfreeze.checkpoints.torch_names import DTYPES, STORAGES
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["DescribedTensor", "Storage", "checked_shape", "read_torch_pickle"]


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
    source: Source,
    find: Callable[[str, int, int], Record] | None,
    *,
    start: int = 0,
    nested: Callable[[Source], Described] | None = None,
) -> Described:
    """Describe what a pickle would build, with a `StoredTensor` for each tensor and array.

    Args:
        source: the bytes.
        find: is given a storage's key, the bytes that it is said to have, and an element's;
            gives back its record, or raises CorruptCheckpointError. None where the pickle
            cannot refer to storages.
        start: where the pickle begins.
        nested: reads the file of torch.save that stands for a storage where a tensor was pickled
            without torch.save.

    Raises:
        CheckpointError: as `read_pickle`.
    """
    reader = _Reader(find, nested)
    described = read_pickle(
        source, start=start, call=reader.called, persistent=reader.referred if find else None
    )
    return replace(described, made=(*described.made, *reader.called_besides.values()))


class _Reader:
    def __init__(
        self,
        find: Callable[[str, int, int], Record] | None,
        nested: Callable[[Source], Described] | None,
    ) -> None:
        self._find = find
        self._nested = nested
        self._tensors = 0
        self._copied = 0
        self._copied_bytes = 0
        self._nested_bytes = 0
        self._storages: dict[int, tuple[object, Storage]] = {}
        self._dtypes: dict[str, str] = {}
        # What would be called by a call that is harmless by itself.
        self.called_besides: dict[str, Opaque] = {}
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
            "torch.storage._load_from_bytes": self._storage_of_bytes,
            "collections.OrderedDict": self._ordered,
            "collections.Counter": self._counter,
            "collections.defaultdict": lambda arguments: self._ordered(arguments[1:]),
            "collections.deque": self._list,
            "builtins.list": self._list,
            "builtins.set": self._list,
            "builtins.frozenset": self._list,
            "builtins.tuple": lambda arguments: tuple(self._list(arguments)),
            "builtins.dict": self._ordered,
            "builtins.bytearray": self._bytes,
            "builtins.getattr": _attribute,
            "_codecs.encode": self._bytes,
            **NUMPY_BUILDERS,
        }

    def called(self, call: Opaque) -> object:
        """What a call gives: a tensor, a dict, or, where it is not interpreted, the call itself."""
        call = _object_of(call) or call
        if is_ordinary(call.name):
            # Such a call may call what it is given: `collections.defaultdict(os.system)`.
            self._charge(len(call.arguments))
            for argument in call.arguments:
                if isinstance(argument, Global) and not is_ordinary(argument.name):
                    self.called_besides.setdefault(argument.name, Opaque(argument.name, ()))
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
        return call if made is None else made

    def referred(self, key: object) -> object:
        """What a persistent id means: a storage, or a class of modules with its source code."""
        if type(key) is tuple and len(key) == 4 and key[0] == "module":
            if not isinstance(key[1], Global):
                raise CorruptCheckpointError("Damaged: a class of modules that is none.")
            return key[1]
        return self._storage(key)

    def _storage(self, key: object) -> Storage:
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
        assert self._find is not None
        return Storage(self._find(name, count * ITEM_SIZES[dtype], ITEM_SIZES[dtype]), dtype)

    def _storage_of_bytes(self, arguments: tuple[Any, ...]) -> Storage:
        """The storage in a whole file of torch.save, as `pickle.dump` of a tensor has it."""
        (data,) = arguments
        # Many calls may be given the same bytes.
        if id(data) in self._storages:
            return self._storages[id(data)][1]
        if self._nested is None:
            raise ValueError
        described = self._nested(Source.of(data) if type(data) is bytes else data)
        self._nested_bytes += described.end
        check_limit(self._nested_bytes, MAX_PICKLE_BYTES, "bytes of pickles in a pickle")
        if not isinstance(described.root, Storage):
            raise TypeError
        self.called_besides |= {made.name: made for made in described.made}
        self._storages[id(data)] = (data, described.root)
        return described.root

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
        return self.called(Opaque(function.name, inner))

    def _ordered(self, arguments: tuple[Any, ...]) -> Pairs:
        given = arguments[0] if arguments else []
        pairs = given.pairs if isinstance(given, Pairs) else given
        # A few opcodes can ask for a long list to be copied again and again.
        self._charge(len(pairs))
        return Pairs([(key, value) for key, value in pairs])

    def _charge(self, entries: int) -> None:
        """Count what a call looks through; few opcodes can give the same to many calls."""
        self._copied += entries
        check_limit(self._copied, MAX_OPCODES, "copied entries")

    def _list(self, arguments: tuple[Any, ...]) -> list[Any]:
        given = arguments[0] if arguments else []
        if type(given) not in {list, tuple}:
            raise TypeError
        self._charge(len(given))
        return list(given)

    def _bytes(self, arguments: tuple[Any, ...]) -> object:
        """Bytes that are written as text; None where the text is in another encoding."""
        text, *encoding = arguments or (b"",)
        if type(text) is not str or encoding not in (["latin1"], ["latin-1"]):
            return text if type(text) is bytes and not encoding else None
        self._copied_bytes += len(text)
        check_limit(self._copied_bytes, 4 * MAX_PICKLE_BYTES, "bytes of copied texts")
        return text.encode("latin-1")

    def _counter(self, arguments: tuple[Any, ...]) -> Pairs:
        if arguments and not isinstance(arguments[0], Pairs):
            raise TypeError
        return self._ordered(arguments)


_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"
# What makes a layer that bnfreeze froze: of its class, of how it behaves, and of how it was made.
_FEW: Final = 16
_PLAIN: Final = frozenset({"copyreg.__newobj__", "copyreg._reconstructor"})
_REBUILD: Final = re.compile(r"bnfreeze\.policies\.\w+\._rebuild")


def _object_of(call: Opaque) -> Opaque | None:
    """What a call of another function makes, as if the class itself were called.

    None where the call is none of these, or could do anything else.
    """
    if not 1 <= len(call.arguments) <= _FEW or not isinstance(call.arguments[0], Global):
        return None
    kind, *rest = call.arguments
    if call.name == "copyreg.__newobj__":
        check_new(kind.name, tuple(rest))
        return Opaque(kind.name, tuple(rest))
    if call.name == "copyreg._reconstructor":
        is_plain = len(rest) == 2 and isinstance(rest[0], Global) and rest[1] is None
        return Opaque(kind.name, ()) if is_plain and rest[0].name == "builtins.object" else None
    if _REBUILD.fullmatch(call.name):
        behaviour, make, given = rest if len(rest) == 3 else (None, None, None)
        if isinstance(behaviour, Global) and isinstance(make, Global) and type(given) is tuple:
            made = _object_of(Opaque(make.name, given)) if make.name in _PLAIN else None
            if made and made.name == kind.name and not made.arguments:
                return made if behaviour.name.startswith("bnfreeze.policies.") else None
    return None


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


def _attribute(arguments: tuple[Any, ...]) -> Global | None:
    """An attribute of something that is named, as a method of a class: a longer name.

    None of anything else, which stays a call.
    """
    if len(arguments) != 2 or not isinstance(arguments[0], Global) or type(arguments[1]) is not str:
        return None
    name = f"{arguments[0].name}.{arguments[1]}"
    check_limit(len(name), MAX_NAME_LENGTH, "characters of a name")
    return Global(name)


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
    check_limit(len(arguments[1]), _FEW, "parts of a sparse tensor")
    indices_and_values = [part for part in arguments[1] if isinstance(part, StoredTensor)]
    shapes = [part for part in arguments[1] if type(part) is tuple]
    return DescribedTensor(indices_and_values[-1].dtype, checked_shape(shapes[0]), "it is sparse")


def _constructed(_: tuple[Any, ...]) -> object:
    """A tensor of a list or of nothing, which torch never writes."""
    raise ValueError


def _described(dtype: Any, shape: Any, why: str) -> DescribedTensor:
    return DescribedTensor(DTYPES[dtype.name], checked_shape(shape), why)


def checked_shape(shape: Any) -> tuple[int, ...]:
    """The shape of a tensor that is only described.

    Raises:
        UnsafeCheckpointError: too many dimensions.
        ValueError: it is none.
    """
    check_limit(len(shape), MAX_DIMENSIONS, "dimensions of a tensor")
    if not is_shape(shape):
        raise ValueError
    return tuple(shape)
