"""What the calls in a pickle of torch or NumPy describe: storages, tensors, arrays, dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from bnfreeze.checkpoints.code_names import is_ordinary
from bnfreeze.checkpoints.limits import (
    MAX_OPCODES,
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    check_limit,
    is_size,
)
from bnfreeze.checkpoints.numpy_arrays import NUMPY_BUILDERS
from bnfreeze.checkpoints.pickled import Global, Opaque, Pairs
from bnfreeze.checkpoints.pickles import Described, read_pickle
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import (
    ITEM_SIZES,
    Record,
    StoredTensor,
)
from bnfreeze.checkpoints.torch_calls import (
    TORCH_BUILDERS,
    Storage,
    attribute,
    check_attributes,
    object_of,
)
from bnfreeze.checkpoints.torch_names import STORAGES
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

__all__ = ["read_torch_pickle"]


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


_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"


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
            **TORCH_BUILDERS,
            _FROM_TYPE: self._inner,
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
            "builtins.getattr": attribute,
            "_codecs.encode": self._bytes,
            **NUMPY_BUILDERS,
        }

    def called(self, call: Opaque) -> object:
        """What a call gives: a tensor, a dict, or, where it is not interpreted, the call itself."""
        call = object_of(call) or call
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

    def _inner(self, arguments: tuple[Any, ...]) -> object:
        """A tensor with attributes of its own: the tensor."""
        function, _, inner, state = arguments
        # One inside another is nothing that torch writes, and could be nested without end.
        if function.name not in self._builders or function.name == _FROM_TYPE:
            raise ValueError
        check_attributes(state)
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
