"""Write what the README shows of the committed runs: `python -m benchmarks.readme`.

Its tables and figures stand between ``<!-- benchmarks: NAME -->`` and ``<!-- end -->``; the picture
and the page with every table are made here as a whole. A test checks that all of them agree with
the runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import picture, report, runs
from benchmarks.facts import BASE, Record, Run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = "cpu.json", "host.json"  # a work that is in two of them counts as it is in the later one
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "benchmarks.svg"

_MARKED = re.compile(r"(<!-- benchmarks: ([a-z-]+) -->)(.*?)(<!-- end -->)", re.S)
# What the README shows of the arms; the page shows all.
_NOT_IN_README = ("timm", "compile", "experiment")
# Those that hold the statistics, weight and bias; timm's layer is torchvision's.
_OTHERS = (
    BASE,
    "torchvision FrozenBatchNorm2d",
    "Transformers DetrFrozenBatchNorm2d",
    "MMEngine efficient_conv_bn_eval",
)


def committed() -> Run:
    """Return the committed runs as one: of each work the latest, with the first one's facts."""
    made = _committed()
    first = next(iter(made.values()))
    return replace(first, records=[one for run in made.values() for one in run.records])


def _committed() -> dict[str, Run]:
    """Each file's run, without the works that a later one has."""
    kept, later = {}, set[str]()
    for name in reversed(FILES):
        run = runs.load(RESULTS / name)
        kept[name] = replace(run, records=[one for one in run.records if one.work not in later])
        later |= {one.work for one in run.records}
    return {name: kept[name] for name in FILES}


def filled(text: str, run: Run) -> str:
    """Return the README's text with everything between the marks made anew from a run."""

    def fill(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        new = MARKS[name](run)
        return begin + (f"\n\n{new}\n\n" if "\n" in old else new) + end

    return _MARKED.sub(fill, text)


def marks(text: str) -> list[str]:
    """Return the names of the marks in a text."""
    return [name for _, name, _, _ in _MARKED.findall(text)]


def page() -> str:
    """Return a page with every table of the committed runs."""
    parts = ["# What freezing costs"]
    for name, run in _committed().items():
        parts += [
            f"Made by `{run.command}` and `python -m benchmarks.readme`; the figures, and those of "
            f"single shapes, are in [the run](../benchmarks/results/{name}).",
            *report.about(run),
        ]
        for grid in report.grids(run.records):
            parts.append(f"## {grid.title}")
            parts += [f"{grid.what[0].upper()}{grid.what[1:]}."] if grid.what else []
            parts.append(report.as_markdown(grid))
    return "\n\n".join(parts) + "\n"


def drawn(run: Run) -> str:
    """Return the picture of the training step."""
    records = _steps(run)
    case = records[0].case
    images = case["batch"].replace(" at ", " images of ")
    title = f"A training step of a ResNet-50, {images} × {images.rpartition(' ')[2]}"
    footer = f"Time as a ratio to {BASE}; the lines are the quartiles. {_machine(run)}."
    return picture.draw(records, title, footer)


def _steps(run: Run) -> list[Record]:
    """The records of the step with the largest batch that was measured in every precision."""
    steps = [one for one in run.records if one.work == "step" and one.case.get("launch") != "graph"]
    if not steps:
        raise LookupError("The run has no training steps; measure the work 'step' as well.")
    largest = max(steps, key=lambda one: int(one.case["batch"].split()[0])).case["batch"]
    return [one for one in steps if one.case["batch"] == largest]


def _step_table(run: Run) -> str:
    return _table(_steps(run))


def _kept_table(run: Run) -> str:
    return _table([one for one in run.records if one.case.get("what") == "kept for backward"])


def _table(records: Sequence[Record]) -> str:
    (grid,) = report.grids([one for one in records if not one.arm.startswith(_NOT_IN_README)])
    return report.as_markdown(grid)


def _machine(run: Run) -> str:
    return f"{report.machine(run)}, torch {run.versions['torch'].partition('+')[0]}"


def _guard(run: Run) -> str:
    one = _find(run, "guard", "guard(every=1), all norm tensors", "%")
    batch = one.case["what"].partition(", ")[2]
    return f"{one.median:.2g} % of the step ({batch})"


def _inspect(run: Run) -> str:
    sizes = [one.case["file"] for one in run.records if one.work == "inspect"]
    size = max(sizes, key=lambda size: float(size.split()[0]), default="10 GB")
    time = _find(run, "inspect", "bnfreeze inspect", "x", file=size)
    ours = _find(run, "inspect", "bnfreeze inspect", "MiB", file=size)
    torch = _find(run, "inspect", "import torch", "MiB", file=size)
    return (
        f"one of {size} with 500 norm layers takes {time.median:.2f} times as long as "
        f"`import torch` alone, and {ours.median:.0f} MiB where that takes {torch.median:.0f}"
    )


def _host(run: Run) -> str:
    without, with_grad, both = (
        _find(run, "driver", "bnfreeze fused", "x", call=call).median
        for call in ("forward, no grad", "forward, grad", "forward and backward")
    )
    return (
        f"{without:.2f} times `BatchNorm2d.eval()` without grad, {with_grad:.2f} times with, and "
        f"{both:.2f} times together with its backward"
    )


def _halves(run: Run) -> str:
    case = {"then": "add+relu", "pass": "forward", "shape": "all"}.items()
    medians = [
        one.median
        for one in run.records
        if (one.work, one.arm, one.unit) == ("layer", "bnfreeze fused-act", "x")
        and case <= one.case.items()
        and one.case["precision"] != "fp32"
    ]
    return f"{min(medians):.1f} to {max(medians):.1f}"


def _find(run: Run, work: str, arm: str, unit: str, **case: str) -> Record:
    for one in run.records:
        if (one.work, one.arm, one.unit) == (work, arm, unit) and case.items() <= one.case.items():
            return one
    raise LookupError(f"The run has no figure of {arm!r}; measure the work {work!r} as well.")


def _verdict(run: Run) -> str:
    """Count where our two layers stand against the fastest of the others that hold as much."""
    steps = _steps(run)
    cases = list(dict.fromkeys((one.case["precision"], one.case["layout"]) for one in steps))
    told = []
    for ours in ("bnfreeze fused", "bnfreeze fused-act"):
        level = below = clear = 0
        for case in cases:
            here = {
                one.arm: one for one in steps if (one.case["precision"], one.case["layout"]) == case
            }
            fastest = min((here[arm] for arm in _OTHERS if arm in here), key=lambda one: one.median)
            level += here[ours].low <= fastest.high
            below += here[ours].median < 1
            clear += here[ours].high < 1
        name = ours.removeprefix("bnfreeze ")
        told.append(
            f"with `{name}` as fast as with the fastest of the others, or faster, in {level} (the "
            f"quartiles overlap), and faster than with `BatchNorm2d.eval()` in {below} by the "
            f"median, in {clear} by the upper quartile too"
        )
    return f"Of {len(cases)} cases of precision and layout a step is {'; '.join(told)}."


MARKS: dict[str, Callable[[Run], str]] = {
    "step": _step_table,
    "verdict": _verdict,
    "kept": _kept_table,
    "machine": _machine,
    "guard": _guard,
    "inspect": _inspect,
    "host": _host,
    "halves": _halves,
}


def main() -> None:
    """Write the README's figures, the page and the picture."""
    run = committed()
    README.write_text(filled(README.read_text(encoding="utf-8"), run), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    PICTURE.write_text(drawn(run), encoding="utf-8")


if __name__ == "__main__":
    main()
