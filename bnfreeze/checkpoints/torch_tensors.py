"""What the calls in a pickle of torch or NumPy describe: storages, tensors, arrays, dicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Final

from bnfreeze.checkpoints.limits import (
    MAX_OPCODES,
    MAX_PICKLE_BYTES,
    MAX_TENSORS,
    check_limit,
    is_size,
)
from bnfreeze.checkpoints.numpy_arrays import NUMPY_BUILDERS, fill_array
from bnfreeze.checkpoints.pickled import Content, Global, Opaque, Pairs
from bnfreeze.checkpoints.pickles import PickleReader
from bnfreeze.checkpoints.placeholders import is_ordinary
from bnfreeze.checkpoints.source import Source
from bnfreeze.checkpoints.stored_tensor import ITEM_SIZES, StoredTensor
from bnfreeze.checkpoints.torch_calls import (
    STORAGES,
    TORCH_BUILDERS,
    Storage,
    check_attributes,
    meaning_of,
)
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError, damaged

_BUILDERS: Final = TORCH_BUILDERS | NUMPY_BUILDERS


class TorchPickleReader(PickleReader):
    """A reader of pickles that gives a `StoredTensor` for each tensor and array."""

    def __init__(
        self,
        find: Callable[[str, int, int], Source] | None,
        nested: Callable[[Source], Content] | None = None,
        *,
        is_big_endian: bool = False,
    ) -> None:
        """Take what finds storages.

        Args:
            find: is given a storage's key, the bytes that it is said to have, and an element's;
                gives back where it lies, or raises CorruptCheckpointError. None where the pickle
                cannot refer to storages.
            nested: reads the file of torch.save that stands for a storage where a tensor was
                pickled without torch.save.
            is_big_endian: whether the numbers in storages are.
        """
        super().__init__()
        self._find = find
        self._nested = nested
        self._is_big_endian = is_big_endian
        self._used: Counter[str] = Counter()
        self._storages: dict[int, tuple[object, Storage]] = {}
        self._dtypes: dict[str, str] = {}
        # What would be called by a call that is harmless by itself.
        self._besides: set[str] = set()

    def called(self, call: Opaque) -> object:
        """What a call gives: a tensor, a dict, or, where it is not interpreted, the call itself."""
        meant = meaning_of(call)
        if isinstance(meant, Global):
            return meant
        call = meant
        if is_ordinary(call.name):
            # Such a call may call what it is given: `collections.defaultdict(os.system)`.
            self._charge(len(call.arguments))
            for argument in call.arguments:
                if isinstance(argument, Global) and not is_ordinary(argument.name):
                    self._add(Opaque(argument.name, ()))
        method = self._methods.get(call.name)
        builder = partial(method, self) if method else _BUILDERS.get(call.name)
        if builder is None:
            return call
        try:
            made = builder(*call.arguments)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise damaged(f"{call.name} is called with arguments that it does not take.") from None
        if isinstance(made, StoredTensor):
            self._charge(1, "tensors", MAX_TENSORS)
        return call if made is None else made

    def filled(self, made: Opaque) -> None:
        """Take the state of an object: an array of NumPy is made empty, and filled by it."""
        fill_array(made)
        if made.array is not None:
            self._charge(1, "tensors", MAX_TENSORS)

    def _add(self, made: Opaque) -> None:
        if made.name not in self._besides:
            self._besides.add(made.name)
            self.made.append(made)

    def _charge(self, amount: int, what: str = "copied entries", limit: int = MAX_OPCODES) -> None:
        """Count what calls look through or copy; few opcodes can give the same to many calls."""
        self._used[what] += amount
        check_limit(self._used[what], limit, what)

    def referred(self, key: Any) -> object:
        """What a persistent id means: a storage, or a class of modules with its source code."""
        if self._find is None:
            return super().referred(key)
        is_module = type(key) is tuple and len(key) == 4 and key[0] == "module"
        if is_module and isinstance(key[1], Global):
            return key[1]
        if type(key) is not tuple or len(key) < 5 or key[0] not in ("storage", b"storage"):
            raise damaged("its pickle refers to something that is no storage.")
        kind, name, count = key[1], key[2], key[4]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or type(name) is not str or not is_size(count):
            raise damaged("a storage without kind, key or size.")
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
        source = self._find(name, count * ITEM_SIZES[dtype], ITEM_SIZES[dtype])
        return Storage(source, dtype, self._is_big_endian)

    def _storage_of_bytes(self, data: Any) -> Storage:
        """The storage in a whole file of torch.save, as `pickle.dump` of a tensor has it."""
        # Many calls may be given the same bytes.
        if id(data) in self._storages:
            return self._storages[id(data)][1]
        if self._nested is None:
            raise ValueError
        content = self._nested(Source.of(data) if type(data) is bytes else data)
        self._charge(content.end, "bytes of pickles in a pickle", MAX_PICKLE_BYTES)
        if not isinstance(content.root, Storage):
            raise TypeError
        for made in content.made:
            self._add(made)
        self._storages[id(data)] = (data, content.root)
        return content.root

    def _inner(self, function: Any, _class: object, inner: Any, state: object) -> object:
        """A tensor with attributes of its own: the tensor."""
        # One inside another is nothing that torch writes, and could be nested without end.
        if function.name not in _BUILDERS:
            raise ValueError
        check_attributes(state)
        return self.called(Opaque(function.name, inner))

    def _ordered(self, given: Any = (), *_: object) -> Pairs:
        pairs = given.pairs if isinstance(given, Pairs) else given
        self._charge(len(pairs))
        return Pairs([(key, value) for key, value in pairs])

    def _counter(self, *given: Any) -> Pairs:
        if given and not isinstance(given[0], Pairs):
            raise TypeError
        return self._ordered(*given)

    def _list(self, given: Any = (), *_: object) -> list[Any]:
        if type(given) not in {list, tuple}:
            raise TypeError
        self._charge(len(given))
        return list(given)

    def _bytes(self, text: object = b"", *encoding: object) -> object:
        """Bytes that are written as text; None where the text is in another encoding."""
        if type(text) is not str or encoding not in (("latin1",), ("latin-1",)):
            return text if type(text) is bytes and not encoding else None
        self._charge(len(text), "bytes of copied texts", 4 * MAX_PICKLE_BYTES)
        return text.encode("latin-1")

    # By name, without a reference to the reader: it goes as soon as it has read.
    _methods: ClassVar[dict[str, Callable[..., object]]] = {
        "torch._tensor._rebuild_from_type_v2": _inner,
        "torch.storage._load_from_bytes": _storage_of_bytes,
        "collections.OrderedDict": _ordered,
        "collections.Counter": _counter,
        "collections.defaultdict": lambda self, _=None, *given: self._ordered(*given),
        "collections.deque": _list,
        "builtins.list": _list,
        "builtins.set": _list,
        "builtins.frozenset": _list,
        "builtins.tuple": lambda self, *given: tuple(self._list(*given)),
        "builtins.dict": _ordered,
        "builtins.bytearray": _bytes,
        "_codecs.encode": _bytes,
    }
