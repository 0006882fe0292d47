"""The operation that writes to a frozen tensor, stopped when it happens.

Every operation that torch dispatches passes a `TorchDispatchMode`. The schema of an operation says
which arguments it writes to, but not always: batch norm's kernels write to the running statistics
without saying so, and so may a user's own kernel. So the schema is not used. Whenever frozen
memory is among the arguments, the frozen tensors in it are compared before and after.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bnfreeze.inspection.in_memory import TensorInMemory, read_tensor, shard_of, why_unreadable
from bnfreeze.torch_private import TorchDispatchMode
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.drift_report import DriftError, DriftReport
from bnfreeze.verification.on_device import unequal_tensors
from bnfreeze.verification.reasons import TRACE
from bnfreeze.verification.state import State

__all__ = ["Tracer", "user_line"]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises a `DriftError` at the operation that changes a bit of a frozen tensor.

    A write that leaves every bit as it was, such as DistributedDataParallel's broadcast of
    buffers that are equal already, is not a drift.
    """

    def __init__(self, before: State, look: Callable[[], DriftReport]) -> None:
        """Watch the tensors of `before`; `look` compares the model with it in full."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        # What it raised: some callers, load_state_dict among them, raise their own instead.
        self.error: DriftError | None = None
        self._before, self._look = before, look
        # By the address of the memory, the first names of the frozen tensors there.
        self._names: dict[int, list[str]] = {}
        self._values = {
            name: value.tensor
            for name, value in before.values.items()
            if isinstance(value, TensorInMemory)
        }
        for name in self._values:
            pointer = before.identities[name].pointer
            if pointer:
                self._names.setdefault(pointer, []).append(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        __tracebackhide__ = True
        kwargs = kwargs or {}
        names = [] if self.paused else self._touched((args, kwargs))
        if not names:
            return func(*args, **kwargs)
        if any(map(self._differs, names)):
            self._stop(names, None, f"before {func} saw it")
        result = func(*args, **kwargs)
        if any(map(self._differs, names)):
            self._stop(names, str(func), f"by {func}")
        return result

    def _touched(self, arguments: object) -> list[str]:
        names: dict[str, None] = {}
        for tensor in _tensors(arguments):
            names.update(dict.fromkeys(self._names.get(_pointer(tensor), ())))
        return list(names)

    def _differs(self, name: str) -> bool:
        tensor = self._before.identities[name].tensor
        if why_unreadable(tensor):
            return False  # the full comparison will say so
        old, new = self._values[name], read_tensor(tensor)
        if (old.dtype, old.shape, old.device) != (new.dtype, new.shape, new.device):
            return True
        return bool(unequal_tensors([(old, new)]))

    def _stop(self, names: Collection[str], operation: str | None, when: str) -> None:
        """Raise what the comparison finds in these tensors, with the operation and the line."""
        __tracebackhide__ = True
        line = user_line()
        report = self._look()
        drifts = [
            _caught(drift, operation, when, line) for drift in report.drifts if drift.name in names
        ]
        try:
            replace(report, drifts=tuple(drifts)).raise_if_drifted()
        except DriftError as error:
            self.error = error
            raise


def _caught(drift: Drift, operation: str | None, when: str, line: str | None) -> Drift:
    """The drift with the operation and the line, which show more than the two states do."""
    code, cause, remedy = drift.cause_code, drift.cause, drift.remedy
    if operation is None:
        code = "undispatched"
        cause = (
            f"It was written {when}, by something that torch does not dispatch: an assignment to "
            f".data, numpy, a raw pointer, compiled code."
        )
    elif remedy == TRACE:
        code, cause = "operation", f"{operation} wrote to it."
        remedy = "Leave frozen tensors out of it, or freeze later."
    return replace(
        drift, operation=operation, where=line, cause_code=code, cause=cause, remedy=remedy
    )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _pointer(tensor: Tensor) -> int:
    own = shard_of(tensor)
    tensor = tensor if own is None else own
    return 0 if why_unreadable(tensor) else tensor.untyped_storage().data_ptr()


# Where a call comes from ------------------------------------------------------------------------

_OWN = str(Path(__file__).resolve().parent.parent)
_TORCH = str(Path(torch.__file__).resolve().parent)
_LIBRARIES = tuple(
    {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def user_line() -> str | None:
    """File and line of the innermost call in the user's own code.

    That is code outside of torch, bnfreeze, installed packages and Python's library; if there is
    none, the innermost outside of torch and bnfreeze. None on a thread of torch's own.
    """
    frames = list(_frames(sys._getframe()))
    for frame in frames:
        if not _below(frame, _LIBRARIES):
            return _line(frame)
    return _line(frames[0]) if frames else None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith("<") and not _below(frame, (_OWN, _TORCH)):
            yield frame
        frame = frame.f_back


def _below(frame: FrameType, folders: Iterable[str]) -> bool:
    return frame.f_code.co_filename.startswith(tuple(f"{folder}{os.sep}" for folder in folders))


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
