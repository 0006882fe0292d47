"""A model's promise kept on record, and held against the model later."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from bnfreeze.norm_layers import check_model
from bnfreeze.verification import bits, snapshot_file
from bnfreeze.verification.compare import compare
from bnfreeze.verification.distributed import across_ranks
from bnfreeze.verification.report import DriftReport
from bnfreeze.verification.state import State, read_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Snapshot", "assert_frozen", "check", "snapshot", "verify"]

_clock = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a model's tensors were at one instant, made by `snapshot`.

    Two snapshots are equal if nothing has changed from the earlier to the later one, as
    `verify` understands it; ``snapshot(model) == before`` says so in a test.
    """

    state: State = field(repr=False)
    # Which of two was taken first; 0 for one from a file.
    taken: int = 0

    @property
    def tensors(self) -> str:
        """Which tensors were asked for: ``"held"``, ``"norm"``, ``"all"`` or a pattern."""
        return self.state.facts.selection

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the tensors, aliases included, in the model's order."""
        return tuple(self.state.facts.tensors)

    @property
    def digest(self) -> bool:
        """Whether SHA-256 digests are kept instead of a copy."""
        return bool(self.state.digests)

    def compared_to(self, other: Snapshot) -> DriftReport:
        """What changed from the earlier of the two snapshots to the later one."""
        first, second = sorted((self, other), key=lambda one: one.taken)
        return compare(first.state, second.state, gathered=True)

    def save(self, path: str | Path) -> None:
        """Write the snapshot to `path`, whole or not at all.

        With a copy of the values it is a safetensors file, whose metadata has the facts; with
        ``digest=True`` it is JSON. Which objects there were, in which memory, and what optimizers
        held cannot be written.
        """
        snapshot_file.save(self.state, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what `save` wrote, on any machine, device and version of torch; values on the CPU.

        Raises:
            UnsupportedFormatError: the file is no snapshot, or one of a later version of bnfreeze.
            CorruptCheckpointError: its parts contradict each other, or some are missing.
            OSError: the file cannot be read.
        """
        return cls(snapshot_file.load(Path(path)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        return self.compared_to(other).ok

    __hash__ = None  # type: ignore[assignment]  # equality is of what tensors hold

    def __len__(self) -> int:
        return len(self.state.facts.tensors)

    def __repr__(self) -> str:
        kept = "digests" if self.digest else "a copy"
        return f"<Snapshot of {len(self)} tensors ({self.tensors}), {kept}>"


def snapshot(
    model: nn.Module,
    *,
    tensors: str = "held",
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    digest: bool = False,
) -> Snapshot:
    """Note what `model` is now, to `verify` later that it has not changed.

    Noted are for each tensor its bits, dtype, shape, device, ``requires_grad``, what it is
    registered as and whether a ``.grad`` is there; which names share storage; and of the modules
    that have them the class, the policy and, where it matters, the training flag.

    Args:
        model: any `nn.Module`; names are those without the segments of wrappers such as
            DistributedDataParallel.
        tensors: ``"held"``, what a policy holds and other libraries' frozen batch norms have;
            ``"norm"``, every tensor of the norm layers; ``"all"``, every parameter, buffer
            (persistent or not) and plain tensor attribute; or a pattern of dotted names such as
            ``"backbone.**.running_var"``.
        optimizer: the optimizer, or several, in which membership is noted, by identity.
        digest: keep SHA-256 digests and not a copy, which lies on the tensor's own device: for
            whole models. A drift is then found and named, but not located.

    Raises:
        PolicyError: nothing is held, or the pattern matches no tensor: there is nothing to check.
        TypeError: `model` is no `nn.Module`, or is TorchScript.
    """
    live = read_state(check_model(model), tensors, optimizer)
    # The state must not keep the model alive, nor share its memory.
    if digest:
        return Snapshot(replace(live, values={}, digests=_digests(live), modules={}), next(_clock))
    return Snapshot(replace(live, values=_copies(live.values), modules={}), next(_clock))


def _copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def _digests(state: State) -> dict[str, str]:
    return {
        name: bits.digest(name, state.values[facts.first])
        for name, facts in state.facts.tensors.items()
        if facts.first in state.values
    }


def verify(
    model: nn.Module, snapshot: Snapshot, *, process_group: ProcessGroup | None = None
) -> DriftReport:
    """Compare `model` with what it was: bit for bit, and everything else that was noted.

    It shows equality at the two instants. A change undone in between is seen only by
    ``guard(trace=True)``.

    Args:
        model: the very model of which the snapshot was taken: a copy of it has other parameter
            objects, which is a drift, for optimizers would not see them. With a snapshot from
            `Snapshot.load`, any model that should be equal to it.
        snapshot: from `snapshot`, or `Snapshot.load`.
        process_group: with it, every rank of the group checks its own tensors, all learn what
            the others found, and what is not sharded must be equal on all ranks. Every rank has
            to call this. Without it a DTensor, of which this rank sees one shard, is
            ``unverified``.

    Returns:
        A `DriftReport`; it is ``ok`` if something was compared and nothing has changed.

    Raises:
        TypeError: `model` is no `nn.Module`, or `snapshot` no `Snapshot`.
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
    later: bits.Later | None = None,
) -> DriftReport:
    """What `verify` does, with the steps of a training that `guard` counts.

    Without `exchange` each rank of the group checks its own, and asks no other. Values on an
    accelerator are left to `later`, if it is given.
    """
    after = read_state(
        model,
        before.facts.selection,
        before.live_optimizers(),
        also=before.facts.tensors,
        lenient=True,
    )
    report = compare(before, after, gathered=group is not None, step=step, since=since, later=later)
    return report if group is None or not exchange else across_ranks(report, after, group)


def assert_frozen(
    model: nn.Module, snapshot: Snapshot, *, process_group: ProcessGroup | None = None
) -> None:
    """Raise unless `model` is what it was, as `verify` understands it.

    Raises:
        DriftError: something has changed; an `AssertionError` with the ``.report``.
    """
    __tracebackhide__ = True
    verify(model, snapshot, process_group=process_group).raise_if_drifted()
