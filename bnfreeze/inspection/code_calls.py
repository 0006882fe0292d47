"""What loading a checkpoint would run, as findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bnfreeze.checkpoints import CodeCall
from bnfreeze.findings import Finding, Level, finding

__all__ = ["RUNS_CODE", "code_findings"]

RUNS_CODE: Final = "runs-code"
# So many names are shown.
_SHOWN: Final = 5


def code_findings(calls: Sequence[CodeCall]) -> tuple[Finding, ...]:
    """A finding for each level of what loading the file would call, the worst first.

    bnfreeze itself calls nothing of it.
    """
    texts: dict[Level, str] = {
        "error": "loading the file with torch.load(weights_only=False) or pickle calls {}.",
        "warning": "cannot be judged: loading the file with torch.load(weights_only=False) runs "
        "the code of {}.",
        "note": "it holds modules that were saved whole: loading it runs the code of {}.",
    }
    return tuple(
        finding("runs-code", "", text.format(_listed(found)), level=level)
        for level, text in texts.items()
        if (found := [call for call in calls if call.level == level])
    )


def _listed(calls: Sequence[CodeCall]) -> str:
    shown = [
        f"`{call.name}`" + (f" (under {call.where!r})" if call.where else "")
        for call in calls[:_SHOWN]
    ]
    more = f" and {len(calls) - _SHOWN} more" if len(calls) > _SHOWN else ""
    return ", ".join(shown) + more
