"""A checkpoint as one side of a comparison. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bnfreeze.checkpoints import StoredTensor
from bnfreeze.checkpoints.stored_tensor import check_claims
from bnfreeze.errors import CheckpointError, PolicyError
from bnfreeze.patterns import Pattern
from bnfreeze.verification import values
from bnfreeze.verification.causes import explained
from bnfreeze.verification.compare import DIGESTED, compare
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.facts import LISTED, Facts, OwnerFacts, TensorFacts
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.state import State

__all__ = ["snapshot_of", "state_of", "verify_stored"]

_UNSAVED = frozenset({"non-persistent buffer", "attribute"})
# A checkpoint does not say what is a parameter, what requires grad or what class a layer has.
_UNKNOWN = TensorFacts("", "", (), "cpu", None, False, None, "", "")


def state_of(tensors: Mapping[str, StoredTensor]) -> State:
    """What a checkpoint shows: names, dtypes, shapes, and the values, read when they are needed.

    Raises:
        UnsafeCheckpointError: the tensors claim far more bytes than the file has.
    """
    check_claims(tensors.values())
    facts = {name: _facts(name, tensor, _UNKNOWN) for name, tensor in tensors.items()}
    owners = {fact.owner: OwnerFacts("", "", "") for fact in facts.values()}
    return State(Facts(LISTED, facts, owners, ()), _readable(tensors))


def snapshot_of(
    tensors: Mapping[str, StoredTensor], *, everything: bool = False, digest: bool = False
) -> Snapshot:
    """Make a snapshot of a checkpoint: of names, dtypes, shapes and bits.

    Args:
        tensors: the checkpoint's, by name.
        everything: all of them, instead of those of norm layers only.
        digest: keep SHA-256 digests instead of a copy.

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
    state = state_of(chosen)
    kept: dict[str, StoredTensor] = {}
    digests: dict[str, str] = {}
    for name, tensor in state.values.items():
        try:
            if digest:
                digests[name] = values.digest(name, tensor)
            else:
                kept[name] = values.KeptTensor(tensor.dtype, tensor.shape, tensor.words())
        except CheckpointError as error:
            raise type(error)(f"{name}: {error}") from None
    return Snapshot(replace(state, values=kept, digests=digests))


def verify_stored(
    tensors: Mapping[str, StoredTensor], snapshot: Snapshot, *, select: Sequence[str] = ()
) -> DriftReport:
    """Compare a checkpoint with a snapshot: names, dtypes, shapes, bits.

    Args:
        tensors: the checkpoint's, by name. Tensors that the snapshot lacks are not a drift.
        snapshot: of a live model, or of another checkpoint.
        select: patterns of module names; none means all that the snapshot has.

    Returns:
        A `DriftReport`. What the snapshot has and no checkpoint can have, such as a
        non-persistent buffer, is ``unverified``.

    Raises:
        PolicyError: a pattern is malformed, or the snapshot has nothing that any matches.
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
    # A file may untie what was tied, or have only one of the names: each is compared alone.
    kept = {name: noted[name]._replace(first=name) for name in noted if name not in unsaved}
    was = {
        name: before.values[first] for name in kept if (first := noted[name].first) in before.values
    }
    old = replace(before, facts=replace(before.facts, tensors=kept), values=was, identities={})
    found = {name: tensors[name] for name in kept if name in tensors}
    check_claims(found.values())
    facts = {name: _facts(name, tensor, kept[name]) for name, tensor in found.items()}
    # What a file cannot show is taken to be as it was; of its layers nothing is known now.
    owners = {fact.owner: OwnerFacts("", "", "") for fact in facts.values()}
    after = State(replace(before.facts, tensors=facts, owners=owners), _readable(found))
    report = compare(old, after, gathered=True)
    missing = [
        Drift(name, "unverified", after=f"a checkpoint has no {noted[name].kind}")
        for name in unsaved
    ]
    # The other notes are about a live model.
    notes = (DIGESTED,) if before.digests else ()
    return replace(report, drifts=report.drifts + explained(missing, old, after), notes=notes)


def _facts(name: str, tensor: StoredTensor, noted: TensorFacts) -> TensorFacts:
    return noted._replace(
        dtype=tensor.dtype,
        shape=tensor.shape,
        owner=_split(name)[0],
        first=name,
        placement="",  # a checkpoint has the whole tensor
        unreadable=tensor.why,
    )


def _split(name: str) -> tuple[str, str, str]:
    return name.rpartition(".")


def _readable(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.has_values}
