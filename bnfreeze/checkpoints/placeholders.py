"""What of a file was not interpreted, and what loading it would call.

`torch.load(weights_only=False)` and `pickle.load` call what a pickle names. An allowlist of exact
names is the only safe way to say that a call is harmless: a list of dangerous names always misses
one. Everything that is not listed here is reported, with the level that `_level_of` gives.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from bnfreeze.checkpoints.modules import is_module
from bnfreeze.checkpoints.numpy_arrays import NUMPY_BUILDERS
from bnfreeze.checkpoints.pickled import (
    HOLDERS,
    SCRIPT,
    Content,
    Global,
    Opaque,
    children_of,
    joined_key,
    key_text,
)
from bnfreeze.checkpoints.torch_calls import TORCH_NAMES
from bnfreeze.errors import CheckpointError
from bnfreeze.findings import Level
from bnfreeze.text import listed

# Of each kind so many are listed; more of them say nothing more.
_ENOUGH: Final = 100
_LOOKED_INTO: Final = (Global, *HOLDERS)
# The parts of a module, which are no keys of their own.
_PARTS: Final = frozenset({"", "_modules", "_parameters", "_buffers"})
_SEVERITY: Final = {"error": 0, "warning": 1, "note": 2}


def _each(names: dict[str, str]) -> frozenset[str]:
    """The full names, of the names in each module."""
    return frozenset(f"{module}.{name}" for module in names for name in names[module].split())


# Plain values. They are not listed among what was left uninterpreted.
_VALUES: Final = (
    TORCH_NAMES
    | NUMPY_BUILDERS.keys()
    | _each(
        {
            "builtins": "bool int float complex str bytes bytearray list tuple dict set frozenset "
            "slice range object",
            "collections": "OrderedDict defaultdict Counter deque",
            "datetime": "date datetime time timedelta timezone",
            # The scalar types, as a checkpoint names them beside arrays and generators.
            "numpy": "dtype bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 "
            "uint32 uint64 complex64 complex128 str_ bytes_",
            "_codecs": "encode",
            "decimal": "Decimal",
            "fractions": "Fraction",
            "uuid": "UUID",
            # Lists, as TorchScript writes them.
            "torch.jit._pickle": "build_intlist build_doublelist build_boollist build_tensorlist "
            "restore_type_tag",
            # What bnfreeze notes on a layer that it froze.
            "bnfreeze.policies.record": "FreezeRecord",
            "bnfreeze.policies.policy": "Policy",
        }
    )
)

# Objects that training scripts save beside the weights. Making one sets attributes and does no
# more. Each is here because a well-known tool writes it.
_BYSTANDERS: Final = _each(
    {
        "argparse": "Namespace",  # parsed options: timm, torchvision's references, most scripts
        "types": "SimpleNamespace",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
        "torch.torch_version": "TorchVersion",  # torch.__version__ in the metadata
        # Optimizers saved whole; their `__setstate__` fills in defaults.
        **{f"torch.optim.{name.lower()}": name for name in ("SGD", "Adam", "AdamW", "RMSprop")},
        "torch.optim.lr_scheduler": "StepLR MultiStepLR ExponentialLR CosineAnnealingLR "
        "ReduceLROnPlateau OneCycleLR",
        "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
        "mmengine.logging.history_buffer": "HistoryBuffer",
        "mmengine.config.config": "ConfigDict",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
        "typing": "Any",
        # Given to what makes an array. Called by itself it is an array that is not read here.
        "numpy": "ndarray",
        "lightning.fabric.utilities.data": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
        "ultralytics.utils": "IterableSimpleNamespace",
    }
)

# Packages that are installed beside most checkpoints, and so are there for a payload to call:
# what of them is not listed above is an error. Of a package that is not here nothing is known.
_KNOWN_PACKAGES: Final[frozenset[str]] = sys.stdlib_module_names | frozenset(
    name
    for line in (
        "torch torchvision torchaudio numpy scipy pandas sklearn joblib dill cloudpickle",
        "safetensors huggingface_hub transformers timm lightning pytorch_lightning",
        "lightning_fabric fsspec requests yaml pip setuptools pkg_resources _distutils_hack",
        "IPython matplotlib PIL onnx tqdm jinja2 sympy triton rich bnfreeze nt",
    )
    for name in line.split()
)
# Where those packages keep the classes of layers and models.
_MODEL_PACKAGES: Final = (
    *("torch.nn.modules.", "torch.nn.parallel.", "torch.optim.swa_utils.", "torch.ao.nn."),
    *("torchvision.models.", "torchvision.ops.", "timm.layers.", "timm.models."),
    *("transformers.models.", "bnfreeze.nn."),
)


@dataclass(frozen=True)
class CodeCall:
    """Something that loading the file with `torch.load(weights_only=False)` would call.

    Attributes:
        name: the qualified name, such as ``"posix.system"``; of the result of another call, that
            call's name and ``"(…)"``.
        where: under which key it was first found; empty for the top, or where no key leads to it.
        level: ``"error"`` for what is known or made at run time, ``"warning"`` for a package of
            which nothing is known, ``"note"`` for the class of a module.
    """

    name: str
    where: str
    level: Level


@dataclass(frozen=True)
class Uninterpreted:
    """An object that was left as a placeholder.

    Attributes:
        name: the qualified name of its class.
        where: under which key it was first found; empty for the top.
    """

    name: str
    where: str


def placeholders_in(content: Content) -> tuple[tuple[Uninterpreted, ...], tuple[CodeCall, ...]]:
    """What was not interpreted and what would be called, each name once, the worst calls first."""
    places, uninterpreted = _walk(content.root)
    calls: dict[str, CodeCall] = {}
    for made in content.made:
        level = _level_of(made)
        before = calls.get(made.name)
        if level and (before is None or _SEVERITY[level] < _SEVERITY[before.level]):
            calls[made.name] = CodeCall(made.name, places.get(id(made), ""), level)
    ordered = sorted(calls.values(), key=lambda call: _SEVERITY[call.level])
    return uninterpreted, tuple(ordered[:_ENOUGH])


def _walk(root: Any) -> tuple[dict[int, str], tuple[Uninterpreted, ...]]:
    """The key of each placeholder, and those that were not interpreted; each object once."""
    places: dict[int, str] = {}
    found: dict[str, Uninterpreted] = {}
    seen = {id(root)}
    waiting: deque[tuple[str, Any, bool]] = deque([("", root, False)])
    while waiting:
        place, value, is_inside = waiting.popleft()
        if isinstance(value, (Opaque, Global)):
            places[id(value)] = place
            # What is in an object that is left out is left out with it.
            if not is_inside and not _is_interpreted(value):
                is_inside = True
                if len(found) < _ENOUGH:
                    found.setdefault(value.name, Uninterpreted(value.name, place))
        for key, child in children_of(value):
            if isinstance(child, _LOOKED_INTO) and id(child) not in seen:
                seen.add(id(child))
                name = key_text(key)
                inside = place if name in _PARTS else joined_key(place, name)
                waiting.append((inside, child, is_inside))
    return places, tuple(found.values())


def _is_interpreted(value: Opaque | Global) -> bool:
    return value.name in _VALUES or is_module(value) or value.name.startswith(SCRIPT)


def is_ordinary(name: str) -> bool:
    """Whether a call of `name` is known to be harmless."""
    return name in _VALUES or name in _BYSTANDERS


def _level_of(made: Opaque) -> Level | None:
    """How serious it is that loading makes this by a call; None where it is harmless."""
    name = made.name
    # The name of what is itself the result of a call says nothing.
    if made.at_run_time:
        return "error"
    if is_ordinary(name):
        return None
    known = name.partition(".")[0] in _KNOWN_PACKAGES
    # The parts of a module are no excuse: a payload could have them too, and a long name could
    # lead through a module of layers to a function elsewhere.
    is_class = name.rpartition(".")[2].lstrip("_")[:1].isupper()
    is_layer = is_class and name.startswith(_MODEL_PACKAGES)
    # A `torch.nn.Module` is called without arguments when it is loaded.
    if not made.arguments and is_module(made) and (is_layer or not known):
        return "note"
    return "error" if known else "warning"


@contextmanager
def naming_calls(made: Iterable[Opaque]) -> Iterator[None]:
    """Let an error that comes out say what loading would call to make these objects."""
    try:
        yield
    except CheckpointError as error:
        names = [f"`{name:.100}`" for name in dict.fromkeys(m.name for m in made if _level_of(m))]
        calls = f" Loading it would call {listed(names, 3)}." if names else ""
        raise type(error)(f"{error}{calls}") from None
