"""Transformers: freezes before ``Trainer`` wraps the model, guards from first step to last."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from bnfreeze.errors import PolicyError
from bnfreeze.integrations.callback import FreezeCallback, world


class FreezeBatchNorm(FreezeCallback, TrainerCallback):
    """Freeze norm layers for ``Trainer``, and check that they stay frozen while it trains.

    ``Trainer(model, ..., callbacks=[FreezeBatchNorm({"model.backbone": "eval+affine"})])`` freezes
    at once. A drift ends ``train`` with a `DriftError`. The model stays frozen afterwards. If the
    trainer builds the model itself (``model_init``), or the callback is added later, it freezes
    when training begins; on several devices that is too late, and refused. The arguments are those
    of `FreezeCallback`.
    """

    def on_init_end(self, *_: Any, model: nn.Module | None, **events: Any) -> None:
        if model is not None:
            self.prepare(model)

    def on_train_begin(self, *_: Any, model: nn.Module, **events: Any) -> None:
        changed = self.begin(model, events.get("train_dataloader"))
        if changed and world() is not None:
            raise PolicyError(
                "The model was frozen only when training began, and it is already wrapped for "
                "several devices: pass FreezeBatchNorm to the Trainer when you build it, or call "
                "bnfreeze.freeze at the end of model_init."
            )

    def on_epoch_begin(self, _: Any, state: Any, *args: Any, **events: Any) -> None:
        self.at_epoch(*_now(state, **events))

    def on_step_begin(self, _: Any, state: Any, *args: Any, **events: Any) -> None:
        self.at_batch(*_now(state, **events))

    def on_train_end(self, *_: Any, **events: Any) -> None:
        self.close()


def _now(state: Any, *, model: nn.Module, optimizer: Any, **events: Any) -> tuple[Any, ...]:
    return model, [optimizer], state.epoch or 0, state.global_step
