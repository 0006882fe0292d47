"""The table has every cell that there is a test of, and says something about each."""

import contextlib
import io

import pytest

from .__main__ import HERE, Recorder, merged, recorded, result
from .cells import NOT_RUN, POLICIES, VERDICTS, Cell, Result, Section, cell_of
from .table import TABLE, render


class Collector:
    def pytest_collection_finish(self, session):
        self.cells = [one for one in map(cell_of, session.items) if one is not None]


@pytest.fixture(scope="module")
def collected():
    """All cells that the tests collect here; a module whose package is missing has none."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(HERE)], [collector])
    return collector.cells


def test_no_cell_has_two_tests(collected):
    assert len(collected) == len(set(collected))


def test_the_table_has_each_cell_that_the_tests_collect_and_no_other(collected):
    sections = recorded()
    here = {one.section for one in collected}
    assert here <= set(sections)
    told = {
        Cell(name, item, policy)
        for name, section in sections.items()
        for item, row in section.results.items()
        for policy in row
    }
    assert {one for one in told if one.section in here} == set(collected)
    # Of a section that is not collected here, a package is missing; its test is there all the same.
    assert all((HERE / f"test_{name}.py").exists() for name in sections)


def test_every_row_answers_for_every_policy():
    for section in recorded().values():
        for item, row in section.results.items():
            assert tuple(row) == POLICIES, item
            assert {one.verdict for one in row.values()} <= set(VERDICTS), item


def test_the_page_is_what_is_recorded():
    assert TABLE.read_text(encoding="utf-8") == render(recorded().values())


# How it is made.


_CELL = ("fruit", "an apple", "eval")


class Report:
    def __init__(self, outcome, *told, gpu=False, cell=_CELL):
        self.when = "call"
        self.passed, self.skipped = outcome == "passed", outcome == "skipped"
        self.user_properties = [
            ("cell", cell),
            ("section", ("Fruit", {"torch": "2"})),
            ("gpu", gpu),
            *told,
        ]


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (Report("passed"), Result("works")),
        (Report("passed", ("remark", "left alone")), Result("works", "left alone")),
        (Report("passed", ("refused", "no")), Result("refused", "no")),
        (Report("passed", ("thaws", "rebuilt")), Result("thaws", "rebuilt")),
        (Report("skipped", gpu=True), Result(NOT_RUN)),
        (Report("skipped"), None),
        (Report("failed"), None),
    ],
)
def test_a_report_becomes_a_result(report, expected):
    assert result(report, dict(report.user_properties)) == expected


def run(*reports):
    recorder = Recorder()
    for report in reports:
        recorder.pytest_runtest_logreport(report)
    return recorder


def row(outcome="passed", *told, **kwargs):
    return [
        Report(outcome, *told, cell=("fruit", "an apple", policy), **kwargs) for policy in POLICIES
    ]


def test_a_skipped_test_keeps_what_was_recorded_and_the_versions_with_it():
    before = merged(run(*row("passed", ("remark", "ripe"))), {})["fruit"]
    assert before.results["an apple"]["eval"] == Result("works", "ripe")
    old = {"fruit": Section("Fruit", {"torch": "1"}, before.results)}
    assert merged(run(*row("skipped")), old) == old
    assert merged(run(*row("skipped", gpu=True)), old)["fruit"].results == before.results
    assert merged(run(*row()), old)["fruit"].versions == {"torch": "2"}


def test_an_unknown_cell_and_one_with_two_tests_end_it():
    with pytest.raises(SystemExit, match="Nothing is known of"):
        merged(run(*row("skipped")), {})
    with pytest.raises(SystemExit, match="Two tests are one cell"):
        merged(run(*row(), *row()), {})


def test_the_same_note_has_the_same_number():
    results = dict.fromkeys(POLICIES, Result("works")) | {
        "stats": Result("refused", "first"),
        "eval": Result("refused", "second"),
        "fused": Result("refused", "first"),
    }
    page = render([Section("Fruit", {"torch": "2", "onnx": "1"}, {"an apple": results})])
    row = "| an apple | refused [1] | works | refused [2] | works | refused [1] | works | works |"
    assert row in page
    assert page.endswith("\n1. first\n2. second\n")
    assert "torch 2, onnx 1." in page
