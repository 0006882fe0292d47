"""The command: `python -m benchmarks [WORK ...] [--quick]`."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# Before torch is imported: a warning that has nothing to do with this.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console

from benchmarks import (
    report,
    runs,
    work_folded,
    work_guard,
    work_host,
    work_layer,
    work_memory,
    work_model,
    work_process,
)
from benchmarks.facts import Record, Run
from benchmarks.setting import Setting

# `guard` comes late: it changes how the process allocates memory.
WORKS: dict[str, Callable[[Setting], Iterable[Record]]] = {
    "layer": work_layer.measure,
    "host": work_host.measure,
    "block": work_model.block,
    "step": work_model.step,
    "folded": work_folded.measure,
    "detection": work_model.backbone,
    "memory": work_memory.measure,
    "guard": work_guard.measure,
    "inspect": work_process.inspect,
    "cold": work_process.cold_start,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the results, and return 1 if a part failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in options.works:
        if name not in WORKS:
            parser.error(f"there is no work {name!r}; there are {', '.join(WORKS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    progress = Console(stderr=True, highlight=False)
    begin = time.perf_counter()

    def tell(what: str) -> None:
        progress.print(f"{time.perf_counter() - begin:6.0f} s  {what}", style="dim", markup=False)

    setting = Setting(torch.device(options.device), options.size, options.arms or (), tell)
    here, absent = runs.versions()
    for peer, why in absent.items():
        tell(f"{peer} is {why}")
    commit = runs.commit()  # now: files may be edited while this runs
    records, failed = measured(options.works or WORKS, setting)
    tell("done")
    words = sys.argv[1:] if arguments is None else arguments
    run = Run(
        command=" ".join(["python -m benchmarks", *words]),
        device=runs.device_facts(setting.device),
        versions=here,
        commit=commit,
        absent=absent,
        records=records,
        notes=setting.notes,
    )
    if options.json:
        runs.save(run, options.json)
    report.show(run, Console())
    return int(failed)


def measured(works: Iterable[str], setting: Setting) -> tuple[list[Record], bool]:
    """Return the records of these works, and whether one failed. The others run all the same."""
    records: list[Record] = []
    failed = False
    gc.collect()
    gc.freeze()  # or every comparison begins with a search through all imported libraries
    try:
        for name in works:
            try:
                for record in WORKS[name](setting):
                    records.append(record)
            except Exception as error:
                setting.notes.append(f"{name} failed: {type(error).__name__}: {error}")
                failed = True
    except KeyboardInterrupt:
        setting.notes.append("Interrupted before the end.")
        failed = True
    finally:
        gc.unfreeze()
    return records, failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and memory of each way to freeze batch norm, side by side, as ratios.",
        epilog="works: " + "; ".join(f"{name}: {title}" for name, title in report.TITLES.items()),
    )
    parser.add_argument("works", nargs="*", metavar="WORK", help="what to measure; all by default")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full",
                        help="minutes: fewer shapes, smaller images, fewer rounds")  # fmt: skip
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny",
                        help="everything once on toy models, as a test")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, help="number of CPU threads; torch's default if not given"
    )
    parser.add_argument("--arms", nargs="+", metavar="PATTERN",
                        help="only the arms whose names contain one of these")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    return parser


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "Online softmax")
    sys.exit(main())
