"""bnfreeze: freeze batch norm in PyTorch models, and verify that it stays frozen.

Importing this module imports neither torch nor rich: each name is loaded when it is first used
(PEP 562), so that the command and the pytest plugin start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfreeze import functional as functional
    from bnfreeze.calibration.fit import LayerFit as LayerFit
    from bnfreeze.calibration.measuring import CalibrationError as CalibrationError
    from bnfreeze.calibration.probe import probe as probe
    from bnfreeze.calibration.recalibrate import recalibrate as recalibrate
    from bnfreeze.calibration.report import ProbeReport as ProbeReport
    from bnfreeze.calibration.report import RecalibrationReport as RecalibrationReport
    from bnfreeze.errors import BnfreezeError as BnfreezeError
    from bnfreeze.errors import BnfreezeWarning as BnfreezeWarning
    from bnfreeze.errors import CheckpointError as CheckpointError
    from bnfreeze.errors import CorruptCheckpointError as CorruptCheckpointError
    from bnfreeze.errors import NotFrozenError as NotFrozenError
    from bnfreeze.errors import PolicyError as PolicyError
    from bnfreeze.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from bnfreeze.errors import UnsupportedFormatError as UnsupportedFormatError
    from bnfreeze.findings import Finding as Finding
    from bnfreeze.freezing.freeze import freeze as freeze
    from bnfreeze.freezing.freeze import unfreeze as unfreeze
    from bnfreeze.freezing.report import FreezeReport as FreezeReport
    from bnfreeze.freezing.report import LayerRow as LayerRow
    from bnfreeze.inspection.behaviour import LiveLayer as LiveLayer
    from bnfreeze.inspection.checkpoint import CheckpointInspection as CheckpointInspection
    from bnfreeze.inspection.checkpoint import Inspection as Inspection
    from bnfreeze.inspection.inspect import inspect as inspect
    from bnfreeze.inspection.live import ModelInspection as ModelInspection
    from bnfreeze.inspection.stored_layers import StoredLayer as StoredLayer
    from bnfreeze.nn.modules import FrozenBatchNorm1d as FrozenBatchNorm1d
    from bnfreeze.nn.modules import FrozenBatchNorm2d as FrozenBatchNorm2d
    from bnfreeze.nn.modules import FrozenBatchNorm3d as FrozenBatchNorm3d
    from bnfreeze.policies.policy import Policy as Policy
    from bnfreeze.verification.assert_frozen import assert_frozen as assert_frozen
    from bnfreeze.verification.diff import diff as diff
    from bnfreeze.verification.diff_report import Diff as Diff
    from bnfreeze.verification.diff_report import TensorChange as TensorChange
    from bnfreeze.verification.drift import Drift as Drift
    from bnfreeze.verification.drift import DriftError as DriftError
    from bnfreeze.verification.drift import DriftReport as DriftReport
    from bnfreeze.verification.guard import Guard as Guard
    from bnfreeze.verification.guard import guard as guard
    from bnfreeze.verification.snapshot import Snapshot as Snapshot
    from bnfreeze.verification.verify import snapshot as snapshot
    from bnfreeze.verification.verify import verify as verify

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
    "inspection.checkpoint": "CheckpointInspection Inspection",
    "inspection.inspect": "inspect",
    "inspection.live": "ModelInspection",
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
__all__ = sorted([*_HOME, "functional"])


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
