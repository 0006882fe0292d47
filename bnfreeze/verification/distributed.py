"""A check across the ranks of a process group: each checks its own tensors, then all compare."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from bnfreeze.verification.drift import Drift
from bnfreeze.verification.drift_report import DriftReport
from bnfreeze.verification.state import State
from bnfreeze.verification.values import digest

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
    digests = {
        name: digest(name, state.values[name])
        for name, facts in state.facts.tensors.items()
        if name in state.values and not facts.placement
    }
    sent = (own, digests, report.checked, report.notes)
    gathered: list[tuple[list[Drift], dict[str, str], int, tuple[str, ...]]]
    gathered = [sent] * dist.get_world_size(group)
    dist.all_gather_object(gathered, sent, group=group)
    drifts = [drift for found, *_ in gathered for drift in found]
    drifts += _diverged(drifts, [found[1] for found in gathered])
    checked = min(found[2] for found in gathered)
    return DriftReport(tuple(drifts), checked, report.notes)


def _diverged(known: list[Drift], digests: list[dict[str, str]]) -> list[Drift]:
    """The tensors that are not the same on all ranks, though none of these drifted by itself."""
    known_here = {(drift.name, drift.rank) for drift in known}
    found = []
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
                found.append(
                    Drift(
                        name,
                        "value",
                        rank=rank,
                        before=f"other bits than on rank {first}",
                        cause_code="ranks-differ",
                        cause="The ranks have different models, each unchanged since its own "
                        "snapshot: they started apart.",
                        remedy="Broadcast the model, or load it on every rank, before the "
                        "snapshot.",
                    )
                )
    return found
