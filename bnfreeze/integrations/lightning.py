"""Lightning: freezes before the strategy wraps the model, guards from first step to last."""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same library under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer

from bnfreeze.errors import PolicyError
from bnfreeze.integrations.callback import FreezeCallback

__all__ = ["FreezeBatchNorm"]


class FreezeBatchNorm(FreezeCallback, Callback):
    """Freeze norm layers for ``trainer.fit``, and check that they stay frozen.

    Put it last in the list of callbacks: it freezes again what ``BackboneFinetuning`` makes
    trainable. A policy that is impossible raises `PolicyError` before the first step, a drift
    raises `DriftError`. The model stays frozen afterwards. If layers are built in
    ``configure_model``, call `bnfreeze.freeze` there. The arguments are those of `FreezeCallback`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.prepare(pl_module)
        behind = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        for other in trainer.callbacks:
            # How to know BaseFinetuning, WeightAveraging and StochasticWeightAveraging.
            writes = hasattr(other, "freeze_before_training") or hasattr(other, "should_update")
            if other in behind and writes:
                raise PolicyError(
                    f"{type(other).__name__} would change the model after FreezeBatchNorm has "
                    f"frozen it: put FreezeBatchNorm after it in the list of callbacks."
                )
            if hasattr(other, "reset_batch_norm_and_save_state") and self.looks_live(pl_module):
                raise PolicyError(
                    f"{type(other).__name__} gives each batch norm new statistics at its end: "
                    f"use the policy 'fused', whose layers it leaves alone."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reset()
        self.prepare(pl_module)  # again: the strategy has wrapped it
        self.look(pl_module, trainer.train_dataloader)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self.at_epoch(pl_module, trainer.optimizers, **now)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self.at_batch(pl_module, trainer.optimizers, **now)

    def watch(self, model: nn.Module, optimizer: Any = None) -> None:
        super().watch(model)  # finetuning callbacks add groups to the optimizers, and may

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.close(exception)
