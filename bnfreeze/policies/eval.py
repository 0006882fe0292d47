"""The policy ``eval``: the layer always normalises with its running statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from bnfreeze.policies.class_swap import FrozenLayer
from bnfreeze.policies.record import record_of, set_record
from bnfreeze.policies.stats import OnCopies


class ForceEval(FrozenLayer):
    """Normalises with the running statistics, whatever mode is asked for."""

    prefix: ClassVar[str] = "Eval"

    # torch.jit.script must not compile the property. It reads the flag in the instance's dict,
    # which is always False. The scripted copy is not frozen: its train() takes effect.
    __jit_unused_properties__: tuple[str, ...] = ("training",)

    @property
    def training(self) -> bool:
        """Always False."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        # train() and eval() of any module above end here, and so does a tool that sets the flag
        # itself. The flag is remembered: unfreeze gives it back.
        record = record_of(self)
        if record is not None:
            set_record(self, replace(record, training=mode))


class ForceEvalOnCopies(OnCopies, ForceEval):
    """As `ForceEval`, for a forward that may write to the statistics in eval mode, too."""

    prefix: ClassVar[str] = "Eval"


class ForceEvalInstance(ForceEvalOnCopies):
    """As `ForceEval`, for instance norm.

    Instance norm uses its running statistics only if ``track_running_stats`` is true. Some
    versions of torch (2.10) also write them back in eval mode, rounded.
    """

    @property
    def track_running_stats(self) -> bool:
        """Always True."""
        return True

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        """Ignore it: code that flips the flag and back would read True, and leave it False."""
