"""fastai's Learner, on scikit-learn's digits."""

import pickle
import warnings
from functools import partial

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pandas and torch.jit warn when fastai imports them
    pytest.importorskip("fastai.callback.schedule")  # gives a Learner fine_tune
import cloudpickle
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import bnfreeze
from bnfreeze import DriftError, PolicyError
from bnfreeze.integrations.fastai import FreezeBatchNorm
from tests.helpers import moved, state

from .checks import (
    assert_frozen_as,
    by_policy,
    freeze_by,
    keeps_its_promise,
    resumed_in_a_new_model,
)

# fastai's own warnings: torch's deprecations, attributes of callbacks.
pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")


def groups(model):
    """Two groups of parameters: what `Learner.freeze` freezes, and the head."""
    body = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    return [body, [*model.fc.parameters()]]


@pytest.fixture
def learner(model, tmp_path):
    """Makes a learner of the digits 0 to 3, with two batches in an epoch."""
    digits = load_digits(n_class=4)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    data = TensorDataset(images[:64] / 16, torch.tensor(digits.target[:64]))

    def learner(*callbacks, **options):
        data_loaders = DataLoaders(DataLoader(data, 32), DataLoader(data, 64), device="cpu")
        usual = {"splitter": groups, "loss_func": nn.CrossEntropyLoss(), "lr": 0.01, "wd": 0.1}
        one = Learner(data_loaders, model, cbs=callbacks, path=tmp_path, **usual | options)
        one.logger = lambda *_: None  # no table of results
        return one

    return learner


@by_policy
@pytest.mark.parametrize("train_bn", [True, False])
def test_fine_tune_keeps_the_promise(model, policy, train_bn, learner):
    """It freezes a group, of which train_bn=True trains batch norm, and unfreezes it later."""
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        bnfreeze.unfreeze(model)
        one = learner(FreezeBatchNorm(policy), train_bn=train_bn)
        one.fine_tune(2, base_lr=0.01)
    assert_frozen_as(model, policy)


class Meddle(Callback):
    def after_backward(self):
        self.learn.model.bn1.running_mean += 1


@pytest.mark.parametrize("opt_func", [SGD, partial(OptimWrapper, opt=torch.optim.SGD)])
def test_a_drift_ends_the_training_after_its_step(model, learner, opt_func):
    one = learner(FreezeBatchNorm("eval"), Meddle(), opt_func=opt_func)
    with pytest.raises(DriftError, match=r"bn1\.running_mean.* step 1"):
        one.fit(1)
    assert one.freeze_batch_norm.report is not None


@pytest.mark.parametrize("opt_func", [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_a_late_start_freezes_what_was_trained(model, learner, opt_func):
    """And the optimizer keeps no momentum for it. Epochs are counted over all fits."""
    before = state(model)
    one = learner(FreezeBatchNorm("eval+affine", start_epoch=2), opt_func=opt_func)
    one.fit(2)
    assert {layer.policy for layer in bnfreeze.inspect(model).layers} == {"none"}
    trained = state(model)
    one.fit(1)
    frozen = set(bnfreeze.snapshot(model).names)
    assert frozen <= moved(before, model)
    assert not frozen & moved(trained, model)
    optimizer = one.opt.opt if isinstance(one.opt, OptimWrapper) else one.opt
    state_of = {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    tensors = {name for name, values in state_of.items() if set(values) - {"do_wd", "force_train"}}
    assert tensors == dict(model.named_parameters()).keys() - frozen
    if optimizer is one.opt:
        assert one.opt.state[model.bn1.bias]["do_wd"] is False


def test_only_fit_freezes(model, learner):
    one = learner(FreezeBatchNorm())
    one.validate()
    one.get_preds()
    assert {layer.policy for layer in bnfreeze.inspect(model).layers} == {"none"}
    one.fit(1)
    assert_frozen_as(model, "eval+affine")


def test_a_saved_run_goes_on_frozen_in_a_new_model(model, learner):
    one = learner(FreezeBatchNorm())
    one.fit(1)
    one.save("first")
    with resumed_in_a_new_model(model, "eval+affine") as fresh:
        two = learner(FreezeBatchNorm())
        two.model = fresh
        two.create_opt()
        two.load("first")
        two.fit(1)


def test_a_learner_with_the_callback_can_be_pickled(model, learner):
    one = learner(FreezeBatchNorm("fused"))
    one.fit(1)
    one.dls = one.loss_func = None
    again = pickle.loads(cloudpickle.dumps(one))
    assert not moved(state(model), again.model)
    assert_frozen_as(again.model, "fused")


def test_layers_that_a_callback_replaces_are_an_error(model, learner):
    class Convert(Callback):
        """Does what `Learner.to_distributed` does at this point."""

        order = 11

        def before_fit(self):
            self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)

    with pytest.raises(PolicyError, match="SyncBatchNorm"):
        learner(FreezeBatchNorm(), Convert()).fit(1)
