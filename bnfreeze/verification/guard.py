"""guard: a model watched during training."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnfreeze.errors import add_note
from bnfreeze.verification.drift import DriftError, DriftReport
from bnfreeze.verification.live_state import as_list
from bnfreeze.verification.on_device import Unchanged
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.tracer import Tracer
from bnfreeze.verification.verify import check, snapshot


def guard(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    every: int = 1,
    tensors: str = "frozen",
    trace: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Guard:
    """Watch `model` in a ``with`` block: what is frozen must not change in it.

    ::

        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer)

    A snapshot is taken on entry. The model is compared with it after each `every` optimizer
    steps, and on exit. A drift raises a `DriftError` from the ``optimizer.step()`` after which it
    was seen, so that no training is wasted. On a GPU a check waits for the device once, as
    ``loss.item()`` does. If the block itself raises, the model is compared anyway, and a drift is
    added to that exception as a note (before Python 3.11 as a `BnfreezeWarning`).

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
    optimizers = None if optimizer is None else as_list(optimizer)
    for one in optimizers or ():
        if not hasattr(one, "register_step_post_hook"):
            raise TypeError(
                f"optimizer: {type(one).__name__} has no step hooks; pass the optimizer inside it."
            )
    return Guard(model, optimizers, every, tensors, trace, process_group)


@dataclass(eq=False, repr=False)
class Guard:
    """What `guard` returns: a context manager.

    Attributes:
        step: how many optimizer steps it has seen.
        before: the snapshot it compares with; None before the block.
        report: the last comparison; None before the first.
    """

    _model: nn.Module
    _optimizers: list[Optimizer] | None
    _every: int
    _tensors: str
    _trace: bool
    _group: dist.ProcessGroup | None
    step: int = 0
    before: Snapshot | None = None
    report: DriftReport | None = None
    _tracer: Tracer | None = None
    # The model as it was when a comparison found nothing.
    _unchanged: Unchanged | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    # The optimizer steps completed at the last check.
    _checked_at: int = 0

    def __repr__(self) -> str:
        kind = type(self._model).__name__
        every = f"every {self._every} steps" if self._every > 1 else "every step"
        count = "" if self.before is None else f": {len(self.before)} tensors"
        what = f"tensors={self._tensors!r}{count}, checked {every}"
        return f"<Guard of {kind}, {what}{', traced' * self._trace}, at step {self.step}>"

    def __enter__(self) -> Guard:
        self.step = self._checked_at = 0
        self._unchanged = None
        self.before = snapshot(self._model, tensors=self._tensors, optimizer=self._optimizers)
        with ExitStack() as stack:
            if self._optimizers is None:
                stack.callback(register_optimizer_step_post_hook(self.after_step).remove)
            for one in self._optimizers or ():
                stack.callback(one.register_step_post_hook(self.after_step).remove)
            if self._trace:
                self._tracer = stack.enter_context(Tracer(self.before.state, self._midway))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
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
        report = self._compare()
        report.raise_if_drifted()
        return report

    def _compare(self, **options: Any) -> DriftReport:
        """Compare, with more `options` of `check` and `compare`."""
        if self.before is None:
            raise RuntimeError("The guard is not active: enter it with a with statement.")
        options = {"step": self.step, "since": self._checked_at, **options}
        before = self.before.state
        with self._tracer.pause() if self._tracer else nullcontext():
            if self.report is None or not self._unchanged:
                self.report, after = check(self._model, before, self._group, **options)
                quick = self._group is None and self.report.ok
                self._unchanged = Unchanged(self._model, before, after) if quick else None
        self._checked_at = self.step
        return self.report

    def _midway(self) -> DriftReport:
        """Compare in the middle of a step; the trace has seen every write up to here."""
        return self._compare(step=self.step + 1, since=self.step, exchange=False)

    def after_step(self, *_: Any) -> None:
        """Count an optimizer step, and compare if it is time; torch's optimizers call this.

        Raises:
            DriftError: something has changed.
        """
        __tracebackhide__ = True
        self.step += 1
        if self.step % self._every == 0:
            self.check()

    def _note_on(self, error: BaseException) -> None:
        """Add what drifted to the block's own exception, which is the one that counts."""
        try:
            self._compare(exchange=False).raise_if_drifted()
        except DriftError as drift:
            text = f"The guarded model also drifted: {drift}"
        except Exception as failure:
            text = f"bnfreeze could not compare the model: {failure}"
        else:
            return
        add_note(error, text)
