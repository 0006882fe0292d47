"""A check across the ranks of a process group: each checks its own tensors, then all compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from bnfreeze.verification.causes import with_reason
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.reasons import because
from bnfreeze.verification.state import State

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["across_ranks"]


def across_ranks(report: DriftReport, state: State, group: ProcessGroup) -> DriftReport:
    """The report of this rank joined with those of the others, the same on every rank.

    Each rank sends what it found and the SHA-256 of each tensor that is not sharded. What
    most ranks have (in a tie, what the lowest rank has) counts as right, and a rank that differs
    from it is named.

    Args:
        report: what this rank found by itself.
        state: this rank's state.
        group: the process group; every rank of it has to call this.
    """
    own = [replace(drift, rank=dist.get_rank(group)) for drift in report.drifts]
    whole = [name for name in state.values if not state.tensors[name].placement]
    sent = (own, {name: state.digest(name) for name in whole}, report.checked)
    gathered: list[tuple[list[Drift], dict[str, str], int]]
    gathered = [sent] * dist.get_world_size(group)
    dist.all_gather_object(gathered, sent, group=group)
    drifts = [drift for found, _, _ in gathered for drift in found]
    drifts += _diverged(drifts, [digests for _, digests, _ in gathered])
    return DriftReport(tuple(drifts), min(found[2] for found in gathered), report.notes)


def _diverged(known: Sequence[Drift], digests: Sequence[dict[str, str]]) -> Iterator[Drift]:
    """The tensors that are not the same on all ranks, though none of these drifted by itself."""
    known_here = {(drift.name, drift.rank) for drift in known}
    for name in dict.fromkeys(name for own in digests for name in own):
        # What drifted on a rank is reported already; that rank has no vote on what is right.
        kept = {
            rank: own.get(name)
            for rank, own in enumerate(digests)
            if (name, rank) not in known_here
        }
        right = Counter(kept.values()).most_common(1)[0][0] if kept else None
        first = next((rank for rank, bits in kept.items() if bits == right), 0)
        for rank, bits in kept.items():
            if bits != right:
                what = f"other bits than on rank {first}"
                drift = Drift(name, "value", rank=rank, before=what)
                yield with_reason(drift, because("ranks-differ"))
