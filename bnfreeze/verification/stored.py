"""A checkpoint as one side of a comparison. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bnfreeze.checkpoints import StateDict, StoredTensor, naming_file, tensors_by_name
from bnfreeze.checkpoints.stored_tensor import check_claims
from bnfreeze.errors import CheckpointError, PolicyError
from bnfreeze.inspection.origin import Found
from bnfreeze.patterns import Pattern
from bnfreeze.verification.compare import DIGESTED, Progress, compare
from bnfreeze.verification.drift import DriftReport
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.state import LISTED, OwnerFacts, State, TensorFacts
from bnfreeze.verification.values import KeptTensor


def state_of(tensors: Mapping[str, StoredTensor], parts: Iterable[StateDict]) -> State:
    """What a checkpoint shows: names, dtypes, shapes, and the values, read when they are needed.

    Args:
        tensors: by the names that they are to have.
        parts: where they come from; of a model that was saved whole, they say its layers' eps.

    Raises:
        UnsafeCheckpointError: the tensors claim far more bytes than the file has.
    """
    check_claims(tensors.values())
    eps = {
        id(tensor): settings.eps
        for part in parts
        for name, tensor in part.tensors.items()
        if (settings := part.layers.get(layer_of(name)))
    }
    return State(
        LISTED,
        {
            # A checkpoint does not say what is a parameter.
            name: TensorFacts("", one.dtype, one.shape, layer_of(name), name, unreadable=one.why)
            for name, one in tensors.items()
        },
        {layer_of(name): OwnerFacts(eps=eps.get(id(one))) for name, one in tensors.items()},
        values={name: tensor for name, tensor in tensors.items() if tensor.has_values},
    )


def layer_of(name: str) -> str:
    """The name of the module that has the tensor of this name."""
    return name.rpartition(".")[0]


def snapshot_of(
    tensors: Mapping[str, StoredTensor],
    parts: Iterable[StateDict] = (),
    *,
    everything: bool = False,
    digest: bool = False,
    progress: Progress = lambda done, total: None,
) -> Snapshot:
    """Make a snapshot of a checkpoint: of names, dtypes, shapes and bits, and of eps.

    Args:
        tensors: the checkpoint's, by name.
        parts: where they come from, as for `state_of`.
        everything: all of them, instead of those of norm layers only.
        digest: keep SHA-256 digests instead of a copy.
        progress: is called with how many tensors are taken, and of how many.

    Raises:
        PolicyError: there is nothing to take.
        CheckpointError: a tensor cannot be read.
    """
    norms = {layer_of(name) for name in tensors if name.rpartition(".")[2] == "running_var"}
    chosen = {n: tensor for n, tensor in tensors.items() if everything or layer_of(n) in norms}
    if not chosen:
        raise PolicyError(
            "It holds no norm layer with a running_var, so there is nothing to take; --all takes "
            "every tensor."
        )
    state = state_of(chosen, parts)
    kept: dict[str, StoredTensor] = {}
    digests: dict[str, str] = {}
    for done, (name, tensor) in enumerate(state.values.items()):
        progress(done, len(state.values))
        with naming_file(name):
            if digest:
                digests[name] = state.digest(name)
            else:
                kept[name] = KeptTensor(tensor.dtype, tensor.shape, tensor.words())
    return Snapshot(replace(state, values=kept, digests=digests))


def verify_found(
    found: Found,
    snapshot: Snapshot,
    *,
    select: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> DriftReport:
    """Compare what was found in a checkpoint with a snapshot: names, dtypes, shapes, bits, eps.

    A snapshot of a model is compared with the only model that the checkpoint has. A snapshot of a
    checkpoint with several models is compared with those of the same keys.

    Args:
        found: the checkpoint's models. Tensors that the snapshot lacks are not a drift.
        snapshot: of a live model, or of another checkpoint.
        select: patterns of module names; none means all that the snapshot has.
        progress: is called with how many tensors are compared, and of how many.

    Returns:
        A `DriftReport`. What the snapshot has and no checkpoint can have, such as a
        non-persistent buffer, is ``unverified``.

    Raises:
        PolicyError: a pattern is malformed, or the snapshot has nothing that any matches.
        CheckpointError: a tensor cannot be read, or it is not clear which model is meant.
    """
    before = snapshot.state
    patterns = [Pattern.parse(text) for text in select]
    # A file may untie what was tied, or have only one of the names: each is compared alone.
    noted = {
        name: facts._replace(first=name)
        for name, facts in before.tensors.items()
        if not patterns or any(pattern.matches(facts.owner) for pattern in patterns)
    }
    if not noted:
        raise PolicyError(f"The snapshot has nothing in {' or '.join(select)}.")
    values = {n: before.value(n) for n in noted if before.tensors[n].first in before.values}
    old = replace(before, tensors=noted, groups=(), values=values, identities={})
    names, models = before.tensors.keys(), found.parts.models
    tensors = tensors_by_name(found.parts.all, models[0].key if len(models) == 1 else None)
    if names.isdisjoint(tensors):
        if len(models) > 1 and not all(names.isdisjoint(model.tensors) for model in models):
            keys = ", ".join(repr(model.key) for model in models)
            raise CheckpointError(
                f"The snapshot is of one model, and there are several: {keys}. Choose one with "
                f"--key."
            )
        tensors = tensors_by_name(found.parts.all, None)
    there = {name: tensors[name] for name in noted if name in tensors}
    now = state_of(there, found.parts.all)
    unsaved = {
        name: facts._replace(unreadable=f"a checkpoint has no {facts.kind}")
        for name, facts in noted.items()
        if facts.kind in ("non-persistent buffer", "attribute") and name not in tensors
    }
    after = replace(now, tensors={**now.tensors, **unsaved})
    # The other notes are about a live model.
    notes = (DIGESTED,) if before.digests else ()
    report = compare(old, after, progress=progress)
    return replace(report, notes=notes, findings=found.code_findings())
