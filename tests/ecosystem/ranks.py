"""Training on two ranks: each function is one setup, run with several policies."""

import os
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bnfreeze
from bnfreeze import Policy, PolicyError

from .checks import POLICIES, assert_frozen_as, freeze_by, keeps_its_promise, train
from .models import prepared

STEPS = 3


def images():
    """Each rank has its own."""
    torch.manual_seed(100 + dist.get_rank())
    return torch.randn(4, 3, 16, 16)


@contextmanager
def training(model, policy):
    """Frozen tensors must keep their bits, on both ranks."""
    everywhere = dist.group.WORLD
    with keeps_its_promise(model, policy, process_group=everywhere):
        yield
    assert_frozen_as(model, policy)


def ddp(policy, **options):
    model = prepared()
    freeze_by(model, policy)
    wrapped = DistributedDataParallel(model, **options)
    with training(model, policy):
        train(wrapped, images(), STEPS)
    assert_frozen_as(wrapped, policy)


def ddp_plain(policy, folder):
    ddp(policy)


def ddp_without_broadcast(policy, folder):
    ddp(policy, broadcast_buffers=False)


def ddp_static_graph(policy, folder):
    ddp(policy, static_graph=True)


def ddp_wrapped_first(policy, folder):
    model = prepared()
    wrapped = DistributedDataParallel(model)
    if Policy.parse(policy).freezes_affine:
        # DDP would wait for gradients that never come.
        with pytest.raises(PolicyError, match="find_unused_parameters"):
            freeze_by(wrapped, policy)
        return
    freeze_by(wrapped, policy)
    with training(model, policy):
        train(wrapped, images(), STEPS)


def ddp_unused(policy, folder):
    model = prepared()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    freeze_by(wrapped, policy)
    with training(model, policy):
        train(wrapped, images(), STEPS)


def ddp_unfrozen(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    wrapped = DistributedDataParallel(model)
    train(wrapped, images(), 2)
    if Policy.parse(policy).freezes_affine:
        # DDP would not average the new gradients.
        with pytest.raises(PolicyError, match="average"):
            bnfreeze.unfreeze(wrapped)
        return
    bnfreeze.unfreeze(wrapped)
    with keeps_its_promise(model, "none"):
        train(wrapped, images(), STEPS)


def ddp_resumed(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    resumed(model, DistributedDataParallel, policy, folder)


def norm_layers(model):
    return {layer.name: model.get_submodule(layer.name) for layer in bnfreeze.inspect(model).layers}


def ddp_of_sync(policy, folder):
    live = "fused" not in policy  # such layers need a GPU, in eval mode too
    if live and not torch.cuda.is_available():
        return
    device = "cuda" if live else "cpu"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(prepared()).to(device)
    freeze_by(model, policy)
    wrapped = DistributedDataParallel(model)
    with training(model, policy):
        train(wrapped, images().to(device), STEPS)


def sharded(model, precision=None, norm_layers=()):
    """Shard the model block by block; the given norm layers apart, in fp32."""
    options = {"mesh": init_device_mesh("cpu", (2,))}
    for layer in norm_layers:
        fully_shard(layer, **options)
    if precision is not None:
        options["mp_policy"] = MixedPrecisionPolicy(precision, torch.float32)
    for block in (model.layer1, model.layer2):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    sharded(model)
    with training(model, policy):
        train(model, images(), STEPS)


def fsdp_mixed(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    sharded(model, torch.bfloat16)
    if policy != "stats" and "fused" not in policy:
        # torch's batch norm does not take a weight in half precision with statistics in fp32,
        # whether the layer is frozen or not.
        for one in (model, sharded(prepared(), torch.bfloat16)):
            with pytest.raises(RuntimeError, match="expected scalar type"):
                one(images())
        return
    with training(model, policy):
        train(model, images(), STEPS, forward=lambda x: model(x).float())


def fsdp_mixed_but_norm_layers(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    sharded(model, torch.bfloat16, norm_layers(model).values())
    with training(model, policy):
        train(model, images(), STEPS, forward=lambda x: model(x).float())


def fsdp_wrapped_first(policy, folder):
    model = sharded(prepared())
    freeze_by(model, policy)
    with training(model, policy):
        train(model, images(), STEPS)


def fsdp_in_between(policy, folder):
    model = sharded(prepared())
    train(model, images(), 2)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)  # each rank has its own statistics until here
    freeze_by(model, policy)
    with training(model, policy):
        train(model, images(), STEPS)
    bnfreeze.unfreeze(model)
    with keeps_its_promise(model, "none"):
        train(model, images(), STEPS)


def fsdp_resumed(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    resumed(model, sharded, policy, folder)


def resumed(model, wrap, policy, folder):
    """Train, save, inspect the checkpoint, load it into another model, train on, and verify."""
    wrapped = wrap(model)
    before = bnfreeze.snapshot(model)
    train(wrapped, images(), STEPS)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)
    stored = bnfreeze.inspect(folder)
    assert stored.ok
    # Each rank writes a part, so the order differs.
    assert {layer.name for layer in stored.layers} == set(norm_layers(model))
    assert {layer.num_features for layer in stored.layers} == {8}
    dist.barrier()
    other = prepared(seed=7)
    freeze_by(other, policy)
    wrapped = wrap(other)
    values = {"model": other.state_dict()}
    checkpoint.load(values, checkpoint_id=folder)
    other.load_state_dict(values["model"])
    with training(other, policy):
        train(wrapped, images(), STEPS)
    file = f"{folder}-{dist.get_rank()}.snapshot"
    before.save(file)
    report = bnfreeze.verify(other, bnfreeze.Snapshot.load(file), process_group=dist.group.WORLD)
    assert report.ok, str(report)


SETUPS = (
    ddp_plain,
    ddp_without_broadcast,
    ddp_static_graph,
    ddp_wrapped_first,
    ddp_unused,
    ddp_unfrozen,
    ddp_resumed,
    ddp_of_sync,
    fsdp,
    fsdp_mixed,
    fsdp_mixed_but_norm_layers,
    fsdp_wrapped_first,
    fsdp_in_between,
    fsdp_resumed,
)
# Options of the wrappers: one policy is enough.
ONLY = {ddp_without_broadcast: "stats", ddp_static_graph: "fused-act", ddp_unused: "eval+affine"}
USUAL = [
    (setup, policy) for setup in SETUPS for policy in POLICIES if policy == ONLY.get(setup, policy)
]
EVERY = [
    (setup, policy)
    for setup in SETUPS
    for policy in (*POLICIES, "affine", "eval", "fused", "fused+weights")
    if (setup, policy) not in USUAL
]


def run(folder: Path, what: list[tuple[Callable[[str, str], None], str]]) -> list[str]:
    """Run setups on two gloo ranks; return the tracebacks of those that failed."""
    mp.spawn(_rank, (str(folder), what), nprocs=2)
    return [line for rank in range(2) for line in torch.load(folder / f"rank{rank}.pt")]


def _rank(rank: int, folder: str, what: list[tuple[Callable[[str, str], None], str]]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both ranks are on this machine
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),  # if one rank fails, the other must not wait long
    )
    failed = []
    try:
        for setup, policy in what:
            try:
                setup(policy, f"{folder}/{setup.__name__}-{policy}")
            except Exception:
                failed.append(f"{setup.__name__}, {policy}: {traceback.format_exc()}")
        torch.save(failed, f"{folder}/rank{rank}.pt")
        dist.barrier()  # do not leave while the other rank still needs this one
    finally:
        dist.destroy_process_group()
