"""snapshot and verify: a live model, now and later, on one rank or on all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import mode
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from bnfreeze.inspection.in_memory import TensorInMemory
from bnfreeze.norm_layers import check_model
from bnfreeze.verification.causes import because
from bnfreeze.verification.compare import compare
from bnfreeze.verification.drift import Drift, DriftReport
from bnfreeze.verification.live_state import read_state
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.state import State


def snapshot(
    model: nn.Module,
    *,
    tensors: str = "frozen",
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    digest: bool = False,
) -> Snapshot:
    """Record what `model` is now, to `verify` later that it has not changed.

    Recorded are for each tensor its bits, dtype, shape, device, ``requires_grad``, what it is
    registered as and whether it has a ``.grad``; which names share memory; and for the modules
    that have these tensors the class, the policy and, if it matters, the training flag.

    Args:
        model: any `nn.Module`; names are those without the segments of wrappers such as
            DistributedDataParallel.
        tensors: ``"frozen"``, what bnfreeze froze and other libraries' frozen batch norms have;
            ``"norm"``, every tensor of the norm layers; ``"all"``, every parameter, buffer
            (persistent or not) and plain tensor attribute; or a pattern of dotted names such as
            ``"backbone.**.running_var"``.
        optimizer: the optimizer, or several. Which tensors are in them is recorded too.
        digest: keep SHA-256 digests instead of a copy, which would be on the tensor's own device.
            Useful for whole models. A drift is then found and named, but not located.

    Raises:
        PolicyError: nothing is frozen, or the pattern matches no tensor: there is nothing to check.
        TypeError: `model` is not an `nn.Module`, or is TorchScript.
    """
    live = read_state(check_model(model), tensors, optimizer)
    if digest:
        readable = [name for name, facts in live.tensors.items() if facts.first in live.values]
        return Snapshot(
            replace(live, values={}, digests={name: live.digest(name) for name in readable})
        )
    # The state must not share the model's memory.
    copies = {
        name: TensorInMemory(value.tensor.clone())
        for name, value in live.values.items()
        if isinstance(value, TensorInMemory)
    }
    return Snapshot(replace(live, values=copies))


def verify(
    model: nn.Module, snapshot: Snapshot, *, process_group: dist.ProcessGroup | None = None
) -> DriftReport:
    """Compare `model` with what it was: bit for bit, and everything else in the snapshot.

    It shows equality at the two moments. A change that was undone in between is seen only by
    ``guard(trace=True)``.

    Args:
        model: the model of which the snapshot was taken. A copy of it has other parameter
            objects, which is a drift, because optimizers would not see them. With a snapshot from
            `Snapshot.load`, any model that should be equal to it.
        snapshot: from `snapshot`, or `Snapshot.load`.
        process_group: with it, every rank of the group checks its own tensors, all ranks learn
            what the others found, and what is not sharded must be equal on all ranks. Every rank
            has to call this. Without it a DTensor is ``unverified``, because this rank sees only
            one shard of it.

    Returns:
        A `DriftReport`; it is ``ok`` if something was compared and nothing has changed.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `snapshot` not a `Snapshot`.
    """
    model = check_model(model)
    if not isinstance(snapshot, Snapshot):
        raise TypeError(f"Expected a Snapshot, not {type(snapshot).__name__}.")
    return check(model, snapshot.state, process_group)[0]


def check(
    model: nn.Module,
    before: State,
    group: dist.ProcessGroup | None,
    *,
    exchange: bool = True,
    **options: Any,
) -> tuple[DriftReport, State]:
    """What `verify` does, with more `options` of `compare`; and what the state is now.

    With a group every rank of it has to call this. All get the same report, joined from those of
    all ranks: each sends what it found and the SHA-256 of each tensor that is not sharded. What
    most ranks have (in a tie, what the lowest rank has) counts as right, and a rank that differs
    from it is named. Without `exchange` each rank checks its own tensors and asks no other.
    """
    after = read_state(model, before.selection, before.live_optimizers(), also=before.tensors)
    report = compare(before, after, gathered=group is not None, **options)
    if group is None or not exchange:
        return report, after
    own = [replace(drift, rank=dist.get_rank(group)) for drift in report.drifts]
    whole = [name for name in after.values if not after.tensors[name].placement]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    sent = own, {name: after.digest(name) for name in whole}, report.checked
    dist.all_gather_object(gathered, sent, group=group)
    drifts: list[Drift] = [drift for found, _, _ in gathered for drift in found]
    known = {(drift.name, drift.rank) for drift in drifts}
    for name in dict.fromkeys(name for _, digests, _ in gathered for name in digests):
        # What drifted on a rank is reported already; that rank has no vote on what is right.
        bits = {
            rank: digests.get(name)
            for rank, (_, digests, _) in enumerate(gathered)
            if (name, rank) not in known
        }
        for rank, there in bits.items():
            if there != (right := mode(bits.values())):
                first = next(other for other, found in bits.items() if found == right)
                what = f"other bits than on rank {first}"
                drifts.append(because(Drift(name, "value", rank=rank, before=what), "ranks-differ"))
    checked = min(checked for *_, checked in gathered)
    return DriftReport(tuple(drifts), checked, report.notes), after
