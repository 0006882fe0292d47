"""guard: a model watched over its training steps."""

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
from bnfreeze.verification.bits import Later
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.report import DriftError, DriftReport
from bnfreeze.verification.snapshot import Snapshot, check, snapshot
from bnfreeze.verification.tracer import Tracer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Guard", "guard"]


def guard(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    every: int = 1,
    tensors: str = "held",
    trace: bool = False,
    process_group: ProcessGroup | None = None,
) -> Guard:
    """Watch `model` in a ``with`` block: what is held must not change in it.

    ::

        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer)

    A snapshot is taken on entry. The model is compared with it after each `every` optimizer
    steps, and on exit. A drift raises a `DriftError` from the very ``optimizer.step()`` after
    which it was seen, so that nothing more is trained upon it. On an accelerator no check waits
    for the device: its verdict on values is read at the next check or on exit, and names the
    step that it was about. If the block raises by itself,
    the model is compared all the same, and what drifted is added to that exception as a note
    (before Python 3.11 as a `BnfreezeWarning`).

    Args:
        model: any `nn.Module`.
        optimizer: the optimizer whose steps are counted, or several; also, membership in them
            must not change. None counts the steps of every optimizer in this process.
        every: check after so many steps. The drift is then known to lie between two checks.
        tensors: as in `snapshot`.
        trace: stop at the very operation that writes to a held tensor, and name the user's line.
            Slow, as each operation on held memory is followed by a comparison; on a GPU also by
            a synchronisation. Writes that torch does not dispatch (``.data =``, numpy, raw
            pointers, compiled code, other processes) are found by the next comparison.
        process_group: as in `verify`. Every rank has to take the same steps. On exit with an
            exception each rank checks for itself alone, as the others may not come.

    Raises:
        PolicyError: nothing is held, or the pattern matches no tensor.
        ValueError: `every` is below 1.
        TypeError: `model` is no `nn.Module`, or `optimizer` no optimizer with step hooks.
        DriftError: in the block or on exit: something has changed.
    """
    if every < 1:
        raise ValueError(f"every: the number of optimizer steps, at least 1, not {every}.")
    return Guard(model, optimizer, every, tensors, trace, process_group)


class Guard:
    """What `guard` gives: a context manager that can be asked how it stands.

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
        self._later = Later()
        self._stack = ExitStack()

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
            raise traced  # whatever caught it, and raised its own
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
        later: Later | None = None,
    ) -> DriftReport:
        if self.before is None:
            raise RuntimeError("The guard is not on watch: enter it with a with statement.")
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
                later=later,
            )
        finally:
            if self._tracer is not None:
                self._tracer.paused = False
        self._checked_at = self.step
        return self.report

    def _settle(self) -> None:
        """Read the verdict that the last check left to the accelerator.

        Raises:
            DriftError: something had changed by then.
        """
        __tracebackhide__ = True
        if not self._later.differed():
            return
        step, since = self._later.step, self._later.since
        report = self._compare(step, since=since)
        if report.ok:  # the bits are back, but they were gone
            report = replace(report, drifts=(_undone(step, since),))
        report.raise_if_drifted()

    def _midway(self) -> DriftReport:
        """Compare in the middle of a step, of which the trace has seen every write."""
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
        # Flags, and values on the CPU, are compared now. Of values on an accelerator a verdict
        # is asked for, and read after the next steps, when it has long been there.
        self._settle()
        since = self._checked_at
        self._compare(self.step, later=self._later).raise_if_drifted()
        self._later.step, self._later.since = self.step, since

    def _note_on(self, error: BaseException) -> None:
        """Say what drifted beside the exception of the block, which is the one that counts."""
        try:
            step = self._later.step if self._later.differed() else self.step
            report = self._compare(step, exchange=False)
        except Exception as failure:
            text = f"bnfreeze could not compare the model: {failure}"
        else:
            if report.ok:
                return
            text = f"Besides, the guarded model drifted: {report.message}"
        if sys.version_info >= (3, 11):
            error.add_note(text)
        else:
            # Where warnings are errors, the exception of the block still is the one that counts.
            with suppress(BnfreezeWarning):
                warnings.warn(text, BnfreezeWarning, stacklevel=3)


def _undone(step: int, since: int) -> Drift:
    return Drift(
        "",
        "value",
        step=step,
        since=since,
        cause="Values on the accelerator differed, and do no longer: something wrote to what is "
        "held, and then put it back.",
        remedy="guard(trace=True) stops at the operation that writes.",
    )


def _with_hooks(
    optimizer: Optimizer | Iterable[Optimizer] | None,
) -> list[Optimizer] | None:
    if optimizer is None:
        return None
    several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    # Accelerate's wrapper, which Transformers' Trainer has too, claims to be an Optimizer and was
    # never made one; the steps are those of the one inside.
    several = [
        inner if isinstance(inner := getattr(one, "optimizer", None), Optimizer) else one
        for one in several
    ]
    for one in several:
        if not hasattr(one, "register_step_post_hook"):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer or several, not "
                f"{type(one).__name__}; of a wrapper give the optimizer inside."
            )
    return several
