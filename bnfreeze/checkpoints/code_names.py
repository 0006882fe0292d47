"""Which names a checkpoint may call on loading without anyone being warned.

`torch.load(weights_only=False)` and `pickle.load` call what a pickle names. An allowlist of exact
names is the only safe way to say that a call is harmless: a list of dangerous names always misses
one. Everything that is not listed here is reported, with the level that `level_of` gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from bnfreeze.checkpoints.numpy_arrays import NUMPY_BUILDERS
from bnfreeze.checkpoints.pickled import Opaque
from bnfreeze.checkpoints.torch_calls import TORCH_NAMES
from bnfreeze.errors import CheckpointError
from bnfreeze.findings import Level
from bnfreeze.text import listed

__all__ = ["VALUES", "is_ordinary", "level_of", "naming_calls", "would_call"]


def _each(names: dict[str, str]) -> frozenset[str]:
    """The full names, of the names in each module."""
    return frozenset(f"{module}.{name}" for module in names for name in names[module].split())


# Plain values. They are not listed among what was left uninterpreted.
VALUES: Final = (
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


def is_ordinary(name: str) -> bool:
    """Whether a call of `name` is known to be harmless."""
    return name in VALUES or name in _BYSTANDERS


def level_of(name: str, *, at_run_time: bool, is_module: bool) -> Level | None:
    """How serious it is that loading calls `name`; None where it is harmless.

    Args:
        name: what is called.
        at_run_time: whether that is the result of another call, so that the name says nothing.
        is_module: whether it is called without arguments, as a `torch.nn.Module` is when it is
            loaded, and what it gives gets the parts of one.
    """
    if at_run_time:
        return "error"
    if is_ordinary(name):
        return None
    known = name.partition(".")[0] in _KNOWN_PACKAGES
    # The parts of a module are no excuse: a payload could have them too, and a long name could
    # lead through a module of layers to a function elsewhere.
    is_class = name.rpartition(".")[2].lstrip("_")[:1].isupper()
    if is_module and (not known or (is_class and name.startswith(_MODEL_PACKAGES))):
        return "note"
    return "error" if known else "warning"


@contextmanager
def naming_calls(made: Iterable[Opaque]) -> Iterator[None]:
    """Let an error that comes out say what loading the file would call, too."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{error}{would_call(made)}") from None


def would_call(made: Iterable[Opaque]) -> str:
    """A sentence that names what loading would call to make these objects; empty for nothing."""
    names = dict.fromkeys(
        one.name for one in made if level_of(one.name, at_run_time=one.at_run_time, is_module=False)
    )
    shown = [f"`{name:.100}`" for name in names]
    return f" Loading it would call {listed(shown, 3)}." if names else ""
