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
    from bnfreeze.freezing.surgery import freeze, unfreeze
    from bnfreeze.layers import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
    from bnfreeze.looking.dispatch import inspect
    from bnfreeze.looking.inspected import Inspection
    from bnfreeze.policy import Policy
    from bnfreeze.proof.drift import Drift
    from bnfreeze.proof.report import DriftReport
    from bnfreeze.proof.snapshot import Snapshot, assert_frozen, snapshot, verify
    from bnfreeze.proof.watch import guard
    from bnfreeze.report import FreezeReport, LayerRow

__all__ = [
    "BnfreezeError",
    "BnfreezeWarning",
    "CheckpointError",
    "CorruptCheckpoint",
    "Drift",
    "DriftError",
    "DriftReport",
    "Finding",
    "FreezeReport",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Inspection",
    "LayerRow",
    "Policy",
    "PolicyError",
    "Snapshot",
    "UnsafeCheckpoint",
    "UnsupportedFormat",
    "assert_frozen",
    "freeze",
    "functional",
    "guard",
    "inspect",
    "snapshot",
    "unfreeze",
    "verify",
]

_HOME = {
    "BnfreezeError": "errors",
    "BnfreezeWarning": "errors",
    "CheckpointError": "errors",
    "CorruptCheckpoint": "errors",
    "Drift": "proof.drift",
    "DriftError": "errors",
    "DriftReport": "proof.report",
    "Finding": "findings",
    "FreezeReport": "report",
    "Inspection": "looking.inspected",
    "LayerRow": "report",
    "FrozenBatchNorm1d": "layers",
    "FrozenBatchNorm2d": "layers",
    "FrozenBatchNorm3d": "layers",
    "Policy": "policy",
    "PolicyError": "errors",
    "Snapshot": "proof.snapshot",
    "UnsafeCheckpoint": "errors",
    "UnsupportedFormat": "errors",
    "assert_frozen": "proof.snapshot",
    "freeze": "freezing.surgery",
    "guard": "proof.watch",
    "inspect": "looking.dispatch",
    "snapshot": "proof.snapshot",
    "unfreeze": "freezing.surgery",
    "verify": "proof.snapshot",
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
