"""What is said of a kind of finding, and its page in the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FindingKind", "Level"]

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class FindingKind:
    """One kind of finding, as people read about it.

    Attributes:
        code: its stable name.
        levels: the levels that it can have; the first is the usual one.
        title: what was found, in a few words.
        meaning: what it means.
        why: why it matters.
        remedy: how to mend it, in a sentence or two; shown with each finding.
        example: code or a command that leads to it, or that mends it.
    """

    code: str
    levels: tuple[Level, ...]
    title: str
    meaning: str
    why: str
    remedy: str
    example: str

    def page(self) -> str:
        """The page about this kind, in Markdown."""
        example = "\n".join(f"    {line}".rstrip() for line in self.example.splitlines())
        return (
            f"# {self.code}\n\n"
            f"**{self.title}** (level: {' or '.join(self.levels)})\n\n"
            f"{self.meaning}\n\n"
            f"## Why it matters\n\n{self.why}\n\n"
            f"## How to mend it\n\n{self.remedy}\n\n"
            f"## Example\n\n{example}\n"
        )
