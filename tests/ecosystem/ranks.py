"""What two ranks do together, for each policy; what became of it is looked at later."""

import os
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bnfreeze
from bnfreeze import PolicyError

from .cells import POLICIES
from .checks import assert_frozen_as, freeze_by, keeps_its_promise, train
from .models import prepared

STEPS = 10


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """What torch refuses whether anything is frozen or not."""


class NeedsDevice(Exception):  # noqa: N818 - an answer, not a failure
    """Two CPUs cannot do it."""


def images():
    """Each rank has its own."""
    torch.manual_seed(100 + dist.get_rank())
    return torch.randn(4, 3, 16, 16)


@contextmanager
def training(model, policy):
    """What is held must stay, on this rank and on the other."""
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
    freeze_by(wrapped, policy)
    with training(model, policy):
        train(wrapped, images(), STEPS)


def ddp_unused(policy, folder):
    model = prepared()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    freeze_by(wrapped, policy)
    with training(model, policy):
        train(wrapped, images(), STEPS)


def ddp_thawed(policy, folder):
    model = prepared()
    freeze_by(model, policy)
    wrapped = DistributedDataParallel(model)
    train(wrapped, images(), 2)
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
    live = "fused" not in policy  # which DDP takes on a device alone, in eval mode too
    if live and not torch.cuda.is_available():
        raise NeedsDevice
    device = "cuda" if live else "cpu"
    model = nn.SyncBatchNorm.convert_sync_batchnorm(prepared()).to(device)
    freeze_by(model, policy)
    wrapped = DistributedDataParallel(model)
    with training(model, policy):
        train(wrapped, images().to(device), STEPS)


def sharded(model, precision=None, norm_layers=()):
    """The model under FSDP2, block by block; norm layers by themselves stay in fp32."""
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
    try:
        with training(model, policy):
            train(model, images(), STEPS, forward=lambda x: model(x).float())
    except RuntimeError as error:
        if str(error) == of_live_layers():
            raise Refused(str(error)) from error
        raise


def of_live_layers():
    """What torch says of the same model with nothing frozen."""
    model = sharded(prepared(), torch.bfloat16)
    try:
        model(images())
    except RuntimeError as error:
        return str(error)
    return None


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
        dist.broadcast(buffer, 0)  # until here each rank has had its own statistics
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
    """Train, save, look into the checkpoint, load it elsewhere, train on, and verify."""
    wrapped = wrap(model)
    before = bnfreeze.snapshot(model)
    train(wrapped, images(), STEPS)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)
    stored = bnfreeze.inspect(folder)
    assert stored.ok
    # Each rank writes a part, so the order is another one.
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
    file = f"{folder}-{dist.get_rank()}.held"
    before.save(file)
    report = bnfreeze.verify(other, bnfreeze.Snapshot.load(file), process_group=dist.group.WORLD)
    assert report.ok, str(report)


SCENES = (
    ddp_plain,
    ddp_without_broadcast,
    ddp_static_graph,
    ddp_wrapped_first,
    ddp_unused,
    ddp_thawed,
    ddp_resumed,
    ddp_of_sync,
    fsdp,
    fsdp_mixed,
    fsdp_mixed_but_norm_layers,
    fsdp_wrapped_first,
    fsdp_in_between,
    fsdp_resumed,
)


def outcome(scene, policy, folder):
    """What became of a scene: nothing, what a refusal said, or where it went wrong."""
    try:
        scene(policy, f"{folder}/{scene.__name__}-{policy}")
    except (PolicyError, Refused) as error:
        return "refused", str(error)
    except NeedsDevice:
        return "gpu", ""
    except Exception:
        return "failed", traceback.format_exc()
    return "works", ""


def _rank(rank: int, folder: str) -> None:
    # One machine, and nothing outside of it.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),  # where one rank fails, the other must not wait for long
    )
    try:
        seen = {
            (scene.__name__, policy): outcome(scene, policy, folder)
            for scene in SCENES
            for policy in POLICIES
        }
        torch.save(seen, f"{folder}/rank{rank}.pt")
        dist.barrier()  # neither hangs up while the other still listens
    finally:
        dist.destroy_process_group()


def run(folder: Path) -> list[dict[tuple[str, str], tuple[str, str]]]:
    """Run all scenes on two gloo ranks, unless that was done, and give what each rank saw."""
    if not (folder / "rank1.pt").exists():
        mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
