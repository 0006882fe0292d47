"""Run the tests and write the table::

    python -m tests.ecosystem                      # all
    python -m tests.ecosystem test_compile.py      # one section; the others stay as recorded
    python -m tests.ecosystem -n 2                 # more arguments go to pytest

A test that is skipped because a package or a device is missing leaves its cell as it was recorded.
Nothing is written unless every test passes and every cell is known.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from .cells import NOT_RUN, POLICIES, RECORDED, Cell, Result, Section
from .table import TABLE, render

HERE = Path(__file__).parent


class Recorder:
    """A pytest plugin that notes what became of each cell, under xdist as well."""

    def __init__(self):
        self.results: dict[Cell, Result | None] = {}
        self.sections: dict[str, Section] = {}
        self.twice: list[Cell] = []

    def pytest_runtest_logreport(self, report):
        told = dict(report.user_properties)
        if "cell" not in told or report.when == "teardown":
            return
        if report.passed and report.when == "setup":
            return
        one = Cell(*told["cell"])
        if one in self.results:
            self.twice.append(one)
        self.sections[one.section] = Section(*told["section"], {})
        self.results[one] = result(report, told)


def result(report, told):
    """What a test's report says of its cell; None where it says nothing."""
    if report.passed:
        for verdict in ("refused", "thaws"):
            if verdict in told:
                return Result(verdict, told[verdict])
        return Result("works", told.get("remark", ""))
    return Result(NOT_RUN) if report.skipped and told["gpu"] else None


def recorded():
    """What is recorded, by section."""
    return {path.stem: Section.load(path) for path in sorted(RECORDED.glob("*.json"))}


def merged(recorder, old):
    """The sections that were run, with what is recorded of the cells that were skipped.

    Raises:
        SystemExit: a cell of which nothing is known, or two tests of one cell.
    """
    if recorder.twice:
        sys.exit(f"Two tests are one cell: {recorder.twice[0]}")
    found = {}
    for name, section in recorder.sections.items():
        before = old.get(name)
        results: dict[str, dict[str, Result]] = {}
        skipped = False
        for one, now in recorder.results.items():
            if one.section != name:
                continue
            then = before.results.get(one.item, {}).get(one.policy) if before else None
            if now is None or (now.verdict == NOT_RUN and then is not None):
                now, skipped = then, skipped or now is None
            if now is None:
                sys.exit(f"Nothing is known of {one}")
            results.setdefault(one.item, {})[one.policy] = now
        versions = before.versions if skipped else section.versions
        found[name] = replace(section, versions=versions, results=in_order(results))
    return found


def in_order(results):
    """Rows by their names, columns as the policies stand; xdist reports in any order."""
    return {
        item: {policy: results[item][policy] for policy in POLICIES} for item in sorted(results)
    }


def main(arguments):
    """Run, merge, write."""
    files = [str(HERE / name) for name in arguments if name.endswith(".py")] or [str(HERE)]
    others = [name for name in arguments if not name.endswith(".py")]
    if "-k" in others:
        sys.exit("A section is run as a whole: what is left out would leave the table.")
    recorder = Recorder()
    code = pytest.main(["-q", "-m", "cell and not slow", *others, *files], plugins=[recorder])
    if code != pytest.ExitCode.OK:
        sys.exit("The table is left as it was.")
    old = recorded()
    for name, section in merged(recorder, old).items():
        section.save(RECORDED / f"{name}.json")
    sections = recorded()
    TABLE.write_text(render(sections.values()), encoding="utf-8")
    count = sum(len(row) for one in sections.values() for row in one.results.values())
    print(f"{TABLE.name}: {len(sections)} sections, {count} cells.")


if __name__ == "__main__":
    main(sys.argv[1:])
