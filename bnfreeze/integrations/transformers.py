"""Transformers: frozen before ``Trainer`` wraps the model, watched from first step to last."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from bnfreeze.integrations.keeper import Keeper

__all__ = ["FreezeBatchNorm"]


class FreezeBatchNorm(Keeper, TrainerCallback):
    """Freeze norm layers for ``Trainer``, and prove that they stayed frozen while it trains.

    ``Trainer(model, ..., callbacks=[FreezeBatchNorm({"model.backbone": "eval+affine"})])`` freezes
    at once. A drift ends ``train`` with a `DriftError`. The model is left frozen. Where the trainer
    builds the model itself (``model_init``), each one is frozen as its training begins.

    Args:
        policy: as in `bnfreeze.freeze`.
        guard: whether to watch; `every`, `tensors`, `trace`: as in `bnfreeze.guard`.
    """

    def on_init_end(self, *_: Any, model: nn.Module, **events: Any) -> None:
        self.hold(model)

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Any, **events: Any) -> None:
        self.hold(model)
        self.watch(model, optimizer)

    def on_train_end(self, *_: Any, **events: Any) -> None:
        self.close()
