"""The cells of the table: which tests they are, and what the last run of each one gave.

A test module is a section of the table, titled by the first line of its docstring. In ``PACKAGES``
it may name those that it needs beyond torch, as pip knows them; their versions are shown.
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

__all__ = ["POLICIES", "RECORDED", "Cell", "Result", "Section", "cell", "cell_of", "section_of"]

# The last one holds all but the head: it is what fine-tuning a head alone takes.
POLICIES = ("stats", "affine", "eval", "eval+affine", "fused", "fused-act", "fused+weights")

_Test = Callable[..., object]

RECORDED = Path(__file__).parent / "recorded"

NOT_RUN = "not yet run (needs a GPU)"
VERDICTS = ("works", "refused", "thaws", NOT_RUN)


def cell(item: str, *marks: pytest.MarkDecorator) -> Callable[[_Test], _Test]:
    """Make a test a row of the table, with a cell for each policy.

    Args:
        item: what the row is called; ``{name}`` stands for the test's parameter of that name, and
            then there is a row for each of its values.
        marks: more marks, ``pytest.mark.gpu`` for one.
    """

    def decorate(test: _Test) -> _Test:
        test = pytest.mark.parametrize("policy", POLICIES)(test)
        for mark in (pytest.mark.cell(item), *marks):
            test = mark(test)
        return test

    return decorate


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        section: the name of the test module, without ``test_``.
        item: the row.
        policy: the column.
    """

    section: str
    item: str
    policy: str


def cell_of(test: pytest.Item) -> Cell | None:
    """The cell that a collected test is; None where it is none."""
    mark = test.get_closest_marker("cell")
    if mark is None:
        return None
    values = test.callspec.params
    section = test.module.__name__.rpartition(".")[2].removeprefix("test_")
    return Cell(section, mark.args[0].format_map(values), values["policy"])


@dataclass(frozen=True)
class Result:
    """What a cell's test gave.

    Attributes:
        verdict: one of `VERDICTS`.
        note: of a refusal what the error said; else what a person should know, if anything.
    """

    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What is recorded of one test module.

    Attributes:
        title: the first line of the module's docstring.
        versions: of Python, torch and the packages of the section, when it was last run.
        results: by row and column.
    """

    title: str
    versions: dict[str, str]
    results: dict[str, dict[str, Result]]

    @classmethod
    def load(cls, path: Path) -> Section:
        facts = json.loads(path.read_text(encoding="utf-8"))
        results = {
            item: {policy: Result(*one) for policy, one in row.items()}
            for item, row in facts["results"].items()
        }
        return cls(facts["title"], facts["versions"], results)

    def save(self, path: Path) -> None:
        def dumped(value: object) -> str:
            return json.dumps(value, ensure_ascii=False)

        rows = [  # one line each, for whoever reads a diff
            f"  {dumped(item)}: "
            + dumped({policy: [one.verdict, one.note] for policy, one in row.items()})
            for item, row in self.results.items()
        ]
        results = ",\n".join(rows)
        path.write_text(
            f'{{\n "title": {dumped(self.title)},\n "versions": {dumped(self.versions)},\n'
            f' "results": {{\n{results}\n }}\n}}\n',
            encoding="utf-8",
        )


def section_of(test: pytest.Item) -> Section:
    """The section that a collected test is in, with nothing recorded yet."""
    module = test.module
    title = module.__doc__.partition("\n")[0].rstrip(".")
    versions = {"Python": platform.python_version()}
    for package in ("torch", *getattr(module, "PACKAGES", ())):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Section(title, versions, {})
