"""Lightning: freezes before the strategy wraps the model, guards from first step to last."""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same library under its other name
    from pytorch_lightning import Callback, LightningModule, Trainer

from bnfreeze.errors import PolicyError
from bnfreeze.inspection.live import inspect_model
from bnfreeze.integrations.callback import FreezeCallback
from bnfreeze.torch_private import _BatchNorm


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
        own = trainer.callbacks.index(self)
        for place, other in enumerate(trainer.callbacks):
            # How to know BaseFinetuning, WeightAveraging and StochasticWeightAveraging.
            writes = hasattr(other, "freeze_before_training") or hasattr(other, "should_update")
            if writes and place > own:
                raise PolicyError(
                    f"{type(other).__name__} would change the model after FreezeBatchNorm has "
                    f"frozen it: put FreezeBatchNorm after it in the list of callbacks."
                )
            if hasattr(other, "reset_batch_norm_and_save_state") and _looks_live(pl_module):
                raise PolicyError(
                    f"{type(other).__name__} gives each batch norm new statistics at its end: "
                    f"use the policy 'fused', whose layers it leaves alone."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(pl_module, trainer.train_dataloader)  # again: the strategy has wrapped it

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_epoch(*_now(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.at_batch(*_now(trainer, pl_module))

    def watch(self, model: nn.Module, optimizers: Any = None) -> None:
        super().watch(model)  # without optimizers: finetuning callbacks may add groups

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.close(exception)


def _looks_live(model: nn.Module) -> bool:
    """Whether who looks for torch's batch norm would find a frozen layer."""
    still = {layer.name for layer in inspect_model(model).layers if not layer.updates_statistics}
    modules = model.named_modules()
    return any(isinstance(module, _BatchNorm) and name in still for name, module in modules)


def _now(trainer: Trainer, model: nn.Module) -> tuple[Any, ...]:
    return model, trainer.optimizers, trainer.current_epoch, trainer.global_step
