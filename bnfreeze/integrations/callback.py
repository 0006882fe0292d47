"""What the callbacks of all trainers do, whatever the trainer calls its events."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, distributed, nn

from bnfreeze.calibration.probe import probe
from bnfreeze.calibration.recalibrate import recalibrate
from bnfreeze.calibration.report import ProbeReport, RecalibrationReport
from bnfreeze.errors import BnfreezeWarning, PolicyError
from bnfreeze.freezing.freeze import freeze
from bnfreeze.freezing.report import FreezeReport
from bnfreeze.freezing.rules import parse_rules
from bnfreeze.inspection.in_memory import shard_of
from bnfreeze.inspection.live import inspect_model
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import frozen_names, recorded
from bnfreeze.verification.drift import DriftError
from bnfreeze.verification.guard import Guard, guard

_PROBED = 32  # batches


class FreezeCallback:
    """Freezes a trainer's model, again if it must, and guards it while it trains.

    With `start_epoch` or `start_step` the statistics train first and are frozen later, at the start
    of that epoch or step. The state that an optimizer has for a newly frozen parameter, its
    momentum for example, is then dropped: it would be stale if the parameter trained again. A
    DistributedDataParallel waits for the gradient of each parameter, so inside one only ``stats``
    and ``eval`` can start later, unless it was built with ``find_unused_parameters=True``; other
    policies are a `PolicyError` when training begins.

    Args:
        policy: as in `bnfreeze.freeze`.
        start_epoch: freeze after so many epochs, as the trainer counts them.
        start_step: freeze after so many steps, as the trainer counts them. With both, freeze when
            both are reached.
        guard: whether to guard the model; `every`, `tensors` and `trace` are as in
            `bnfreeze.guard`.
        recalibrate: data for `bnfreeze.recalibrate`, which is called once, before anything is
            frozen.
        probe: True calls `bnfreeze.probe` when training begins, on the first 32 batches of the
            training data (Lightning and Transformers only); or pass data for it. If the statistics
            do not fit, a `BnfreezeWarning` gives the advice.
        forward: how to run the model on a batch, for both, as in `bnfreeze.probe`.

    With several processes, `recalibrate` and `probe` pool over all of them.

    Attributes:
        report: what was frozen, and how; None before that.
        started: whether the training that is running has reached the moment to freeze.
        recalibrated: the report of `recalibrate`; None without one.
        probed: the report of `probe`; None without one.

    Raises:
        PolicyError: an unknown policy.
    """

    def __init__(
        self,
        policy: Policy | str | Mapping[str, Policy | str] = "eval+affine",
        *,
        start_epoch: int = 0,
        start_step: int = 0,
        guard: bool = True,
        every: int = 1,
        tensors: str = "frozen",
        trace: bool = False,
        recalibrate: Iterable[Any] | None = None,
        probe: bool | Iterable[Any] = False,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        parse_rules(policy)  # a typo is an error now, not hours later in a queue
        self.report: FreezeReport | None = None
        self.started = False
        self._policy, self._guarded = policy, guard
        self._start_epoch, self._start_step = start_epoch, start_step
        self._options: dict[str, Any] = {"every": every, "tensors": tensors, "trace": trace}
        self.recalibrated: RecalibrationReport | None = None
        self.probed: ProbeReport | None = None
        self._data, self._probe, self._forward = recalibrate, probe, forward
        self._frozen = 0
        self._guard: Guard | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A trainer may be pickled to be sent to other processes; reports and the guard cannot.
        gone = {"report": None, "recalibrated": None, "started": False, "_guard": None}
        return self.__dict__ | gone

    # A trainer calls `prepare` before it wraps the model, `begin` when a training begins,
    # `at_epoch` and `at_batch` during it, and `close` at its end.

    def prepare(self, model: nn.Module) -> bool:
        """Freeze the model; if it is frozen later, only try whether that is possible.

        Returns:
            Whether anything was frozen that was not, or not by this policy.

        Raises:
            PolicyError: the policy is impossible here, or the model has no norm layer.
            CalibrationError: the data to recalibrate with cannot be used.
        """
        if self._start_epoch > 0 or self._start_step > 0:
            freeze(model, self._policy, dry_run=True)
            self._frozen = 0
            return False
        return self.freeze(model)

    def begin(self, model: nn.Module, training_data: Iterable[Any] | None = None) -> bool:
        """A training begins: as `prepare`, then probe the model, if that was asked for.

        The guard of a training that failed ends without a check.

        Args:
            model: the trainer's model.
            training_data: what the trainer loads, if its batches are the model's input.

        Raises:
            PolicyError: as `prepare`; or ``probe=True`` without `training_data`.
            TypeError: nothing in a batch looks like the model's input.
            CalibrationError: the data cannot be used.
        """
        self.close(DriftError())
        changed = self.prepare(model)
        if self._probe is False:
            return changed
        data, most = (training_data, _PROBED) if self._probe is True else (self._probe, None)
        if data is None:
            raise PolicyError(
                "probe=True: what this trainer loads is not known to be the model's input. Pass "
                "data, as probe=loader, with forward= if the model is not called on it directly."
            )
        self.probed = probe(
            model, data, forward=self._forward, max_batches=most, process_group=world()
        )
        if any(finding.code == "stats-shifted" for finding in self.probed.findings):
            warnings.warn(self.probed.advice, BnfreezeWarning, stacklevel=2)
        return changed

    def at_epoch(
        self, model: nn.Module, optimizers: Iterable[Any], epoch: float, step: int
    ) -> None:
        """Freeze the model if it is time, and freeze again what something has thawed.

        The first time in a training this also drops what the optimizers store for the frozen
        parameters, and starts the guard.

        Args:
            model: the trainer's model.
            optimizers: the trainer's.
            epoch: how many epochs were trained.
            step: how many steps were trained.

        Raises:
            PolicyError: the policy is impossible here.
        """
        if epoch < self._start_epoch or step < self._start_step:
            return
        self.freeze(model)
        if not self.started:
            _drop_state(model, optimizers)
            self.watch(model, list(optimizers))
            self.started = True

    def at_batch(self, *now: Any) -> None:
        """As `at_epoch`; does nothing if this training has started to freeze already."""
        if not self.started:
            self.at_epoch(*now)

    def freeze(self, model: nn.Module) -> bool:
        """Freeze the model, or freeze again what something else has thawed; as `prepare`."""
        if self._data is not None:
            self.recalibrated = recalibrate(
                model, self._data, forward=self._forward, process_group=world()
            )
            self._data = None
        report = freeze(model, self._policy)
        self._frozen = _frozen(model)
        changed = any(row.actions for row in report.layers)
        if changed or self.report is None:
            self.report = report
        return changed

    def check(self, model: nn.Module) -> None:
        """Check that no frozen layer was replaced by a live one.

        Raises:
            PolicyError: how many are left, and what may have replaced the others.
        """
        if (left := _frozen(model)) < self._frozen:
            raise PolicyError(
                f"Only {left} of {self._frozen} frozen norm layers are left: the trainer has "
                f"replaced the others by live ones, as a conversion to SyncBatchNorm does. Turn "
                f"that off (sync_batchnorm in Lightning, sync_bn in fastai), because frozen layers "
                f"need no synchronisation; or use the policy 'fused', whose layers it does not "
                f"replace."
            )

    def watch(self, model: nn.Module, optimizers: list[Any] | None = None) -> None:
        """Start the guard; `close` ends it. A guard of an earlier training is dropped.

        Args:
            model: the trainer's model.
            optimizers: those whose steps count; None for all in this process.

        Raises:
            PolicyError: nothing is frozen.
        """
        self.close(DriftError())
        if self._guarded:
            # With sharded parameters each rank sees only its own part, so all check together.
            sharded = any(shard_of(parameter) is not None for parameter in model.parameters())
            group = distributed.group.WORLD if sharded else None
            watch = guard(model, optimizer=optimizers, process_group=group, **self._options)
            self._guard = watch.__enter__()

    def close(self, error: BaseException | None = None) -> None:
        """A training ends: check for the last time, and end the guard.

        Args:
            error: what ended the training, if it failed. A drift is added to it as a note. If it
                is a `DriftError`, nothing more is checked.

        Raises:
            DriftError: something has changed.
        """
        self.started = False
        watch, self._guard = self._guard, None
        if watch is not None:
            watch.__exit__(type(error) if error else None, error, None)


def frozen_pairs(model: nn.Module, average: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each frozen tensor of a model, and the same one in a copy of it, such as a moving average.

    Both are detached, so that one can be copied to the other.
    """
    copies = dict(average.named_modules())
    for name, module in model.named_modules():
        for key in frozen_names(module):
            yield getattr(module, key).detach(), getattr(copies[name], key).detach()


def _frozen(model: nn.Module) -> int:
    return sum(layer.policy != "none" for layer in inspect_model(model).layers)


def _drop_state(model: nn.Module, optimizers: Iterable[Any]) -> None:
    frozen = [p for module in model.modules() for _, p, flag in recorded(module) if flag]
    for one in optimizers:
        for parameter in frozen:
            state = one.state.pop(parameter, {})
            # fastai keeps settings there too, which stay.
            if settings := {key: flag for key, flag in state.items() if isinstance(flag, bool)}:
                one.state[parameter] = settings


def world() -> distributed.ProcessGroup | None:
    """Return the group of all processes, if there are several."""
    several = distributed.is_available() and distributed.is_initialized()
    return distributed.group.WORLD if several else None
