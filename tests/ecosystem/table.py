"""docs/ecosystem.md, out of what is recorded of each section."""

from collections.abc import Iterable
from pathlib import Path

from .cells import POLICIES, Section

TABLE = Path(__file__).parents[2] / "docs" / "ecosystem.md"

_HEAD = """\
# Where frozen models go

Each cell is a test: a small model was frozen by the policy and taken there, and its bits compared.
*Works*: what is held has not moved, what is not held has, and the layers are still frozen.
*Refused*: a clear error, quoted below the table. *Thaws*: it builds live layers out of frozen ones,
and `inspect` and `verify` say so; do it first, then freeze. `fused+weights` holds all but the head.

Made from the tests by `python -m tests.ecosystem`.
"""


def render(sections: Iterable[Section]) -> str:
    """The whole page."""
    ordered = sorted(sections, key=lambda section: section.title)
    return "\n".join([_HEAD, *(_section(section) for section in ordered)])


def _section(section: Section) -> str:
    notes: list[str] = []

    def shown(one) -> str:
        if not one.note:
            return one.verdict
        if one.note not in notes:
            notes.append(one.note)
        return f"{one.verdict} [{notes.index(one.note) + 1}]"

    lines = [
        f"## {section.title}",
        "",
        ", ".join(f"{name} {number}" for name, number in section.versions.items()) + ".",
        "",
        f"| | {' | '.join(f'`{policy}`' for policy in POLICIES)} |",
        "| --- " * (len(POLICIES) + 1) + "|",
    ]
    for item, row in section.results.items():
        lines.append(f"| {item} | {' | '.join(shown(row[policy]) for policy in POLICIES)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"
