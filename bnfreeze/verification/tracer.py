"""The operation that writes to a held tensor, caught in the act.

Every operation that torch dispatches passes a `TorchDispatchMode`. Which arguments it writes to,
its schema says, but not always: batch norm's kernels write to the running statistics in silence,
and so may anybody's own. So no schema is asked. Whatever operation has held memory among its
arguments, the held tensors there are compared before and after it.
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

from bnfreeze.torch_private import TorchDispatchMode
from bnfreeze.verification import bits
from bnfreeze.verification.causes import TRACE
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.report import DriftError, DriftReport
from bnfreeze.verification.state import State

__all__ = ["Tracer", "user_line"]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises a `DriftError` at the operation that changes a bit of a held tensor.

    A write that leaves every bit as it was, such as DistributedDataParallel's broadcast of
    buffers that are equal already, is none.
    """

    def __init__(self, before: State, look: Callable[[], DriftReport]) -> None:
        """Watch the tensors of `before`; `look` compares the model with it in full."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        # What it raised: some callers, such as load_state_dict, catch all and raise their own.
        self.error: DriftError | None = None
        self._before, self._look = before, look
        # By the address of the memory, the first names of the held tensors that lie there.
        self._names: dict[int, list[str]] = {}
        for name in before.values:
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
        if bits.why_unreadable(tensor):
            return False  # the full comparison will say so
        old, new = self._before.values[name], bits.read(tensor)
        if (old.dtype, old.shape, old.device) != (new.dtype, new.shape, new.device):
            return True
        return bool(bits.unequal([(old, new)]))

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
    """The drift with the operation and the line, which tell more than the states could."""
    cause, remedy = drift.cause, drift.remedy
    if operation is None:
        cause = (
            f"It was written {when}, by something that torch does not dispatch: an assignment to "
            f".data, numpy, a raw pointer, compiled code."
        )
    elif remedy == TRACE:
        cause, remedy = f"{operation} wrote to it.", "Leave what is held out, or freeze later."
    return replace(drift, operation=operation, where=line, cause=cause, remedy=remedy)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _pointer(tensor: Tensor) -> int:
    own = bits.shard(tensor)
    tensor = tensor if own is None else own
    return 0 if bits.why_unreadable(tensor) else tensor.untyped_storage().data_ptr()


# Where a call comes from ------------------------------------------------------------------------

_OWN = str(Path(__file__).resolve().parent.parent)
_TORCH = str(Path(torch.__file__).resolve().parent)
_LIBRARIES = tuple(
    {sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def user_line() -> str | None:
    """File and line of the innermost call that stands in the user's own code.

    That is neither in torch, in bnfreeze, in an installed package nor in Python's library; where
    all of it is, the innermost outside of torch and bnfreeze. None on a thread of torch's own.
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
