"""Truncated and bit-flipped checkpoints.

`python -m tests.hostile.fuzz_checkpoints N [SEED] [FORMAT...]` makes many.

N files are made of each format, each damaged in another way. Reading one must give a documented
error or the right answer. The right answer is what the ordinary loader says of the same bytes,
where that takes them too: every tensor that both give must have the same shape and the same bits.
"""

import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from bnfreeze import CheckpointError
from bnfreeze.checkpoints import open_checkpoint
from bnfreeze.inspection.inspect import inspect_checkpoint
from tests.checkpoints.formats import FORMATS, FURTHER_FORMATS

ALL_FORMATS = FORMATS | FURTHER_FORMATS


def state():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4).bfloat16()
    )
    model[:2](torch.randn(4, 3, 8, 8))
    weights = model.state_dict()
    weights["0.weight"] = weights["0.weight"].transpose(0, 1)
    return weights


def damaged(data, rng):
    """The bytes with one thing wrong, or a few."""
    data = bytearray(data)
    way = rng.randrange(6)
    if way == 0:
        return bytes(data[: rng.randrange(len(data))])
    if way == 1:
        at, length = rng.randrange(len(data)), rng.randrange(1, 64)
        return bytes(data[:at] + data[at + length :])
    if way == 2:
        at, source = rng.randrange(len(data)), rng.randrange(len(data))
        length = rng.randrange(1, 64)
        data[at : at + length] = data[source : source + length]
        return bytes(data)
    if way == 3:
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(1, 9)] = rng.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" * 4])
        return bytes(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def ordinary(path, kind):
    """What the ordinary loader makes of it; None where it refuses, or is not to be asked."""
    try:
        if kind == "safetensors":
            return load_file(path)
        if kind == "shard index":
            places = json.loads(path.read_text())["weight_map"]
            shards = {place: load_file(path.parent / place) for place in set(places.values())}
            return {name: shards[place][name] for name, place in places.items()}
        if kind == "npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive}
        if kind in {"torch zip", "torch legacy"}:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(path, weights_only=True, map_location="cpu")
            return found if isinstance(found, dict) else None
    except Exception:
        return None
    return None


def check(path, kind):
    """Read a damaged file; give what came of it, or raise AssertionError."""
    try:
        inspect_checkpoint(path).to_dict()
    except CheckpointError as error:
        assert str(error).strip()
        return type(error).__name__
    with open_checkpoint(path) as checkpoint:
        ours = checkpoint.chosen().models[0].tensors
        theirs = ordinary(path, kind)
        compared = 0
        for name, tensor in ours.items():
            other = None if theirs is None else theirs.get(name)
            try:
                words = tensor.words()
            except CheckpointError:
                continue
            if isinstance(other, torch.Tensor):
                assert tensor.shape == tuple(other.shape), name
                assert words.tobytes() == bits(other), name
                compared += 1
    return "agrees" if compared else "answered"


def fuzz(kind, count, seed, folder):
    """Damage `count` files of a kind; give how often each outcome came."""
    rng = random.Random(f"{kind} {seed}")
    folder = Path(folder)
    original = folder / "original"
    made = ALL_FORMATS[kind](state(), original)
    inspect_checkpoint(made)
    files = [made] if made.is_file() else sorted(made.iterdir())
    if kind == "shard index":
        files = sorted(made.parent.iterdir())
    contents = {file: file.read_bytes() for file in files}
    outcomes = Counter()
    for number in range(count):
        victim = rng.choice(files)
        victim.write_bytes(damaged(contents[victim], rng))
        try:
            outcomes[check(made, kind)] += 1
        except Exception:
            kept = Path(tempfile.mkdtemp(prefix="fuzz-")) / "kept"
            if made.is_file() and kind != "shard index":
                shutil.copy(made, kept)
            else:
                shutil.copytree(victim.parent, kept)
            print(f"{kind}, seed {seed}, number {number}: kept in {kept}", file=sys.stderr)
            raise
        finally:
            victim.write_bytes(contents[victim])
    return outcomes


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for kind in sys.argv[3:] or ALL_FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = fuzz(kind, count, seed, folder)
        counts = ", ".join(f"{name} {number}" for name, number in sorted(outcomes.items()))
        print(f"{kind}: {count} files: {counts}", flush=True)


if __name__ == "__main__":
    main()
