"""snapshot and verify: a live model, now and later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from bnfreeze.inspection.in_memory import TensorInMemory
from bnfreeze.norm_layers import check_model
from bnfreeze.verification.compare import compare
from bnfreeze.verification.distributed import across_ranks
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.live_state import read_state
from bnfreeze.verification.on_device import PendingCheck
from bnfreeze.verification.snapshot import Snapshot, next_moment
from bnfreeze.verification.state import State
from bnfreeze.verification.values import digest as digest_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["check", "snapshot", "verify"]


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
    # The state must not share the model's memory.
    if not digest:
        copies = {name: TensorInMemory(value.tensor.clone()) for name, value in _live(live)}
        return Snapshot(replace(live, values=copies), next_moment())
    digests = {
        name: digest_of(name, live.values[facts.first])
        for name, facts in live.facts.tensors.items()
        if facts.first in live.values
    }
    return Snapshot(replace(live, values={}, digests=digests), next_moment())


def _live(state: State) -> Iterable[tuple[str, TensorInMemory]]:
    return ((n, value) for n, value in state.values.items() if isinstance(value, TensorInMemory))


def verify(
    model: nn.Module, snapshot: Snapshot, *, process_group: ProcessGroup | None = None
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
    return check(model, snapshot.state, process_group)


def check(
    model: nn.Module,
    before: State,
    group: ProcessGroup | None,
    *,
    exchange: bool = True,
    step: int | None = None,
    since: int | None = None,
    pending: PendingCheck | None = None,
) -> DriftReport:
    """What `verify` does, with the training steps that `guard` counts.

    Without `exchange` each rank of the group checks its own tensors and asks no other. Values on
    an accelerator are left to `pending`, if it is given.
    """
    after = read_state(
        model,
        before.facts.selection,
        before.live_optimizers(),
        also=before.facts.tensors,
        lenient=True,
    )
    report = compare(
        before, after, gathered=group is not None, step=step, since=since, pending=pending
    )
    return report if group is None or not exchange else across_ranks(report, after, group)
