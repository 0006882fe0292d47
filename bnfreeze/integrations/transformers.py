"""Transformers: frozen before ``Trainer`` wraps the model, watched from first step to last."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn
from transformers import TrainerCallback

from bnfreeze.errors import PolicyError
from bnfreeze.integrations.keeper import Keeper

__all__ = ["FreezeBatchNorm"]


class FreezeBatchNorm(Keeper, TrainerCallback):
    """Freeze norm layers for ``Trainer``, and prove that they stayed frozen while it trains.

    ``Trainer(model, ..., callbacks=[FreezeBatchNorm({"model.backbone": "eval+affine"})])`` freezes
    at once. A drift ends ``train`` with a `DriftError`. The model is left frozen. Where the trainer
    builds the model itself (``model_init``), or the callback is added later, it freezes as training
    begins; that is too late on several devices, and refused. Arguments are those of `Keeper`.
    """

    def on_init_end(self, *_: Any, model: nn.Module | None, **events: Any) -> None:
        if model is not None:
            self.hold(model)

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Any, **events: Any) -> None:
        held = self.hold(model)
        # The model is given here without what wraps it, so that freeze cannot see by itself.
        if held and distributed.is_available() and distributed.is_initialized():
            raise PolicyError(
                "DistributedDataParallel wraps the model already, and would wait for gradients "
                "that no longer come: give FreezeBatchNorm to the Trainer as it is built, or "
                "call bnfreeze.freeze at the end of model_init."
            )
        self.watch(model, optimizer)

    def on_train_end(self, *_: Any, **events: Any) -> None:
        self.close()
