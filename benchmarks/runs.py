"""A run as a JSON file, and facts about the machine."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.facts import Record, Run

HERE = Path(__file__).parent
SCHEMA = 1


def save(run: Run, path: Path) -> None:
    """Write a run; a line for each comparison, with each arm's median, quartiles and rounds."""
    facts = {"schema": SCHEMA, **dataclasses.asdict(dataclasses.replace(run, records=()))}
    del facts["records"]
    head = json.dumps(facts, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(one, ensure_ascii=False) for one in _tables(run.records))
    path.write_text(f'{head},\n "tables": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Run:
    """Read what `save` wrote."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.pop("schema") != SCHEMA:
        raise ValueError(f"{path} does not have schema {SCHEMA}.")
    records = [
        Record(one["work"], one["case"], arm, one["unit"], *figures, base=one["base"])
        for one in facts.pop("tables")
        for arm, figures in one["arms"].items()
    ]
    return Run(**facts, records=records)


def _tables(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Put the arms of each comparison together."""
    tables: dict[tuple[object, ...], dict[str, Any]] = {}
    for one in records:
        key = one.work, tuple(one.case.items()), one.unit, one.base
        facts = {"work": one.work, "case": one.case, "unit": one.unit, "base": one.base, "arms": {}}
        figures = [float(f"{value:.4g}") for value in (one.median, one.low, one.high)]
        tables.setdefault(key, facts)["arms"][one.arm] = [*figures, one.rounds]
    return list(tables.values())


def device_facts(device: torch.device) -> dict[str, str]:
    """Return the device's name, and its driver or its number of threads."""
    if device.type == "cuda":
        return {
            "kind": "cuda",
            "name": torch.cuda.get_device_name(device),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return {"kind": device.type, "name": _cpu(), "threads": str(torch.get_num_threads())}


def versions() -> tuple[dict[str, str], dict[str, str]]:
    """Return the versions of the installed libraries, and why the others are absent."""
    here = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        here["cuda"] = torch.version.cuda
    absent = {}
    for peer, version in peers.everyone().items():
        (absent if peers.is_absent(peer) else here)[peer] = version
    return here, absent


def commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` if files differ from it."""
    return _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]
