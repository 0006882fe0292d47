"""Transformers' Trainer."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import torch
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from transformers import Trainer, TrainerCallback, TrainingArguments

import bnfreeze
from bnfreeze import DriftError, PolicyError, unfreeze
from bnfreeze.integrations.transformers import FreezeBatchNorm

from .checks import (
    assert_frozen_as,
    by_policy,
    freeze_by,
    keeps_its_promise,
    resumed_in_a_new_model,
)

# Transformers and Accelerate warn about their use of torch, and about pinned memory.
pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")


class WithLoss(nn.Module):
    """The interface that Trainer needs of a model that is not from Transformers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


DATA = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 4} for index in range(8)]


@pytest.fixture
def trainer(tmp_path):
    """Makes a trainer of two epochs on the CPU."""

    def trainer(model, *callbacks, **options):
        arguments = {"num_train_epochs": 2, "save_strategy": "no"} | options
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=tmp_path,
                use_cpu=True,
                per_device_train_batch_size=4,
                learning_rate=0.01,
                weight_decay=0.1,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                **arguments,
            ),
            train_dataset=DATA,
            eval_dataset=DATA,
            callbacks=list(callbacks),
        )

    return trainer


def rules(policy):
    return {"**": policy, "net.fc": "none"} if "weights" in policy else policy


@by_policy
def test_train_keeps_the_promise(model, policy, trainer):
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        unfreeze(model)
        one = trainer(WithLoss(model), FreezeBatchNorm(rules(policy)), eval_strategy="epoch")
        assert_frozen_as(model, policy)  # at once
        one.train()
    assert_frozen_as(model, policy)


@by_policy
def test_predicting_changes_nothing(model, policy, trainer):
    one = trainer(WithLoss(model), FreezeBatchNorm(rules(policy)))
    one.train()
    before = bnfreeze.snapshot(model, tensors="all")
    expected = model.eval()(torch.stack([item["pixel_values"] for item in DATA[:4]]))
    found = torch.from_numpy(one.predict(DATA[:4]).predictions)
    torch.testing.assert_close(found, expected)
    assert bnfreeze.snapshot(model, tensors="all") == before


@by_policy
def test_training_under_autocast_keeps_the_promise(model, policy, trainer):
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        unfreeze(model)
        trainer(WithLoss(model), FreezeBatchNorm(rules(policy)), bf16=True).train()
    assert_frozen_as(model, policy)


@by_policy
def test_a_resumed_run_stays_frozen(model, policy, trainer, tmp_path):
    trainer(WithLoss(model), FreezeBatchNorm(rules(policy)), save_strategy="epoch").train()
    with resumed_in_a_new_model(model, policy) as fresh:
        one = trainer(WithLoss(fresh), FreezeBatchNorm(rules(policy)), num_train_epochs=4)
        one.train(resume_from_checkpoint=True)
    assert one.state.global_step == 8


@pytest.mark.parametrize("start", [{"start_epoch": 1}, {"start_step": 3}])
def test_a_late_start_freezes_what_was_trained(model, trainer, start):
    """And the optimizer keeps no momentum for it."""

    class Look(TrainerCallback):
        def on_step_end(self, *_, **events):
            policies.append({layer.policy for layer in bnfreeze.inspect(model).layers})

    policies = []
    one = trainer(WithLoss(model), FreezeBatchNorm("eval+affine", **start), Look())
    one.train()
    late = start.get("start_step", 2)
    assert policies == [{"none"}] * late + [{"eval+affine"}] * (4 - late)
    assert model.bn1.weight not in one.optimizer.state
    assert model.fc.weight in one.optimizer.state


# Errors.


class Meddle(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **events):
        if state.global_step == 2:
            model.net.bn1.running_mean += 1


def test_a_drift_ends_the_training_after_its_step(model, trainer):
    one = trainer(WithLoss(model), FreezeBatchNorm("eval"), Meddle())
    with pytest.raises(DriftError, match=r"bn1\.running_mean.* step 3"):
        one.train()


def test_without_a_guard_nothing_is_watched(model, trainer):
    trainer(WithLoss(model), FreezeBatchNorm("eval", guard=False), Meddle()).train()


def test_the_options_of_the_guard_are_passed_on(model, trainer):
    watching = FreezeBatchNorm("eval", every=4, tensors="**.running_mean")
    with pytest.raises(DriftError, match=r"running_mean.* 1 and 4"):
        trainer(WithLoss(model), watching, Meddle()).train()


def test_training_that_failed_leaves_no_guard_behind(model, trainer):
    class Break(TrainerCallback):
        def on_step_end(self, *_, **events):
            raise RuntimeError("out of luck")

    callback = FreezeBatchNorm("eval")
    one = trainer(WithLoss(model), callback, Break())
    with pytest.raises(RuntimeError, match="out of luck"):
        one.train()
    one.remove_callback(Break)
    model.bn1.running_mean += 1
    one.train()
    assert callback.report is not None


def test_each_model_that_the_trainer_builds_is_frozen(model, tmp_path):
    callback = FreezeBatchNorm("eval")
    built = []

    def model_init():
        built.append(WithLoss(type(model)()))
        return built[-1]

    one = Trainer(
        model_init=model_init,
        args=TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[], max_steps=2),
        train_dataset=DATA,
        callbacks=[callback],
    )
    one.train()
    assert one.model is built[-1]
    assert_frozen_as(built[-1], "eval")


def test_a_callback_added_later_freezes_at_the_start_of_training(model, trainer):
    one = trainer(WithLoss(model))
    one.add_callback(FreezeBatchNorm("fused"))
    one.train()
    assert_frozen_as(model, "fused")


def test_freezing_at_the_start_of_training_is_refused_inside_ddp(model):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        late = FreezeBatchNorm()
        with pytest.raises(PolicyError, match="Trainer"):
            late.on_train_begin(None, None, None, model=model, optimizer=None)
        unfreeze(model)
        early = FreezeBatchNorm()
        early.on_init_end(None, None, None, model=model)
        early.on_train_begin(None, None, None, model=model, optimizer=None)
        early.on_train_end(None, None, None)
    finally:
        distributed.destroy_process_group()


def test_a_rule_that_matches_nothing_is_refused_before_training(trainer, model):
    with pytest.raises(PolicyError, match="backbone"):
        trainer(WithLoss(model), FreezeBatchNorm({"backbone": "eval"}))


def test_it_recalibrates_before_freezing_and_probes_at_the_start(model, trainer):
    before = model.bn1.running_mean.clone()
    callback = FreezeBatchNorm(
        "eval+affine",
        recalibrate=torch.utils.data.DataLoader(DATA, 4),
        probe=True,
        forward=lambda model, batch: model(**batch),
    )
    trainer(WithLoss(model), callback).train()
    assert "net.bn1" in callback.recalibrated.recalibrated
    assert not torch.equal(model.bn1.running_mean, before)
    assert callback.probed.samples == len(DATA)
    assert all(layer.mean_shift.largest < 0.5 for layer in callback.probed.layers)
