"""bnfreeze: freeze batch norm in PyTorch models, and prove that it stayed frozen.

Importing this module imports neither torch nor rich: each name is loaded when it is first used
(PEP 562), because the command and the pytest plugin must start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from bnfreeze.inspected import Inspection
    from bnfreeze.looking import inspect
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
    "Inspection",
    "LayerRow",
    "Policy",
    "PolicyError",
    "UnsafeCheckpoint",
    "UnsupportedFormat",
    "freeze",
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
    "Inspection": "inspected",
    "LayerRow": "report",
    "Policy": "policy",
    "PolicyError": "errors",
    "UnsafeCheckpoint": "errors",
    "UnsupportedFormat": "errors",
    "freeze": "surgery",
    "inspect": "looking",
    "unfreeze": "surgery",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("bnfreeze")
    if name in _HOME:
        return getattr(import_module(f"bnfreeze.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bnfreeze' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
