"""guard: a model watched during training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnfreeze.errors import BnfreezeWarning
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.drift_report import DriftError, DriftReport
from bnfreeze.verification.on_device import PendingCheck
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.tracer import Tracer
from bnfreeze.verification.verify import check, snapshot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Guard", "guard"]


def guard(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    every: int = 1,
    tensors: str = "frozen",
    trace: bool = False,
    process_group: ProcessGroup | None = None,
) -> Guard:
    """Watch `model` in a ``with`` block: what is frozen must not change in it.

    ::

        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer)

    A snapshot is taken on entry. The model is compared with it after each `every` optimizer
    steps, and on exit. A drift raises a `DriftError` from the ``optimizer.step()`` after which it
    was seen, so that no training is wasted. On a GPU no check waits for the device: its answer
    about values is read at the next check or on exit, and names the step that it is about. If the
    block itself raises, the model is compared anyway, and a drift is added to that exception as
    a note (before Python 3.11 as a `BnfreezeWarning`).

    Args:
        model: any `nn.Module`.
        optimizer: the optimizer whose steps are counted, or several. What is in them must not
            change either. None counts the steps of every optimizer in this process.
        every: check after so many steps. A drift is then known to lie between two checks.
        tensors: as in `snapshot`.
        trace: stop at the operation that writes to a frozen tensor, and name the line of your
            code. This is slow: each operation on frozen memory is followed by a comparison, on a
            GPU also by a synchronisation. Writes that torch does not dispatch (``.data =``,
            numpy, raw pointers, compiled code, other processes) are found at the next comparison.
        process_group: as in `verify`. Every rank has to take the same steps. On exit with an
            exception each rank checks only its own tensors, as the others may not come.

    Raises:
        PolicyError: nothing is frozen, or the pattern matches no tensor.
        ValueError: `every` is below 1.
        TypeError: `model` is not an `nn.Module`, or `optimizer` not an optimizer with step hooks.
        DriftError: in the block or on exit: something has changed.
    """
    if every < 1:
        raise ValueError(f"every: the number of optimizer steps, at least 1, not {every}.")
    return Guard(model, optimizer, every, tensors, trace, process_group)


class Guard:
    """What `guard` returns: a context manager.

    Attributes:
        step: how many optimizer steps it has seen.
        before: the snapshot it compares with; None before the block.
        report: the last comparison; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        every: int,
        tensors: str,
        trace: bool,
        process_group: ProcessGroup | None,
    ) -> None:
        self.step = 0
        self.before: Snapshot | None = None
        self.report: DriftReport | None = None
        self._model, self._every, self._tensors = model, every, tensors
        self._optimizers = _with_hooks(optimizer)
        self._trace, self._group = trace, process_group
        self._tracer: Tracer | None = None
        self._checked_at = 0
        self._pending = PendingCheck()
        self._stack = ExitStack()

    def __repr__(self) -> str:
        kind = type(self._model).__name__
        every = f"every {self._every} steps" if self._every > 1 else "every step"
        count = "" if self.before is None else f": {len(self.before)} tensors"
        trace = ", traced" if self._trace else ""
        return (
            f"<Guard of {kind}, tensors={self._tensors!r}{count}, checked {every}{trace}, "
            f"at step {self.step}>"
        )

    def __enter__(self) -> Guard:
        self.step = self._checked_at = 0
        self.before = snapshot(self._model, tensors=self._tensors, optimizer=self._optimizers)
        with ExitStack() as stack:
            for one in self._optimizers or ():
                stack.callback(one.register_step_post_hook(self._after_step).remove)
            if self._optimizers is None:
                stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            if self._trace:
                self._tracer = stack.enter_context(Tracer(self.before.state, self._midway))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        __tracebackhide__ = True
        self._stack.close()
        traced = self._tracer.error if self._tracer is not None else None
        if traced is not None and error is not traced:
            raise traced  # something caught it and raised its own
        if error is None:
            self.check()
        elif not isinstance(error, DriftError):
            self._note_on(error)

    def check(self) -> DriftReport:
        """Compare now.

        Raises:
            DriftError: something has changed.
        """
        __tracebackhide__ = True
        self._settle()
        report = self._compare(self.step)
        report.raise_if_drifted()
        return report

    def _compare(
        self,
        step: int,
        *,
        since: int | None = None,
        exchange: bool = True,
        pending: PendingCheck | None = None,
    ) -> DriftReport:
        if self.before is None:
            raise RuntimeError("The guard is not active: enter it with a with statement.")
        if self._tracer is not None:
            self._tracer.paused = True
        try:
            self.report = check(
                self._model,
                self.before.state,
                self._group,
                exchange=exchange,
                step=step,
                since=self._checked_at if since is None else since,
                pending=pending,
            )
        finally:
            if self._tracer is not None:
                self._tracer.paused = False
        self._checked_at = self.step
        return self.report

    def _settle(self) -> None:
        """Read the answer that the last check left to the GPU.

        Raises:
            DriftError: something had changed at that check.
        """
        __tracebackhide__ = True
        if not self._pending.differed():
            return
        step, since = self._pending.step, self._pending.since
        report = self._compare(step, since=since)
        if report.ok:  # the bits are right again, but they were not
            report = replace(report, drifts=(_undone(step, since),))
        report.raise_if_drifted()

    def _midway(self) -> DriftReport:
        """Compare in the middle of a step; the trace has seen every write up to here."""
        self._checked_at = self.step
        return self._compare(self.step + 1, exchange=False)

    def _after_step(self, *_: Any) -> None:
        __tracebackhide__ = True
        self.step += 1
        if self.step % self._every:
            return
        if self._group is not None or self._trace:
            self.check()
            return
        # Flags, and values on the CPU, are compared now. A comparison of values on a GPU is
        # started, and its answer read after the next steps, when it has arrived.
        self._settle()
        since = self._checked_at
        self._compare(self.step, pending=self._pending).raise_if_drifted()
        self._pending.step, self._pending.since = self.step, since

    def _note_on(self, error: BaseException) -> None:
        """Add what drifted to the block's own exception, which is the one that counts."""
        try:
            step = self._pending.step if self._pending.differed() else self.step
            report = self._compare(step, exchange=False)
        except Exception as failure:
            text = f"bnfreeze could not compare the model: {failure}"
        else:
            if report.ok:
                return
            text = f"The guarded model also drifted: {report.message}"
        if sys.version_info >= (3, 11):
            error.add_note(text)
        else:
            # If warnings are errors, the block's own exception is still the one that counts.
            with suppress(BnfreezeWarning):
                warnings.warn(text, BnfreezeWarning, stacklevel=3)


def _undone(step: int, since: int) -> Drift:
    return Drift(
        "",
        "value",
        step=step,
        since=since,
        before="some values differed",
        cause_code="restored",
        cause="Frozen values on the GPU changed and were then restored.",
        remedy="guard(trace=True) stops at the operation that writes.",
    )


def _with_hooks(
    optimizer: Optimizer | Iterable[Optimizer] | None,
) -> list[Optimizer] | None:
    if optimizer is None:
        return None
    several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    # Accelerate's wrapper, which Transformers' Trainer uses too, is an Optimizer by class, but its
    # base was never initialised. The steps are those of the optimizer inside.
    several = [
        inner if isinstance(inner := getattr(one, "optimizer", None), Optimizer) else one
        for one in several
    ]
    for one in several:
        if not hasattr(one, "register_step_post_hook"):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer or several, not "
                f"{type(one).__name__}; for a wrapper, pass the optimizer inside it."
            )
    return several
