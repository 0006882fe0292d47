"""Ultralytics: freezes when a training begins, guards from first step to last."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.torch_utils import unwrap_model

from bnfreeze.freezing.freeze import unfreeze
from bnfreeze.integrations.callback import FreezeCallback, frozen_pairs
from bnfreeze.policies.policy import Policy


def freeze_batch_norm(
    yolo: Model, policy: Policy | str | Mapping[str, Policy | str] = "eval+affine", **options: Any
) -> FreezeBatchNorm:
    """Freeze norm layers in each ``yolo.train``, and check that they stay frozen while it trains.

        yolo = YOLO("yolov8n.pt")
        freeze_batch_norm(yolo, {"model.?": "eval+affine"})  # the ten layers of the backbone
        yolo.train(data="coco8.yaml")

    Ultralytics makes all parameters trainable when a training begins, so this freezes after that.
    What it saves is not the model that trains but a moving average of it, in half precision. At the
    end of each epoch the average has the frozen values exactly. In ``best.pt`` and ``last.pt`` they
    are rounded to fp16, and bnfreeze is not needed to load these files. After the training
    ``yolo.model`` is loaded from ``best.pt``, so it is not frozen. A drift ends ``train`` with a
    `DriftError`.

    Args:
        yolo: the model. A second call replaces the first.
        policy: as in `bnfreeze.freeze`. Patterns match names in ``yolo.model``: ``"model.?"`` is
            the layers 0 to 9.
        options: those of `FreezeCallback`. `start_step` counts optimizer steps.

    Returns:
        The callback; its ``report`` says what was frozen.

    Raises:
        PolicyError: an unknown policy.
    """
    callback = FreezeBatchNorm(policy, **options)
    for functions in yolo.callbacks.values():
        functions[:] = [
            one
            for one in functions
            if not isinstance(getattr(one, "__self__", None), FreezeBatchNorm)
        ]
    for event in EVENTS:
        yolo.add_callback(event, getattr(callback, event))
    return callback


class FreezeBatchNorm(FreezeCallback):
    """What `freeze_batch_norm` adds to the callbacks of a model; events are methods."""

    _average: Any = None  # the trainer's ModelEMA

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        self._average = trainer.ema  # a copy of the model, made before it was frozen
        self.begin(trainer.model)

    def on_train_epoch_start(self, trainer: BaseTrainer) -> None:
        if trainer.ema is not self._average:
            self._recover(trainer)
        self.at_epoch(*_now(trainer))

    def on_train_batch_start(self, trainer: BaseTrainer) -> None:
        self.at_batch(*_now(trainer))

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        # Some versions round the average of equal numbers; before a late start they differ.
        for live, average in frozen_pairs(unwrap_model(trainer.model), trainer.ema.ema):
            average.copy_(live)

    def on_train_end(self, trainer: BaseTrainer) -> None:
        self.close()

    def teardown(self, trainer: BaseTrainer) -> None:
        self._average = None
        self.close(sys.exc_info()[1])  # if the training failed, or on other ranks than the first

    def _recover(self, trainer: BaseTrainer) -> None:
        """After a loss of NaN the trainer has loaded last.pt and copied the frozen model."""
        for live, average in frozen_pairs(unwrap_model(trainer.model), self._average.ema):
            live.copy_(average)  # last.pt has them rounded
        unfreeze(trainer.ema.ema)
        trainer.ema.ema.requires_grad_(False)
        self._average = trainer.ema


EVENTS = tuple(name for name in vars(FreezeBatchNorm) if not name.startswith("_"))


def _now(trainer: BaseTrainer) -> tuple[Any, ...]:
    return trainer.model, [trainer.optimizer], trainer.epoch, trainer.ema.updates
