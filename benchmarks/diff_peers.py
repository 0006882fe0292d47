"""Two ResNet-50 of which one statistic moved: what tools say, and how long they take.

    python -m benchmarks.diff_peers BIN    # BIN: where ckptkit and checkpoint-lens are installed

Prints a table for docs/benchmarks.md. Each command is a process of its own; they run in turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.models import resnet50

ROUNDS = 7
HERE = [sys.executable, "-m", "bnfreeze"]


def main(peers: Path) -> None:
    """Measure, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = (str(Path(folder) / name) for name in ("a.pt", "b.pt"))
        state = resnet50().state_dict()
        torch.save(state, a)
        state["layer3.2.bn2.running_var"][7] += 0.25
        torch.save(state, b)
        commands = {
            "bnfreeze diff": [*HERE, "diff", a, b, "--plain"],
            "ckptkit diff": [str(peers / "ckptkit"), "diff", a, b],
            "bnfreeze inspect": [*HERE, "inspect", b],
            "ckptkit info": [str(peers / "ckptkit"), "info", b],
            "ckptkit stats": [str(peers / "ckptkit"), "stats", b],
            "checkpoint-lens inspect": [str(peers / "checkpoint-lens"), "inspect", b],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(ROUNDS + 1):
            for name, command in commands.items():
                begin = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if number:  # the first round fills the caches
                    seconds[name].append(time.perf_counter() - begin)
                else:
                    print(f"$ {name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    base = statistics.median(seconds["bnfreeze diff"])
    print("| command | time | range |\n| --- | --- | --- |")
    for name, times in seconds.items():
        middle, least, most = statistics.median(times) / base, min(times) / base, max(times) / base
        print(f"| `{name}` | {middle:.2f} | {least:.2f}–{most:.2f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
