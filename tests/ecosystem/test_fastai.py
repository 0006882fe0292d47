"""fastai's Learner, on scikit-learn's digits."""

import pytest

pytest.importorskip("fastai")
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnfreeze
from bnfreeze import DriftError, PolicyError
from bnfreeze.integrations.fastai import FreezeBatchNorm
from tests.helpers import moved, state

from .checks import POLICIES, assert_frozen_as, by_policy, freeze_by, keeps_its_promise

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
        one.logger = lambda *_: None
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
        with one.no_bar():
            one.fine_tune(2, base_lr=0.01)
    assert_frozen_as(model, policy)
