"""DDP, FSDP2 and SyncBatchNorm."""

import pytest
import torch.distributed as dist
from torch import nn

import bnfreeze

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


# One test, because starting two processes takes longer than all that they do.
def test_on_two_ranks_frozen_tensors_stay_as_they_are(tmp_path):
    from . import ranks

    assert ranks.run(tmp_path, ranks.USUAL) == []


@pytest.mark.slow  # the same with every policy
def test_on_two_ranks_every_policy_keeps_its_promise(tmp_path):
    from . import ranks

    assert ranks.run(tmp_path, ranks.EVERY) == []


@by_policy
def test_a_converted_model_is_frozen(model, images, policy):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze_by(model, policy)
    assert_frozen_as(model, policy)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


def test_converting_leaves_fused_layers_alone(model, images):
    freeze_by(model, "fused-act")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with keeps_its_promise(converted, "fused-act"):
        train(converted, images)
    assert_frozen_as(converted, "fused-act")


def test_converting_builds_new_layers_that_are_not_frozen(model):
    freeze_by(model, "eval")
    before = bnfreeze.snapshot(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert {layer.policy for layer in bnfreeze.inspect(converted).layers} == {"none"}
    assert not bnfreeze.verify(converted, before).ok
