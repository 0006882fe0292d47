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
    from bnfreeze.verification.diff import diff
    from bnfreeze.verification.diff_report import Diff, TensorChange
    from bnfreeze.verification.drift import Drift, DriftError, DriftReport
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

# The modules in which the public names are defined.
_NAMES = {
    "calibration.fit": "LayerFit",
    "calibration.measuring": "CalibrationError",
    "calibration.probe": "probe",
    "calibration.recalibrate": "recalibrate",
    "calibration.report": "ProbeReport RecalibrationReport",
    "errors": "BnfreezeError BnfreezeWarning CheckpointError CorruptCheckpointError NotFrozenError "
    "PolicyError UnsafeCheckpointError UnsupportedFormatError",
    "findings": "Finding",
    "freezing.freeze": "freeze unfreeze",
    "freezing.report": "FreezeReport LayerRow",
    "inspection.behaviour": "LiveLayer",
    "inspection.checkpoint": "CheckpointInspection",
    "inspection.inspect": "inspect",
    "inspection.live": "ModelInspection",
    "inspection.result": "Inspection",
    "inspection.stored_layers": "StoredLayer",
    "nn.modules": "FrozenBatchNorm1d FrozenBatchNorm2d FrozenBatchNorm3d",
    "policies.policy": "Policy",
    "verification.assert_frozen": "assert_frozen",
    "verification.diff": "diff",
    "verification.diff_report": "Diff TensorChange",
    "verification.drift": "Drift DriftError DriftReport",
    "verification.guard": "Guard guard",
    "verification.snapshot": "Snapshot",
    "verification.verify": "snapshot verify",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("bnfreeze")
    if name == "functional":
        return import_module("bnfreeze.functional")
    if name in _HOME:
        return getattr(import_module(f"bnfreeze.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bnfreeze' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
