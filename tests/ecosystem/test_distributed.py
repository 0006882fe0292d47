"""Several ranks: DDP, FSDP2, SyncBatchNorm."""

import fcntl
import os

import pytest
import torch.distributed as dist
from torch import nn

import bnfreeze
from bnfreeze import FrozenBatchNorm2d, Policy

from .cells import cell
from .checks import assert_frozen_as, freeze_by, keeps_its_promise, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two gloo ranks saw; they run once, for all workers of xdist."""
    from . import ranks

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "ranks"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return ranks.run(folder)


@pytest.fixture
def both(seen, policy, record_property, needs_gpu):
    """``both(scene, says)``: the scene worked, or was refused in these words, on both ranks."""

    def both(scene, says=None, who="PolicyError"):
        (verdict, message), (other, _) = (rank[scene, policy] for rank in seen)
        assert verdict == other
        if verdict == "gpu":
            needs_gpu()
        if says is None:
            assert verdict == "works", message
        else:
            assert verdict == "refused", message
            assert says in message
            record_property("refused", f"{who}: “{says}”")

    return both


DDP = {
    "`DistributedDataParallel`": "ddp_plain",
    "`DistributedDataParallel(broadcast_buffers=False)`": "ddp_without_broadcast",
    "`DistributedDataParallel(static_graph=True)`": "ddp_static_graph",
    "DDP, saved by `torch.distributed.checkpoint`, inspected, resumed": "ddp_resumed",
    "`SyncBatchNorm`, converted, then frozen, on two ranks": "ddp_of_sync",
    "FSDP2, `fully_shard`": "fsdp",
    "FSDP2, `MixedPrecisionPolicy` for all but the norm layers": "fsdp_mixed_but_norm_layers",
    "FSDP2, frozen after wrapping": "fsdp_wrapped_first",
    "FSDP2, frozen in training (statistics broadcast first), then thawed": "fsdp_in_between",
    "FSDP2, saved by `torch.distributed.checkpoint`, inspected, resumed": "fsdp_resumed",
    "DDP, frozen after wrapping with `find_unused_parameters=True`": "ddp_unused",
}


@cell("{how}")
@pytest.mark.parametrize("how", DDP)
def test_ten_steps_on_two_ranks_move_nothing_that_is_held(both, policy, how):
    both(DDP[how])


@cell("DDP, frozen after wrapping")
def test_frozen_once_ddp_waits_for_gradients(both, policy):
    held = Policy.parse(policy).freezes_affine
    says = "would wait for their gradients. Freeze first, then wrap; or wrap with "
    both("ddp_wrapped_first", f"{says}find_unused_parameters=True." if held else None)


@cell("DDP, frozen, wrapped, then thawed")
def test_ddp_does_not_average_what_was_held_when_it_was_made(both, policy):
    held = Policy.parse(policy).freezes_affine
    says = "would not average their gradients over the ranks. Call unfreeze(ddp.module), then"
    both("ddp_thawed", f"{says} wrap it again." if held else None)


@cell("FSDP2, `MixedPrecisionPolicy` for all")
def test_mixed_precision_takes_weights_in_half_and_statistics_in_fp32(both, policy):
    says = "expected scalar type BFloat16 but found Float"
    takes_both = policy == "stats" or "fused" in policy
    both("fsdp_mixed", None if takes_both else says, "torch, of live layers as well")


@cell("`SyncBatchNorm`, converted, then frozen")
def test_a_converted_model_is_frozen(model, images, policy):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    freeze_by(model, policy)
    assert_frozen_as(model, policy)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@cell("`SyncBatchNorm`, frozen, then converted")
def test_a_frozen_model_is_converted(model, images, policy, thaws):
    freeze_by(model, policy)
    before = bnfreeze.snapshot(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if "fused" in policy:
        assert type(converted.bn1).__name__ == FrozenBatchNorm2d.__name__
        with keeps_its_promise(converted, policy):
            train(converted, images)
        assert_frozen_as(converted, policy)
    else:
        assert {layer.policy for layer in bnfreeze.inspect(converted).layers} == {"none"}
        assert not bnfreeze.verify(converted, before).ok
        thaws("convert_sync_batchnorm builds new layers: convert first, then freeze.")
