"""A checkpoint as one side of a comparison: snapped into a file, or held against one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from bnfreeze.checkpoints import StoredTensor
from bnfreeze.checkpoints.stored_tensor import check_claims
from bnfreeze.errors import CheckpointError, PolicyError
from bnfreeze.inspection.in_memory import in_memory
from bnfreeze.patterns import Pattern
from bnfreeze.verification import bits
from bnfreeze.verification.compare import DIGESTED, compare
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.facts import LISTED, Facts, OwnerFacts, TensorFacts
from bnfreeze.verification.report import DriftReport
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.state import State

__all__ = ["snapshot_of", "verify_stored"]

_UNSAVED = frozenset({"non-persistent buffer", "attribute"})
_MOVED = (
    "When and why cannot be told from two files.",
    "bnfreeze.guard(model) in the training run names the step, and the line with trace=True.",
)
_CAUSES = {
    "dtype": (
        "The checkpoint was saved in another dtype, as after model.half().",
        "Compare with the checkpoint before it was converted.",
    ),
    "shape": (
        "A layer of another size: the checkpoint is of another model.",
        "Compare checkpoints of one model.",
    ),
    "removed": (
        "The checkpoint has no tensor of this name.",
        "Compare checkpoints of one model, saved alike.",
    ),
    "unverified": (
        "What cannot be read is not counted as unchanged.",
        "Leave it out with --select, or hold the live model against the snapshot.",
    ),
}
_STRANGER = (
    "None of the {} names is in the checkpoint: it is of another model, or its names begin "
    "otherwise.",
    "Compare checkpoints of one model; where the file has several state_dicts, name one with "
    "--key.",
)


def snapshot_of(
    tensors: Mapping[str, StoredTensor], *, everything: bool = False, digest: bool = False
) -> Snapshot:
    """Make a snapshot of what a checkpoint holds.

    A checkpoint does not say what is a parameter, what requires grad or what class a layer has,
    and so the snapshot does not either: names, dtypes, shapes and bits are compared with it.

    Args:
        tensors: the checkpoint's, by name.
        everything: all of them, and not those of norm layers alone.
        digest: keep SHA-256 digests and not a copy.

    Raises:
        PolicyError: there is nothing to take.
        CheckpointError: a tensor cannot be read.
    """
    norms = {layer for layer, _, part in map(_split, tensors) if part == "running_var"}
    chosen = {
        name: tensor for name, tensor in tensors.items() if everything or _split(name)[0] in norms
    }
    if not chosen:
        raise PolicyError(
            "It holds no norm layer, so there is nothing to take; --all takes every tensor."
        )
    check_claims(chosen.values())
    facts = {name: _facts(name, tensor, _UNKNOWN) for name, tensor in chosen.items()}
    owners = {fact.owner: OwnerFacts("", "", "") for fact in facts.values()}
    values = _Values(chosen)
    digests = {name: bits.digest(name, value) for name, value in values.items()} if digest else {}
    state = State(Facts(LISTED, facts, owners, ()), {} if digest else dict(values), digests)
    return Snapshot(state)


def verify_stored(
    tensors: Mapping[str, StoredTensor], snapshot: Snapshot, *, select: Sequence[str] = ()
) -> DriftReport:
    """Compare what a checkpoint holds with a snapshot: names, dtypes, shapes, bits.

    Args:
        tensors: the checkpoint's, by name. More than the snapshot has are no drift.
        snapshot: of a live model, or of another checkpoint.
        select: patterns of module names; none means all that the snapshot has.

    Returns:
        A `DriftReport`. What the snapshot noted and no checkpoint can hold, such as a
        non-persistent buffer, is ``unverified``.

    Raises:
        PolicyError: a pattern that is malformed, or the snapshot has nothing that any matches.
        CheckpointError: a tensor cannot be read.
    """
    before = snapshot.state
    patterns = [Pattern.parse(text) for text in select]
    noted = {
        name: facts
        for name, facts in before.facts.tensors.items()
        if not patterns or any(pattern.matches(facts.owner) for pattern in patterns)
    }
    if not noted:
        raise PolicyError(f"The snapshot has nothing in {' or '.join(select)}.")
    unsaved = [name for name, facts in noted.items() if facts.kind in _UNSAVED]
    # A file may untie what was tied, or leave all names but one out: each is compared by itself.
    kept = {name: noted[name]._replace(first=name) for name in noted if name not in unsaved}
    values = {name: before.values[noted[name].first] for name in kept if _has_values(name, before)}
    old = replace(before, facts=replace(before.facts, tensors=kept), values=values, identities={})
    found = {name: tensors[name] for name in kept if name in tensors}
    check_claims(found.values())
    facts = {name: _facts(name, tensor, kept[name]) for name, tensor in found.items()}
    # What a file cannot show is taken to be as it was.
    after = State(replace(before.facts, tensors=facts), _Values(found))
    report = compare(old, after, gathered=True)
    drifts = list(report.drifts)
    for name in unsaved:
        drifts.append(Drift(name, "unverified", after=f"a checkpoint holds no {noted[name].kind}"))
    causes = _CAUSES
    if kept and not found:
        causes = {**_CAUSES, "removed": (_STRANGER[0].format(len(kept)), _STRANGER[1])}
    told = []
    for drift in drifts:
        cause, remedy = causes.get(drift.kind, _MOVED)
        told.append(replace(drift, cause=cause, remedy=remedy))
    # The other notes are about a live model.
    return replace(report, drifts=tuple(told), notes=(DIGESTED,) if before.digests else ())


_UNKNOWN = TensorFacts("", "", (), "cpu", None, False, None, "", "")


def _facts(name: str, tensor: StoredTensor, noted: TensorFacts) -> TensorFacts:
    return noted._replace(
        dtype=tensor.dtype,
        shape=tensor.shape,
        owner=_split(name)[0],
        first=name,
        placement="",  # a checkpoint holds it whole
        unreadable=tensor.why,
    )


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


def _has_values(name: str, state: State) -> bool:
    return state.facts.tensors[name].first in state.values


class _Values(Mapping[str, Tensor]):
    """The values of stored tensors, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor.has_values}

    def __getitem__(self, name: str) -> Tensor:
        try:
            return in_memory(self._tensors[name])
        except CheckpointError as error:
            raise type(error)(f"{name}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
