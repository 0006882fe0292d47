"""What the callbacks of all trainers do, whatever the trainer calls its events."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import distributed, nn
from torch.optim import Optimizer

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
from bnfreeze.torch_private import _BatchNorm
from bnfreeze.verification.drift_report import DriftError
from bnfreeze.verification.guard import Guard, guard

__all__ = ["FreezeCallback"]

_PROBED = 32  # batches


class FreezeCallback:
    """Freezes a trainer's model, again if it must, and guards it while it trains.

    Args:
        policy: as in `bnfreeze.freeze`.
        guard: whether to guard the model; `every`, `tensors` and `trace` are as in
            `bnfreeze.guard`.
        recalibrate: data for `bnfreeze.recalibrate`, which is called once, before anything is
            frozen.
        probe: True calls `bnfreeze.probe` when training begins, on the first 32 batches of the
            training data; or other data for it. If the statistics do not fit, a `BnfreezeWarning`
            gives the advice.
        forward: how to run the model on a batch, for both, as in `bnfreeze.probe`.

    With several processes, `recalibrate` and `probe` pool over all of them.

    Attributes:
        report: what was frozen, and how; None before that.
        recalibrated: the report of `recalibrate`; None without one.
        probed: the report of `probe`; None without one.

    Raises:
        PolicyError: an unknown policy.
    """

    def __init__(
        self,
        policy: Policy | str | Mapping[str, Policy | str] = "eval+affine",
        *,
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
        self._policy, self._guarded = policy, guard
        self._options: dict[str, Any] = {"every": every, "tensors": tensors, "trace": trace}
        self.recalibrated: RecalibrationReport | None = None
        self.probed: ProbeReport | None = None
        self._data, self._probe, self._forward = recalibrate, probe, forward
        self._frozen = 0
        self._guard: Guard | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A trainer may be pickled to be sent to other processes; these cannot be.
        return self.__dict__ | {"report": None, "recalibrated": None, "_guard": None}

    def freeze(self, model: nn.Module) -> bool:
        """Freeze the model, or freeze again what something else has thawed.

        Returns:
            Whether anything was frozen that was not, or not by this policy.

        Raises:
            PolicyError: the policy is impossible here, or the model has no norm layer.
            CalibrationError: the data to recalibrate with cannot be used.
        """
        if self._data is not None:
            self.recalibrated = recalibrate(
                model, self._data, forward=self._forward, process_group=_world()
            )
            self._data = None
        report = freeze(model, self._policy)
        self._frozen = _frozen(model)
        changed = any(row.actions for row in report.layers)
        if changed or self.report is None:
            self.report = report
        return changed

    def look(self, model: nn.Module, training_data: Iterable[Any] | None) -> None:
        """Probe the model, if that was asked for, and warn if its statistics do not fit.

        Raises:
            TypeError: nothing in a batch looks like the model's input.
            CalibrationError: the data cannot be used.
        """
        if self._probe is False:
            return
        data, most = (training_data, _PROBED) if self._probe is True else (self._probe, None)
        if data is None:
            return
        self.probed = probe(
            model, data, forward=self._forward, max_batches=most, process_group=_world()
        )
        if any(finding.code == "stats-shifted" for finding in self.probed.findings):
            warnings.warn(self.probed.advice, BnfreezeWarning, stacklevel=2)

    def looks_live(self, model: nn.Module) -> bool:
        """Whether a tool that looks for torch's batch norm would find a frozen layer."""
        layers = inspect_model(model).layers
        still = {layer.name for layer in layers if not layer.updates_statistics}
        return any(
            isinstance(module, _BatchNorm) and name in still
            for name, module in model.named_modules()
        )

    def check(self, model: nn.Module) -> None:
        """Check that no frozen layer was replaced by a live one.

        Raises:
            PolicyError: how many are left, and what may have replaced the others.
        """
        if (left := _frozen(model)) < self._frozen:
            raise PolicyError(
                f"Only {left} of {self._frozen} frozen norm layers are left: the trainer has "
                f"replaced the others by live ones, as sync_batchnorm=True does. Turn that off, "
                f"because frozen layers need no synchronisation; or use the policy 'fused', whose "
                f"layers it does not replace."
            )

    def watch(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Start the guard; `close` ends it. A guard of an earlier training is dropped.

        Raises:
            PolicyError: nothing is frozen.
        """
        self.close(DriftError())
        if self._guarded:
            # With sharded parameters each rank sees only its own part, so all check together.
            sharded = any(shard_of(parameter) is not None for parameter in model.parameters())
            group = distributed.group.WORLD if sharded else None
            watch = guard(model, optimizer=optimizer, process_group=group, **self._options)
            self._guard = watch.__enter__()

    def close(self, error: BaseException | None = None) -> None:
        """Check for the last time, and end the guard.

        Args:
            error: what ended the training, if it failed. A drift is added to it as a note. If it
                is a `DriftError`, nothing more is checked.

        Raises:
            DriftError: something has changed.
        """
        watch, self._guard = self._guard, None
        if watch is not None:
            watch.__exit__(type(error) if error else None, error, None)


def _frozen(model: nn.Module) -> int:
    return sum(layer.policy != "none" for layer in inspect_model(model).layers)


def _world() -> distributed.ProcessGroup | None:
    """All processes, if there are several."""
    several = distributed.is_available() and distributed.is_initialized()
    return distributed.group.WORLD if several else None
