"""The operation that writes to a frozen tensor, stopped when it happens.

Every operation that torch dispatches passes a `TorchDispatchMode`. The schema of an operation says
which arguments it writes to, but not always: batch norm's kernels write to the running statistics
without saying so, and so may a user's own kernel. So the schema is not used. Whenever frozen
memory is among the arguments, the frozen tensors in it are compared before and after.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bnfreeze.inspection.in_memory import TensorInMemory, shard_of, why_unreadable
from bnfreeze.torch_private import TorchDispatchMode
from bnfreeze.verification.causes import TRACED, because
from bnfreeze.verification.drift import DriftError, DriftReport
from bnfreeze.verification.on_device import unequal_tensors
from bnfreeze.verification.state import State


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises a `DriftError` at the operation that changes a bit of a frozen tensor.

    A write that leaves every bit as it was, such as DistributedDataParallel's broadcast of
    buffers that are equal already, is not a drift.
    """

    def __init__(self, before: State, look: Callable[[], DriftReport]) -> None:
        """Watch the tensors of `before`; `look` compares the model with it in full."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._paused = False
        # What it raised first: some callers, load_state_dict among them, raise their own instead.
        self.error: DriftError | None = None
        self._before, self._look = before, look
        # By the address of the memory, the first names of the frozen tensors there.
        self._names: dict[int, list[str]] = {}
        for name in before.values:
            self._names.setdefault(before.identities[name].pointer, []).append(name)
        self._names.pop(0, None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Watch nothing in a ``with`` block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        __tracebackhide__ = True
        kwargs = kwargs or {}
        pointers = [] if self._paused else map(_pointer, _tensors([args, kwargs]))
        names = {name for pointer in pointers for name in self._names.get(pointer, ())}
        if any(map(self._differs, names)):
            self._stop(names, func, wrote=False)
        result = func(*args, **kwargs)
        if any(map(self._differs, names)):
            self._stop(names, func, wrote=True)
        return result

    def _differs(self, name: str) -> bool:
        now = TensorInMemory(self._before.identities[name].tensor)
        before = cast("TensorInMemory", self._before.values[name])
        if now.why:
            return False  # the full comparison will say so
        old, new = before.tensor, now.tensor
        alike = (old.dtype, old.shape, old.device) == (new.dtype, new.shape, new.device)
        return not alike or bool(unequal_tensors({name: (old, new)}))

    def _stop(self, names: Collection[str], func: object, *, wrote: bool) -> None:
        """Raise what the comparison finds in these tensors, with the operation and the line."""
        __tracebackhide__ = True
        line = _user_line()
        report = self._look()
        drifts = []
        for drift in (drift for drift in report.drifts if drift.name in names):
            # The operation shows more than the two states do.
            if not wrote:
                drift = because(drift, "undispatched", operation=func)
            elif drift.cause_code in TRACED:
                drift = because(drift, "operation", operation=func)
            drifts.append(replace(drift, operation=str(func) if wrote else None, where=line))
        report = replace(report, drifts=tuple(drifts))
        if not report.ok:
            error = DriftError(report.message, report)
            self.error = self.error or error
            raise error


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _pointer(tensor: Tensor) -> int:
    own = shard_of(tensor)
    tensor = tensor if own is None else own
    return 0 if why_unreadable(tensor) else tensor.untyped_storage().data_ptr()


_PACKAGES = Path(__file__).resolve().parents[1], Path(torch.__file__).resolve().parent
_OWN = tuple(f"{folder}{os.sep}" for folder in _PACKAGES)
_LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))


def _user_line() -> str | None:
    """File and line of the innermost call in the user's own code.

    That is code outside of torch, bnfreeze, installed packages and Python's library; if there is
    none, the innermost outside of torch and bnfreeze. None on a thread of torch's own.
    """
    outside = None
    for frame, number in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if not file.startswith(("<", *_OWN)):
            outside = outside or f"{file}:{number}"
            if not file.startswith(_LIBRARIES):
                return f"{file}:{number}"
    return outside
