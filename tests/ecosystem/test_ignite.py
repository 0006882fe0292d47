"""Ignite."""

import pytest

pytest.importorskip("ignite")
import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Accuracy

import bnfreeze

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise

pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")


def engine(model):
    """A supervised trainer; it calls ``model.train()`` before every step."""
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=0.01, weight_decay=0.1)
    return create_supervised_trainer(model, optimizer, torch.nn.CrossEntropyLoss()), optimizer


@by_policy
def test_a_supervised_trainer_keeps_the_promise(model, policy, loader):
    freeze_by(model, policy)
    trainer, optimizer = engine(model)
    evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy()})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(loader))
    with keeps_its_promise(model, policy), bnfreeze.guard(model, optimizer=optimizer) as watch:
        trainer.run(loader, max_epochs=2)
    assert watch.step == 4
    assert_frozen_as(model, policy)


@by_policy
def test_a_checkpoint_is_loaded_into_a_new_frozen_model(model, policy, loader, tmp_path):
    freeze_by(model, policy)
    trainer, optimizer = engine(model)
    saving = Checkpoint({"model": model, "optimizer": optimizer}, DiskSaver(str(tmp_path)))
    trainer.add_event_handler(Events.COMPLETED, saving)
    trainer.run(loader, max_epochs=1)
    fresh = type(model)()
    freeze_by(fresh, policy)
    again, optimizer = engine(fresh)
    Checkpoint.load_objects(
        {"model": fresh, "optimizer": optimizer}, tmp_path / saving.last_checkpoint
    )
    with keeps_its_promise(fresh, policy):
        again.run(loader, max_epochs=1)
    assert_frozen_as(fresh, policy)


def test_a_drift_ends_the_run(model, loader):
    bnfreeze.freeze(model, "eval")
    trainer, optimizer = engine(model)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def meddle():
        model.bn1.running_mean += 1

    with (
        pytest.raises(bnfreeze.DriftError, match=r"bn1\.running_mean.* step 3"),
        bnfreeze.guard(model, optimizer=optimizer),
    ):
        trainer.run(loader, max_epochs=2)
    assert trainer.state.iteration == 3
