"""Which names a checkpoint may call on loading without anyone being warned.

`torch.load(weights_only=False)` and `pickle.load` call what a pickle names. An allowlist of exact
names is the only safe way to say that a call is harmless: a list of dangerous names always misses
one. Everything that is not listed here is reported, with the level that `level_of` gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Final

from bnfreeze.checkpoints.pickled import Opaque
from bnfreeze.checkpoints.torch_names import TORCH_NAMES
from bnfreeze.findings import Level

__all__ = ["VALUES", "is_ordinary", "level_of", "would_call"]


def _each(module: str, names: str) -> set[str]:
    return {f"{module}.{name}" for name in names.split()}


# Plain values. They are not listed among what was left uninterpreted.
VALUES: Final[frozenset[str]] = (
    TORCH_NAMES
    | _each(
        "builtins", "bool int float complex str bytes bytearray list tuple dict set frozenset slice"
    )
    | _each("builtins", "range object")
    | _each("collections", "OrderedDict defaultdict Counter deque")
    | _each("datetime", "date datetime time timedelta timezone")
    | _each("numpy", "dtype")
    # The scalar types, as a checkpoint names them beside arrays and generators.
    | _each("numpy", "bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16")
    | _each("numpy", "uint32 uint64 complex64 complex128 str_ bytes_")
    # NumPy 2 moved `numpy.core` to `numpy._core`; files have both.
    | {
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    }
    | _each("_codecs", "encode")
    | _each("decimal", "Decimal")
    | _each("fractions", "Fraction")
    | _each("uuid", "UUID")
    # Lists, as TorchScript writes them.
    | _each("torch.jit._pickle", "build_intlist build_doublelist build_boollist build_tensorlist")
    | _each("torch.jit._pickle", "restore_type_tag")
    # What bnfreeze notes on a layer that it froze.
    | {"bnfreeze.policies.record.FreezeRecord", "bnfreeze.policies.policy.Policy"}
)

# Objects that training scripts save beside the weights. Making one sets attributes and does no
# more. Each is here because a well-known tool writes it.
_BYSTANDERS: Final[frozenset[str]] = frozenset(
    _each("argparse", "Namespace")  # parsed options: timm, torchvision's references, most scripts
    | _each("types", "SimpleNamespace")
    | _each("pathlib", "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath")
    | _each("pathlib._local", "Path PosixPath WindowsPath PurePosixPath PureWindowsPath")
    | _each("torch.torch_version", "TorchVersion")  # torch.__version__ in the metadata
    # Optimizers saved whole; their `__setstate__` fills in defaults.
    | {f"torch.optim.{name.lower()}.{name}" for name in ("SGD", "Adam", "AdamW", "RMSprop")}
    | _each(
        "torch.optim.lr_scheduler",
        "StepLR MultiStepLR ExponentialLR CosineAnnealingLR ReduceLROnPlateau OneCycleLR",
    )
    | _each("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor")
    | _each("mmengine.logging.history_buffer", "HistoryBuffer")
    | _each("mmengine.config.config", "ConfigDict")
    | _each("omegaconf.dictconfig", "DictConfig")
    | _each("omegaconf.listconfig", "ListConfig")
    | _each("omegaconf.base", "ContainerMetadata Metadata")
    | _each("omegaconf.nodes", "AnyNode StringNode IntegerNode FloatNode BooleanNode")
    | _each("typing", "Any")
    # Given to what makes an array. Called by itself it is an array that is not read here.
    | _each("numpy", "ndarray")
    | _each("lightning.fabric.utilities.data", "AttributeDict")
    | _each("lightning_fabric.utilities.data", "AttributeDict")
    | _each("pytorch_lightning.utilities.parsing", "AttributeDict")
    | _each("ultralytics.utils", "IterableSimpleNamespace")
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


def would_call(made: Iterable[Opaque]) -> str:
    """A sentence that names what loading would call to make these objects; empty for nothing."""
    names = dict.fromkeys(
        one.name for one in made if level_of(one.name, at_run_time=one.at_run_time, is_module=False)
    )
    shown = [f"`{name:.100}`" for name in list(names)[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" Loading it would call {', '.join(shown)}{more}." if names else ""
