"""What `bnfreeze inspect` costs: time and memory over the size of the file.

The files are those of the tests: 500 norm layers among convolutions that are holes on disk. A bare
``import torch`` in a process of its own is measured beside each, and the ratio is what counts.

    python -m benchmarks.inspect_cost
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.test_large_checkpoints import MEASURED, sparse_checkpoint

ROUNDS = 5
IMPORT = """
import sys, torch
status = open("/proc/self/status").read()
print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""


def measured(code: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak MB of a process."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return time.perf_counter() - begin, int(done.stderr.split()[-1]) / 1024


def main() -> None:
    """Print a line for each size."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line for line in lines if line.startswith("model name")]
    print(f"device    {cpu[0].partition(':')[2].strip() if cpu else platform.machine()}")
    print(f"versions  Python {platform.python_version()}")
    print(f"{'file':>8}  {'inspect s':>9}  {'peak MB':>8}  {'import torch s':>14}  {'peak MB':>8}")
    for size, name in ((10**8, "0.1 GB"), (10**9, "1 GB"), (10**10, "10 GB")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "large.pt"
            sparse_checkpoint(path, size)
            rounds = [
                (measured(MEASURED, "inspect", str(path), "--json"), measured(IMPORT))
                for _ in range(ROUNDS)
            ]
        ours = [
            statistics.median(column) for column in zip(*(one for one, _ in rounds), strict=True)
        ]
        bare = [
            statistics.median(column) for column in zip(*(two for _, two in rounds), strict=True)
        ]
        print(f"{name:>8}  {ours[0]:9.2f}  {ours[1]:8.0f}  {bare[0]:14.2f}  {bare[1]:8.0f}")


if __name__ == "__main__":
    main()
