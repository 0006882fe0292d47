"""Lightning."""

import os
import pickle
from unittest.mock import patch

import pytest

pytest.importorskip("lightning")
import lightning
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.optim.swa_utils import get_ema_multi_avg_fn

import bnfreeze
from bnfreeze import DriftError, Policy, PolicyError, unfreeze
from bnfreeze.integrations.lightning import FreezeBatchNorm
from tests.helpers import moved, state

from .checks import (
    assert_frozen_as,
    by_policy,
    freeze_by,
    keeps_its_promise,
    resumed_in_a_new_model,
)

# Lightning's own warnings: few workers, how it uses torch.
pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")


class Classifier(lightning.LightningModule):
    """A usual LightningModule; weight decay moves every parameter that is not frozen."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    test_step = validation_step

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        training = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(training, lr=0.01, weight_decay=0.1)


@pytest.fixture
def trainer(tmp_path):
    """Makes a trainer: two epochs on the CPU, and no files unless asked for."""

    def trainer(*callbacks, **options):
        return lightning.Trainer(
            **{"max_epochs": 2} | options,
            accelerator="cpu",
            devices=1,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    return trainer


def rules(policy):
    return {"**": policy, "net.fc": "none"} if "weights" in policy else policy


def fitted_as_promised(model, policy, trainer, loader):
    """The callback freezes, not the test; the model must end as if frozen from the start."""
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        unfreeze(model)
        trainer.fit(Classifier(model), loader, loader)
    assert_frozen_as(model, policy)


@by_policy
def test_fit_keeps_the_promise(model, policy, trainer, loader):
    fitted_as_promised(model, policy, trainer(FreezeBatchNorm(rules(policy))), loader)


@by_policy
def test_fit_freezes_before_ddp_wraps(model, policy, trainer, loader):
    wrapped = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            wrapped.append(type(trainer.model).__name__)

    callbacks = FreezeBatchNorm(rules(policy)), Look()
    with patch.dict(os.environ):  # Lightning leaves the group's address there
        try:
            fitted_as_promised(model, policy, trainer(*callbacks, strategy="ddp"), loader)
        finally:
            torch.distributed.destroy_process_group()
    assert set(wrapped) == {"DistributedDataParallel"}


class Finetuning(BaseFinetuning):
    """Freezes and unfreezes all but the head, as Lightning's guide does."""

    def __init__(self, train_bn):
        super().__init__()
        self.train_bn = train_bn

    def backbone(self, module):
        return [child for name, child in module.net.named_children() if name != "fc"]

    def freeze_before_training(self, module):
        self.freeze(self.backbone(module), train_bn=self.train_bn)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(
                self.backbone(module), optimizer, lr=0.01, train_bn=self.train_bn
            )


@by_policy
@pytest.mark.parametrize("train_bn", [True, False])
def test_what_finetuning_unfreezes_is_frozen_again(model, policy, train_bn, trainer, loader):
    callbacks = Finetuning(train_bn), FreezeBatchNorm(rules(policy))
    if train_bn:
        fitted_as_promised(model, policy, trainer(*callbacks, max_epochs=3), loader)
    else:
        # It leaves weight and bias out of its optimizer, frozen or not.
        freeze_by(model, policy)
        before = bnfreeze.snapshot(model)
        unfreeze(model)
        trainer(*callbacks, max_epochs=3).fit(Classifier(model), loader, loader)
        assert bnfreeze.verify(model, before).ok
        assert {layer.policy for layer in bnfreeze.inspect(model).layers} == {policy}


@by_policy
def test_an_average_by_lerp_leaves_frozen_bits_alone(model, policy, trainer, loader):
    averaging = WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    one = trainer(averaging, FreezeBatchNorm(rules(policy)))
    fitted_as_promised(model, policy, one, loader)


def test_an_average_that_rounds_is_a_drift(model, trainer, loader):
    one = trainer(EMAWeightAveraging(decay=0.9), FreezeBatchNorm("eval+affine"))
    with pytest.raises(DriftError):
        one.fit(Classifier(model), loader)


@by_policy
def test_swa_must_not_reset_frozen_statistics(model, policy, trainer, loader):
    callbacks = FreezeBatchNorm(rules(policy)), StochasticWeightAveraging(0.01, swa_epoch_start=1)
    flags = Policy.parse(policy)
    if flags.freezes_statistics and not policy.startswith("fused"):
        with pytest.raises(PolicyError, match="StochasticWeightAveraging"):
            trainer(*callbacks).fit(Classifier(model), loader)
        return
    freeze_by(model, policy)
    before = bnfreeze.snapshot(model)
    unfreeze(model)
    trainer(*callbacks, max_epochs=3).fit(Classifier(model), loader)
    assert bnfreeze.verify(model, before).ok
    assert_frozen_as(model, policy)


@by_policy
def test_a_resumed_run_stays_frozen(model, policy, trainer, loader, tmp_path):
    unfrozen = list(model.state_dict())
    saving = ModelCheckpoint(tmp_path, filename="first")
    trainer(FreezeBatchNorm(rules(policy)), saving).fit(Classifier(model), loader)
    stored = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert list(stored) == [f"net.{name}" for name in unfrozen]

    with resumed_in_a_new_model(model, policy) as fresh:
        trainer(FreezeBatchNorm(rules(policy)), max_epochs=4).fit(
            Classifier(fresh), loader, ckpt_path=tmp_path / "first.ckpt", weights_only=True
        )


@by_policy
def test_only_fit_freezes(model, policy, trainer, loader):
    module, callback = Classifier(model), FreezeBatchNorm(rules(policy))
    one = trainer(callback)
    one.test(module, loader, verbose=False)
    one.predict(module, loader)
    assert {layer.policy for layer in bnfreeze.inspect(model).layers} == {"none"}
    one.fit(module, loader)
    before = bnfreeze.snapshot(model, tensors="all")
    expected = model.eval()(loader.dataset.tensors[0])
    one.test(module, loader, verbose=False)
    assert torch.equal(torch.cat(one.predict(module, loader)), expected)
    assert bnfreeze.snapshot(model, tensors="all") == before


# A start later in the training.


class Watch(Callback):
    """Keeps the bits at the start of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, module):
        self.seen.append(state(module.net))


def fit_late(model, policy, trainer, loader, strategy="auto"):
    """Fit for three epochs, frozen from the second; return what must have been frozen."""
    watch = Watch()
    one = trainer(FreezeBatchNorm(policy, start_epoch=1), watch, max_epochs=3, strategy=strategy)
    one.fit(Classifier(model), loader)
    frozen = set(bnfreeze.snapshot(model).names)
    assert frozen <= moved(watch.seen[0], model)
    assert not frozen & moved(watch.seen[1], model)
    assert_frozen_as(model, policy)
    return one, frozen


@by_policy
def test_a_late_start_freezes_what_was_trained(model, policy, trainer, loader):
    one, frozen = fit_late(model, policy, trainer, loader)
    kept = one.optimizers[0].state
    assert {name for name, p in model.named_parameters() if p not in kept} == frozen & {
        name for name, _ in model.named_parameters()
    }


def test_a_late_start_may_be_a_step(model, trainer, loader):
    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            policies.append({layer.policy for layer in bnfreeze.inspect(model).layers})

    policies = []
    trainer(FreezeBatchNorm("eval", start_step=3), Look()).fit(Classifier(model), loader)
    assert policies == [{"none"}, {"none"}, {"none"}, {"eval"}]


@pytest.mark.parametrize(
    ("policy", "strategy"),
    [("eval", "ddp"), ("eval+affine", "ddp_find_unused_parameters_true"), ("eval+affine", "ddp")],
)
def test_inside_ddp_only_statistics_may_start_late(model, policy, strategy, trainer, loader):
    with patch.dict(os.environ):
        try:
            if (policy, strategy) != ("eval+affine", "ddp"):
                fit_late(model, policy, trainer, loader, strategy)
                return
            before = state(model)
            with pytest.raises(PolicyError, match="find_unused_parameters"):
                fit_late(model, policy, trainer, loader, strategy)
            assert not moved(before, model)  # refused before the first step
        finally:
            torch.distributed.destroy_process_group()


# Fabric: the user writes the loop.


@by_policy
def test_fabric_keeps_the_promise(model, policy, loader):
    freeze_by(model, policy)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=0.01, weight_decay=0.1)
    prepared, optimizer = fabric.setup(model, optimizer)
    with (
        keeps_its_promise(model, policy),
        bnfreeze.guard(prepared, optimizer=optimizer) as watch,
    ):
        for images, labels in fabric.setup_dataloaders(loader):
            prepared.train()
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(prepared(images), labels))
            optimizer.step()
    assert watch.step == 2
    assert_frozen_as(model, policy)


def test_patterns_match_through_fabric(model):
    prepared = lightning.Fabric(accelerator="cpu", devices=1).setup(model)
    report = bnfreeze.freeze(prepared, {"layer1": "eval"})
    assert sum(row.policy == "eval" for row in report.layers) == 2


# Errors.


def test_a_drift_ends_the_training_after_its_step(model, trainer, loader):
    class Meddle(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 2:
                module.net.bn1.running_mean += 1

    one = trainer(FreezeBatchNorm("eval"), Meddle())
    with pytest.raises(DriftError, match=r"bn1\.running_mean.* step 3"):
        one.fit(Classifier(model), loader)
    assert one.global_step < 4


def test_without_a_guard_nothing_is_watched(model, trainer, loader):
    class Meddle(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.net.bn1.running_mean += 1

    trainer(FreezeBatchNorm("eval", guard=False), Meddle()).fit(Classifier(model), loader)


@pytest.mark.parametrize(("every", "step"), [(1, 1), (3, 3)])
def test_the_options_of_the_guard_are_passed_on(model, trainer, loader, every, step):
    class Meddle(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.net.fc.bias.data.add_(1)
            module.net.bn1.running_mean += 1

    watching = FreezeBatchNorm("affine", every=every, tensors="**.running_mean")
    with pytest.raises(DriftError, match=f"running_mean .*step.* {step}[^0-9]"):
        trainer(watching, Meddle()).fit(Classifier(model), loader)


def test_an_error_in_training_ends_the_watch_and_is_what_is_raised(model, trainer, loader):
    class Break(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(FreezeBatchNorm(), Break()).fit(Classifier(model), loader)
    model.bn1.running_mean += 1
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    model(loader.dataset.tensors[0]).sum().backward()
    optimizer.step()  # no guard is left behind that would raise


def test_the_other_order_is_refused_before_training(model, trainer, loader):
    before = bnfreeze.snapshot(model, tensors="all")
    for other in (Finetuning(False), BackboneFinetuning(), WeightAveraging()):
        with pytest.raises(PolicyError, match="FreezeBatchNorm"):
            trainer(FreezeBatchNorm(), other).fit(Classifier(model), loader)
    unfreeze(model)
    assert bnfreeze.snapshot(model, tensors="all") == before


class Converts(Callback):
    """Does what ``Trainer(sync_batchnorm=True)`` does at this point on a GPU."""

    def on_fit_start(self, trainer, module):
        module.net = nn.SyncBatchNorm.convert_sync_batchnorm(module.net)


def test_a_callback_that_replaces_frozen_layers_is_refused_before_training(model, trainer, loader):
    with pytest.raises(PolicyError, match="sync_batchnorm"):
        trainer(Converts(), FreezeBatchNorm()).fit(Classifier(model), loader)


def test_converting_leaves_fused_layers_alone(model, trainer, loader):
    trainer(Converts(), FreezeBatchNorm("fused")).fit(Classifier(model), loader)
    assert_frozen_as(model, "fused")


def test_layers_that_are_not_there_yet_are_refused(trainer, loader):
    class Late(Classifier):
        def configure_model(self):
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4))

    with pytest.raises(PolicyError, match="norm layer"):
        trainer(FreezeBatchNorm()).fit(Late(None), loader)


def test_inspect_names_base_finetuning(model, trainer, loader):
    trainer(Finetuning(train_bn=False), max_epochs=1).fit(Classifier(model), loader)
    found = [one for one in bnfreeze.inspect(model).findings if one.name == "layer1.bn1"]
    assert [one.code for one in found] == ["batch-stats-in-train"]
    assert "BaseFinetuning" in found[0].message


def test_a_trainer_that_has_run_can_be_pickled(model, trainer, loader):
    callback = FreezeBatchNorm("fused")
    trainer(callback).fit(Classifier(model), loader)
    assert len(callback.report.layers) == 6
    again = pickle.loads(pickle.dumps(callback))
    trainer(again).fit(Classifier(model), loader)
    assert len(again.report.layers) == 6


def test_fit_leaves_in_eval_mode_what_was_put_there(model, trainer, loader):
    """docs/limits.md: inspect and verify do not agree about this loop (Lightning#18930)."""
    module = Classifier(model)
    model.eval()
    before = bnfreeze.snapshot(module, tensors="**.running_*")
    assert {one.code for one in bnfreeze.inspect(module).findings} >= {"train-undoes-eval"}
    trainer().fit(module, loader, loader)
    assert bnfreeze.verify(module, before).ok
