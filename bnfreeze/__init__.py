"""bnfreeze: freeze batch norm in PyTorch models, and prove that it stayed frozen.

Importing this module imports neither torch nor rich: each name is loaded when it is first used
(PEP 562), because the command and the pytest plugin must start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfreeze import functional
    from bnfreeze.errors import (
        BnfreezeError,
        BnfreezeWarning,
        CheckpointError,
        CorruptCheckpoint,
        DriftError,
        PolicyError,
        UnsafeCheckpoint,
        UnsupportedFormat,
    )
    from bnfreeze.findings import Finding
    from bnfreeze.inspection import Inspection, inspect
    from bnfreeze.layers import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
    from bnfreeze.policy import Policy
    from bnfreeze.report import FreezeReport, LayerRow
    from bnfreeze.surgery import freeze, unfreeze

__all__ = [
    "BnfreezeError",
    "BnfreezeWarning",
    "CheckpointError",
    "CorruptCheckpoint",
    "DriftError",
    "Finding",
    "FreezeReport",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Inspection",
    "LayerRow",
    "Policy",
    "PolicyError",
    "UnsafeCheckpoint",
    "UnsupportedFormat",
    "freeze",
    "functional",
    "inspect",
    "unfreeze",
]

_HOME = {
    "BnfreezeError": "errors",
    "BnfreezeWarning": "errors",
    "CheckpointError": "errors",
    "CorruptCheckpoint": "errors",
    "DriftError": "errors",
    "Finding": "findings",
    "FreezeReport": "report",
    "Inspection": "inspection",
    "LayerRow": "report",
    "FrozenBatchNorm1d": "layers",
    "FrozenBatchNorm2d": "layers",
    "FrozenBatchNorm3d": "layers",
    "Policy": "policy",
    "PolicyError": "errors",
    "UnsafeCheckpoint": "errors",
    "UnsupportedFormat": "errors",
    "freeze": "surgery",
    "inspect": "inspection",
    "unfreeze": "surgery",
}
_MODULES = {"functional"}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("bnfreeze")
    if name in _HOME:
        return getattr(import_module(f"bnfreeze.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"bnfreeze.{name}")
    raise AttributeError(f"module 'bnfreeze' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
