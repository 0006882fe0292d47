"""bnfreeze: freeze batch norm in PyTorch models, and verify that it stays frozen.

Importing this module imports neither torch nor rich: each name is loaded when it is first used
(PEP 562), so that the command and the pytest plugin start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfreeze import functional
    from bnfreeze.calibration.fit import LayerFit
    from bnfreeze.calibration.measuring import CalibrationError
    from bnfreeze.calibration.probe import probe
    from bnfreeze.calibration.recalibrate import recalibrate
    from bnfreeze.calibration.report import ProbeReport, RecalibrationReport
    from bnfreeze.errors import (
        BnfreezeError,
        BnfreezeWarning,
        CheckpointError,
        CorruptCheckpointError,
        NotFrozenError,
        PolicyError,
        UnsafeCheckpointError,
        UnsupportedFormatError,
    )
    from bnfreeze.findings import Finding
    from bnfreeze.freezing.freeze import freeze, unfreeze
    from bnfreeze.freezing.report import FreezeReport, LayerRow
    from bnfreeze.inspection.behaviour import LiveLayer
    from bnfreeze.inspection.checkpoint import CheckpointInspection
    from bnfreeze.inspection.inspect import inspect
    from bnfreeze.inspection.live import ModelInspection
    from bnfreeze.inspection.result import Inspection
    from bnfreeze.inspection.stored_layers import StoredLayer
    from bnfreeze.nn.modules import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
    from bnfreeze.policies.policy import Policy
    from bnfreeze.verification.assert_frozen import assert_frozen
    from bnfreeze.verification.diff import Diff, TensorChange, diff
    from bnfreeze.verification.drift import Drift
    from bnfreeze.verification.drift_report import DriftError, DriftReport
    from bnfreeze.verification.guard import Guard, guard
    from bnfreeze.verification.snapshot import Snapshot
    from bnfreeze.verification.verify import snapshot, verify

__all__ = [
    "BnfreezeError",
    "BnfreezeWarning",
    "CalibrationError",
    "CheckpointError",
    "CheckpointInspection",
    "CorruptCheckpointError",
    "Diff",
    "Drift",
    "DriftError",
    "DriftReport",
    "Finding",
    "FreezeReport",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "Guard",
    "Inspection",
    "LayerFit",
    "LayerRow",
    "LiveLayer",
    "ModelInspection",
    "NotFrozenError",
    "Policy",
    "PolicyError",
    "ProbeReport",
    "RecalibrationReport",
    "Snapshot",
    "StoredLayer",
    "TensorChange",
    "UnsafeCheckpointError",
    "UnsupportedFormatError",
    "assert_frozen",
    "diff",
    "freeze",
    "functional",
    "guard",
    "inspect",
    "probe",
    "recalibrate",
    "snapshot",
    "unfreeze",
    "verify",
]

_HOME = {
    "CalibrationError": "calibration.measuring",
    "LayerFit": "calibration.fit",
    "ProbeReport": "calibration.report",
    "RecalibrationReport": "calibration.report",
    "probe": "calibration.probe",
    "recalibrate": "calibration.recalibrate",
    "BnfreezeError": "errors",
    "BnfreezeWarning": "errors",
    "CheckpointError": "errors",
    "CheckpointInspection": "inspection.checkpoint",
    "CorruptCheckpointError": "errors",
    "Diff": "verification.diff",
    "Drift": "verification.drift",
    "DriftError": "verification.drift_report",
    "DriftReport": "verification.drift_report",
    "Finding": "findings",
    "FreezeReport": "freezing.report",
    "Guard": "verification.guard",
    "Inspection": "inspection.result",
    "LayerRow": "freezing.report",
    "LiveLayer": "inspection.behaviour",
    "ModelInspection": "inspection.live",
    "FrozenBatchNorm1d": "nn.modules",
    "FrozenBatchNorm2d": "nn.modules",
    "FrozenBatchNorm3d": "nn.modules",
    "NotFrozenError": "errors",
    "Policy": "policies.policy",
    "PolicyError": "errors",
    "Snapshot": "verification.snapshot",
    "StoredLayer": "inspection.stored_layers",
    "TensorChange": "verification.diff",
    "UnsafeCheckpointError": "errors",
    "UnsupportedFormatError": "errors",
    "assert_frozen": "verification.assert_frozen",
    "diff": "verification.diff",
    "freeze": "freezing.freeze",
    "guard": "verification.guard",
    "inspect": "inspection.inspect",
    "snapshot": "verification.verify",
    "unfreeze": "freezing.freeze",
    "verify": "verification.verify",
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
