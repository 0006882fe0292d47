"""MMEngine: freezes when the runner's training begins, guards from first iteration to last."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from bnfreeze.integrations.callback import FreezeCallback, frozen_pairs


@HOOKS.register_module()
class FreezeBatchNormHook(FreezeCallback, Hook):
    """Freeze norm layers for ``Runner.train``, and check that they stay frozen.

    In a config:

        custom_imports = dict(imports=["bnfreeze.integrations.mmengine"])
        custom_hooks = [dict(type="FreezeBatchNormHook", policy={"backbone": "eval+affine"})]

    It freezes after the runner has initialised the weights and loaded the checkpoint. The average
    of ``EMAHook`` gets the frozen values, so validation and checkpoints use the same ones. A drift
    ends ``train`` with a `DriftError`. The model stays frozen afterwards.

    The runner wraps the model for several devices when it is built, which is before any hook runs.
    Policies that freeze weight and bias then need ``find_unused_parameters=True`` in the config.
    `start_step` counts iterations. The arguments are those of `FreezeCallback`.
    """

    priority = "ABOVE_NORMAL"  # before EMAHook, which is NORMAL

    def before_train(self, runner: Runner) -> None:
        self.begin(runner.model)

    def before_train_epoch(self, runner: Runner) -> None:
        self.check(runner.model)
        self.at_epoch(*_now(runner))

    def before_train_iter(self, runner: Runner, *_: Any, **batch: Any) -> None:
        self.at_batch(*_now(runner))

    def before_val_epoch(self, runner: Runner) -> None:
        self._align(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: Any) -> None:
        self._align(runner)

    def after_train(self, runner: Runner) -> None:
        self._align(runner)
        self.close()

    def _align(self, runner: Runner) -> None:
        """An average of equal numbers may be rounded, and before a late start they differ."""
        for hook in runner.hooks if self.started else ():
            if isinstance(hook, EMAHook):
                for live, average in frozen_pairs(hook.src_model, hook.ema_model.module):
                    average.copy_(live)


def _now(runner: Runner) -> tuple[Any, ...]:
    wrapper = runner.optim_wrapper
    several = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return runner.model, [one.optimizer for one in several], runner.epoch, runner.iter
