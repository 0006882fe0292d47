"""What two ranks do together; each function runs on both, and what it gives is looked at later."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bnfreeze


def tiny(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    nn.init.normal_(model[1].running_mean)
    return model


def train(model, optimizer, steps, drift=lambda step: None):
    torch.manual_seed(dist.get_rank())
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.train()
        model(torch.randn(3, 4)).sum().backward()
        drift(step)
        optimizer.step()


def seen_in(report):
    return [(drift.kind, drift.name, drift.rank) for drift in report.drifts]


def a_frozen_model(**options):
    model = tiny()
    bnfreeze.freeze(model)
    before = bnfreeze.snapshot(model)
    model = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for trace in (False, True):
        with bnfreeze.guard(
            model, optimizer=optimizer, process_group=dist.group.WORLD, trace=trace
        ) as watch:
            train(model, optimizer, 3)
    report = bnfreeze.verify(model, before, process_group=dist.group.WORLD)
    return watch.step, report.ok, report.checked


def ddp_broadcast_overwrites():
    model = tiny()
    bnfreeze.freeze(model)
    model = DistributedDataParallel(model)
    model.module[1].running_mean += dist.get_rank()
    before = bnfreeze.snapshot(model)
    model.train()(torch.randn(3, 4))
    report = bnfreeze.verify(model, before, process_group=dist.group.WORLD)
    return seen_in(report), report.message


def a_drift_on(rank):
    model = tiny()
    bnfreeze.freeze(model)
    before = bnfreeze.snapshot(model)
    if dist.get_rank() == rank:
        model[1].running_var[3] = 9
    alone = bnfreeze.verify(model, before)
    return alone.ok, seen_in(bnfreeze.verify(model, before, process_group=dist.group.WORLD))


def ranks_that_started_apart():
    model = tiny(seed=dist.get_rank())
    bnfreeze.freeze(model)
    before = bnfreeze.snapshot(model)
    report = bnfreeze.verify(model, before, process_group=dist.group.WORLD)
    return seen_in(report), report.message


def a_guard_raises_on_all_ranks():
    model = tiny()
    bnfreeze.freeze(model)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)

    def drift(step):
        if dist.get_rank() == 1 and step == 2:
            model[1].running_mean[0] = 5

    try:
        with bnfreeze.guard(model, optimizer=optimizer, process_group=dist.group.WORLD):
            train(model, optimizer, 5, drift)
    except bnfreeze.DriftError as error:
        return seen_in(error.report), error.report.drifts[0].step
    return None


def sharded():
    model = tiny()
    bnfreeze.freeze(model, {"": "eval+affine", "0": "weights"})
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = bnfreeze.snapshot(model)
    hashed = bnfreeze.snapshot(model, digest=True)
    with bnfreeze.guard(model, optimizer=optimizer, process_group=dist.group.WORLD):
        train(model, optimizer, 3)
    alone = {drift.kind for drift in bnfreeze.verify(model, before).drifts}
    both = [
        bnfreeze.verify(model, one, process_group=dist.group.WORLD).ok for one in (before, hashed)
    ]
    if dist.get_rank() == 1:
        model[0].weight._local_tensor[0, 2] += 1
    drifted = [
        seen_in(bnfreeze.verify(model, one, process_group=dist.group.WORLD))
        for one in (before, hashed)
    ]
    return alone, both, drifted


def a_trace_of_a_shard():
    model = tiny()
    bnfreeze.freeze(model, "eval+weights")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        with bnfreeze.guard(model, process_group=dist.group.WORLD, trace=True), torch.no_grad():
            model[0].bias.to_local().add_(1)
    except bnfreeze.DriftError as error:
        return seen_in(error.report), Path(error.report.drifts[0].where.rpartition(":")[0]).name
    return None


def sharded_after_the_snapshot():
    model = tiny()
    bnfreeze.freeze(model, "eval")
    before = bnfreeze.snapshot(model, tensors="0.weight")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    report = bnfreeze.verify(model, before, process_group=dist.group.WORLD)
    return [(kind, name) for kind, name, rank in seen_in(report) if rank == 0]


SCENES = {
    "ddp_with_broadcast": lambda: a_frozen_model(broadcast_buffers=True),
    "ddp_without_broadcast": lambda: a_frozen_model(broadcast_buffers=False),
    "ddp_broadcast_overwrites": ddp_broadcast_overwrites,
    "a_drift_on_rank_0": lambda: a_drift_on(0),
    "a_drift_on_rank_1": lambda: a_drift_on(1),
    "a_trace_of_a_shard": a_trace_of_a_shard,
    "ranks_that_started_apart": ranks_that_started_apart,
    "a_guard_raises_on_all_ranks": a_guard_raises_on_all_ranks,
    "sharded": sharded,
    "sharded_after_the_snapshot": sharded_after_the_snapshot,
}


def _rank(rank: int, folder: str) -> None:
    # One machine, and nothing outside of it.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        seen = {name: scene() for name, scene in SCENES.items()}
        torch.save(seen, f"{folder}/rank{rank}.pt")
        dist.barrier()  # neither hangs up while the other still listens
    finally:
        dist.destroy_process_group()


def run(folder: Path) -> list[dict]:
    """Run all scenes on two gloo ranks and give what each rank saw."""
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
