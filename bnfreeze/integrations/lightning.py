"""Lightning: frozen before the strategy wraps the model, watched from first step to last."""

from __future__ import annotations

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer

from bnfreeze.errors import PolicyError
from bnfreeze.integrations.keeper import Keeper

__all__ = ["FreezeBatchNorm"]


class FreezeBatchNorm(Keeper, Callback):
    """Freeze norm layers for ``trainer.fit``, and prove that they stayed frozen.

    Put it last: what ``BackboneFinetuning`` makes trainable is held again. What cannot be kept is
    a `PolicyError` before the first step, a drift a `DriftError`. The model is left frozen. Layers
    built in ``configure_model`` are frozen there, by hand. Arguments are those of `Keeper`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.hold(pl_module)
        behind = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        for other in trainer.callbacks:
            # What BaseFinetuning, WeightAveraging and StochasticWeightAveraging are known by.
            writes = hasattr(other, "freeze_before_training") or hasattr(other, "should_update")
            if other in behind and writes:
                raise PolicyError(
                    f"{type(other).__name__} would change the model behind FreezeBatchNorm's "
                    f"back: put FreezeBatchNorm behind it in the list of callbacks."
                )
            if hasattr(other, "reset_batch_norm_and_save_state") and self.looks_live(pl_module):
                raise PolicyError(
                    f"{type(other).__name__} assigns new statistics to each batch norm at its end: "
                    f"use the policy 'fused', whose layers it passes by."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hold(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.close(exception)
