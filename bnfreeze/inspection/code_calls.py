"""What loading a checkpoint would run, as findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from bnfreeze.checkpoints import CodeCall
from bnfreeze.findings import Finding

__all__ = ["RUNS_CODE", "code_findings"]

RUNS_CODE: Final = "runs-code"
# So many names are shown.
_SHOWN: Final = 5


def code_findings(calls: Sequence[CodeCall]) -> Iterator[Finding]:
    """A finding for each level of what loading the file would call.

    bnfreeze itself calls nothing of it.
    """
    errors, warnings, notes = (
        [call for call in calls if call.level == level] for level in ("error", "warning", "note")
    )
    if errors:
        yield Finding(
            "error",
            RUNS_CODE,
            "",
            f"Loading the file with torch.load(weights_only=False) or pickle calls "
            f"{_listed(errors)}.",
            "Do not load it, unless you know who wrote it and why. weights_only=True refuses it.",
        )
    if warnings:
        yield Finding(
            "warning",
            RUNS_CODE,
            "",
            f"Cannot be judged: loading the file with torch.load(weights_only=False) runs the code "
            f"of {_listed(warnings)}.",
            "Load it only where you trust that code.",
        )
    if notes:
        yield Finding(
            "note",
            RUNS_CODE,
            "",
            f"It holds a whole model: loading it runs the code of its classes, {_listed(notes)}.",
            "Save the values alone: torch.save(model.state_dict(), 'weights.pt').",
        )


def _listed(calls: Sequence[CodeCall]) -> str:
    shown = [
        f"`{call.name}`" + (f" (under {call.where!r})" if call.where else "")
        for call in calls[:_SHOWN]
    ]
    more = f" and {len(calls) - _SHOWN} more" if len(calls) > _SHOWN else ""
    return ", ".join(shown) + more
