"""What every trainer's callback does, whatever the trainer calls its moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from bnfreeze.errors import PolicyError
from bnfreeze.freezing.freeze import freeze
from bnfreeze.freezing.report import FreezeReport
from bnfreeze.freezing.rules import parse_rules
from bnfreeze.inspection.live import inspect_model
from bnfreeze.policies.policy import Policy
from bnfreeze.verification.bits import shard
from bnfreeze.verification.guard import Guard, guard
from bnfreeze.verification.report import DriftError

__all__ = ["Keeper"]


class Keeper:
    """Freezes a trainer's model, as often as it must, and watches it while it trains.

    Args:
        policy: as in `bnfreeze.freeze`.
        guard: whether to watch; `every`, `tensors` and `trace` are as in `bnfreeze.guard`.

    Attributes:
        report: what was frozen, and how; None before.

    Raises:
        PolicyError: an unknown policy.
    """

    def __init__(
        self,
        policy: Policy | str | Mapping[str, Policy | str] = "eval+affine",
        *,
        guard: bool = True,
        every: int = 1,
        tensors: str = "held",
        trace: bool = False,
    ) -> None:
        super().__init__()
        parse_rules(policy)  # a slip is told here, and not hours later in a queue
        self.report: FreezeReport | None = None
        self._policy, self._guarded = policy, guard
        self._options: dict[str, Any] = {"every": every, "tensors": tensors, "trace": trace}
        self._frozen = 0
        self._guard: Guard | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A trainer may be pickled, to be sent to other processes: neither can go along.
        return self.__dict__ | {"report": None, "_guard": None}

    def hold(self, model: nn.Module) -> bool:
        """Freeze, or hold again what something has thawed since.

        Returns:
            Whether anything was frozen that was not, or not by this policy.

        Raises:
            PolicyError: the policy cannot be kept, or the model has no norm layer.
        """
        report = freeze(model, self._policy)
        self._frozen = _frozen(model)
        changed = any(row.actions for row in report.layers)
        if changed or self.report is None:
            self.report = report
        return changed

    def looks_live(self, model: nn.Module) -> bool:
        """Whether a tool that looks for torch's batch norm takes a held layer for a live one."""
        layers = inspect_model(model).layers
        still = {layer.name for layer in layers if not layer.updates_statistics}
        return any(
            isinstance(module, _BatchNorm) and name in still
            for name, module in model.named_modules()
        )

    def check(self, model: nn.Module) -> None:
        """See that nothing has built live layers in place of frozen ones.

        Raises:
            PolicyError: how many are left, and what does such a thing.
        """
        if (left := _frozen(model)) < self._frozen:
            raise PolicyError(
                f"Of {self._frozen} frozen norm layers {left} are left: the trainer has built live "
                f"ones in their place, as sync_batchnorm=True does. Leave it off, frozen layers "
                f"have nothing to synchronise; or use the policy 'fused', which it passes by."
            )

    def watch(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Keep watch until `close`; what an earlier training left on watch is dismissed.

        Raises:
            PolicyError: nothing is held.
        """
        self.close(DriftError())
        if self._guarded:
            # Each rank sees its own shard alone, so they have to check together.
            sharded = any(shard(parameter) is not None for parameter in model.parameters())
            group = distributed.group.WORLD if sharded else None
            watch = guard(model, optimizer=optimizer, process_group=group, **self._options)
            self._guard = watch.__enter__()

    def close(self, error: BaseException | None = None) -> None:
        """Compare for the last time, and end the watch.

        Args:
            error: what ended the training, if it has failed. A drift is added to it as a note; to
                a `DriftError` nothing is, nor is there a comparison then.

        Raises:
            DriftError: something has changed.
        """
        watch, self._guard = self._guard, None
        if watch is not None:
            watch.__exit__(type(error) if error else None, error, None)


def _frozen(model: nn.Module) -> int:
    return sum(layer.policy != "none" for layer in inspect_model(model).layers)
