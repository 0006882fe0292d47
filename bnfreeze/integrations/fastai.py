"""fastai: freezes when ``fit`` begins, guards from first step to last."""

from __future__ import annotations

from typing import Any

from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.optim import Optimizer

from bnfreeze.integrations.callback import FreezeCallback


class FreezeBatchNorm(FreezeCallback, Callback):
    """Freeze norm layers for each ``fit`` of a ``Learner``, and check that they stay frozen.

    ``Learner(..., cbs=FreezeBatchNorm({"0": "eval+affine"}))`` freezes the body of a learner made
    by ``vision_learner``. fastai trains batch norm in frozen groups too (``train_bn=True``), and
    ``freeze``, ``unfreeze`` and ``fine_tune`` set ``requires_grad`` of everything; each ``fit``
    freezes again what they have thawed, before its first step. A drift ends ``fit`` with a
    `DriftError`. The model stays frozen afterwards. The arguments are those of `FreezeCallback`;
    `start_epoch` and `start_step` count over all calls of ``fit`` since the callback was made.
    """

    order = -5  # after the model is on its device, before MixedPrecision and DistributedTrainer

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._epochs = self._steps = 0

    def before_fit(self) -> None:
        if self.learn.opt is not None:  # so not for validate() and predict() of a new learner
            self.begin(self.learn.model)

    def before_train(self) -> None:
        self.check(self.learn.model)
        self.at_epoch(*self._now())

    def before_batch(self) -> None:
        if self.learn.training:
            self.at_batch(*self._now())

    def after_step(self) -> None:
        self._steps += 1
        if self._guard is not None and not isinstance(self.learn.opt, OptimWrapper):
            self._guard.after_step()

    def after_train(self) -> None:
        self._epochs += 1

    def after_fit(self) -> None:
        self.close()

    def watch(self, model: nn.Module, optimizers: Any = None) -> None:
        # fastai's own optimizers have no hooks for the guard: after_step is called instead.
        super().watch(model, [one for one in optimizers if isinstance(one, Optimizer)])

    def _now(self) -> tuple[Any, ...]:
        opt = self.learn.opt
        opt = opt.opt if isinstance(opt, OptimWrapper) else opt
        return self.learn.model, [opt], self._epochs, self._steps
