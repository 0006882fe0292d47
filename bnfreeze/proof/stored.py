"""A checkpoint as one side of a comparison: snapped into a file, or held against one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from bnfreeze.checkpoint import StoredTensor
from bnfreeze.errors import PolicyError
from bnfreeze.patterns import Pattern
from bnfreeze.proof import bits
from bnfreeze.proof.compare import compare
from bnfreeze.proof.drift import Drift
from bnfreeze.proof.facts import LISTED, Facts, OwnerFacts, TensorFacts
from bnfreeze.proof.report import DriftReport
from bnfreeze.proof.snapshot import Snapshot
from bnfreeze.proof.state import State
from bnfreeze.state_dict_tensors import in_memory

__all__ = ["snapshot_of", "verify_stored"]

_UNSAVED = frozenset({"non-persistent buffer", "attribute"})
_CAUSE = "When and why cannot be told from two files."
_REMEDY = "bnfreeze.guard(model) in the training run names the step, and the line with trace=True."


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
    norms = {name.rpartition(".")[0] for name in tensors if name.endswith("running_var")}
    chosen = {
        name: tensor
        for name, tensor in tensors.items()
        if everything or name.rpartition(".")[0] in norms
    }
    if not chosen:
        raise PolicyError(
            "It holds no norm layer, so there is nothing to take; ask for all of its tensors."
        )
    facts = {name: _facts(name, tensor, None) for name, tensor in chosen.items()}
    owners = {fact.owner: OwnerFacts("", "", "") for fact in facts.values()}
    values = _values(chosen, facts)
    digests = {name: bits.digest(name, value) for name, value in values.items()} if digest else {}
    state = State(Facts(LISTED, facts, owners, ()), {} if digest else values, digests)
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
    kept = {name: facts for name, facts in noted.items() if name not in unsaved}
    found = {name: tensors[name] for name in kept if name in tensors}
    facts = {name: _facts(name, tensor, kept[name]) for name, tensor in found.items()}
    # What a file cannot show is taken to be as it was.
    after = State(replace(before.facts, tensors=facts), _values(found, facts))
    old = replace(before, facts=replace(before.facts, tensors=kept), identities={})
    report = compare(old, after, gathered=True)
    told = [replace(drift, cause=_CAUSE, remedy=_REMEDY) for drift in report.drifts]
    for name in unsaved:
        told.append(Drift(name, "unverified", after=f"a checkpoint holds no {noted[name].kind}"))
    return replace(report, drifts=tuple(told))


def _facts(name: str, tensor: StoredTensor, noted: TensorFacts | None) -> TensorFacts:
    if noted is None:
        noted = TensorFacts("", "", (), "cpu", None, False, None, name.rpartition(".")[0], name)
    return noted._replace(dtype=tensor.dtype, shape=tensor.shape, unreadable=tensor.why)


def _values(
    tensors: Mapping[str, StoredTensor], facts: Mapping[str, TensorFacts]
) -> dict[str, Tensor]:
    # An alias is compared by its first name, where the checkpoint has that too.
    names = itertools.chain(tensors, (fact.first for fact in facts.values()))
    return {
        name: in_memory(tensors[name])
        for name in dict.fromkeys(names)
        if name in tensors and tensors[name].has_values
    }
