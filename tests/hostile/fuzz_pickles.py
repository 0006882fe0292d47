"""Pickles put together at random from torch's own names.

`python -m tests.hostile.fuzz_pickles N [SEED]` makes many.

What is read of each must be what torch loads, name by name and bit by bit, or the file is refused.
The names are those that `weights_only` allows, in an order that no pickler would write: tensors on
other storages afterwards, attributes that stand for values, sizes that grow, dicts of every kind.
"""

import collections
import random
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from bnfreeze import CheckpointError
from bnfreeze.checkpoints import StoredTensor, open_checkpoint
from tests.checkpoints.formats import torch_zip

from . import pickling as p

RECORDS = [(str(k), struct.pack("<8f", *range(10 * k + 1, 10 * k + 9))) for k in range(3)]
STORAGES = {"Float": 8, "Int": 8, "Double": 4, "Byte": 32, "Half": 16}
ATTRIBUTES = ("data", "real", "mark", "mark", "mark", "grad", "_backward_hooks")
HOOKS = p.name("collections", "OrderedDict") + b")R"


class Program:
    """One random pickle; what it has put into the memo it may take out again."""

    def __init__(self, rng):
        self.rng = rng
        self.memo = collections.defaultdict(list)
        self.count = 0

    def chance(self, share):
        return self.rng.random() < share

    def remembered(self, kind, make):
        """What the memo has of a kind, or something new, which may go into it."""
        if self.memo[kind] and self.chance(0.4):
            return b"h" + bytes([self.rng.choice(self.memo[kind])])
        made = make()
        if self.chance(0.4) and self.count < 250:
            self.memo[kind].append(self.count)
            made += b"q" + bytes([self.count])
            self.count += 1
        return made

    def number(self):
        return p.number(self.rng.choice([0, 1, 1, 2, 3, 4, 8]))

    def storage(self):
        kind = self.rng.choice([*STORAGES, "Float", "Float"])
        key = self.rng.choice(RECORDS)[0]
        return p.storage(key, STORAGES[kind], f"{kind}Storage")

    def sizes(self):
        count = self.rng.choice([1, 1, 2])
        if self.chance(0.8):
            return b"(" + b"".join(self.number() for _ in range(count)) + b"t"
        grown = self.remembered("list", lambda: b"]" + self.number() + b"a")
        grown += self.number() + b"a" if self.chance(0.5) else b""
        return p.name("torch", "Size") + grown + b"\x85R"

    def view(self):
        arguments = self.remembered("storage", self.storage) + p.number(0)
        shape, stride = self.rng.choice([([4], [1]), ([2], [2]), ([3], [0]), ([2, 2], [1, 2])])
        places = p.numbers(shape) + p.numbers(stride)
        places = self.sizes() + self.sizes() if self.chance(0.1) else places
        return arguments + places + b"\x89" + HOOKS

    def flags(self):
        flag = b"}" + p.text("neg") + self.rng.choice([b"\x88", b"\x89"]) + b"s"
        counter = p.name("collections", "Counter") + flag + b"\x85R"
        return self.rng.choice([b"", b"", b"", b"N", b"}", flag, counter])

    def tensor(self, depth=0):
        def make():
            kind = 0 if depth > 2 else self.rng.randrange(15)
            if kind < 8:
                made = p.name("torch._utils", "_rebuild_tensor_v2")
                made += b"(" + self.view() + self.flags() + b"tR"
            elif kind in {8, 9}:
                made = p.name("torch._utils", "_rebuild_parameter_with_state")
                made += b"(" + self.tensor(depth + 1) + b"\x89" + HOOKS + self.state() + b"tR"
            elif kind in {10, 11}:
                made = p.name("torch.nn.parameter", "Parameter")
                made += b"(" + self.tensor(depth + 1) + b"\x89t" + self.rng.choice([b"R", b"\x81"])
            elif kind in {12, 13}:
                made = p.name("torch._tensor", "_rebuild_from_type_v2")
                made += b"(" + p.name("torch._utils", "_rebuild_tensor_v2")
                made += p.name("torch", "Tensor") + b"(" + self.view() + b"t" + self.state() + b"tR"
            else:
                made = p.name("torch", "Tensor") + p.numbers([1, 2]) + b"\x85R"
            return made

        made = self.remembered("tensor", make)
        if self.chance(0.03):
            elsewhere = self.storage() + p.number(0) + p.numbers([2]) + p.numbers([1])
            made += b"(" + elsewhere + b"tb"
        return made

    def state(self):
        value = self.rng.choice([self.tensor(3), self.number(), b"\x88", b"N"])
        pair = p.text(self.rng.choice(ATTRIBUTES)) + value
        attributes = b"}" + pair + b"s"
        counter = p.name("collections", "Counter") + attributes + b"\x85R"
        slots = b"N" + attributes + b"\x86"
        return self.rng.choice([b"N", b"}", attributes, slots, counter])

    def dict(self, depth=0):
        def make():
            count = self.rng.choice([1, 2, 3])
            items = b"(" + b"".join(self.item(depth) for _ in range(count)) + b"u"
            ordered = p.name("collections", "OrderedDict")
            kinds = [b"}" + items, ordered + b")R" + items, ordered + b"}" + items + b"\x85R"]
            counter = p.name("collections", "Counter") + b"}" + items + b"\x85R"
            return self.rng.choice([*kinds, counter])

        made = self.remembered("dict", make)
        return made + (p.text("late") + self.tensor() + b"s" if self.chance(0.2) else b"")

    def item(self, depth):
        value = self.tensor() if depth > 1 or self.chance(0.75) else self.dict(depth + 1)
        return p.text(self.rng.choice("abcde")) + value


def leaves(holder, kind):
    """The tensors of nested dicts by their paths."""
    found, waiting = {}, [((), holder)]
    while waiting:
        path, one = waiting.pop()
        children = one.named() if hasattr(one, "named") else one
        if isinstance(one, kind):
            found[path] = one
        elif isinstance(children, dict) and len(path) < 6:
            waiting += [((*path, key), child) for key, child in children.items()]
    return found


def torch_reads(path):
    """Dtype, shape and bytes of each tensor, as torch loads them; None where it does not."""
    try:
        found = leaves(torch.load(path, weights_only=True), torch.Tensor)
    except Exception:
        return None
    plain = {key: tensor.detach().resolve_neg() for key, tensor in found.items()}
    return {
        key: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.numpy().tobytes())
        for key, t in plain.items()
    }


def bnfreeze_reads(path):
    """The same as it is read here; no bytes of what is only described."""
    with open_checkpoint(path) as checkpoint:
        return {
            key: (t.dtype, t.shape, t.words().tobytes() if t.has_values else None)
            for key, t in leaves(checkpoint.root, StoredTensor).items()
        }


def fuzz(count, seed):
    """Read `count` pickles in both ways; give how often each outcome came.

    Raises:
        AssertionError: one was read otherwise than torch loads it.
    """
    rng = random.Random(seed)
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            path = torch_zip(Path(folder) / "a.pt", p.whole(Program(rng).dict()), RECORDS)
            theirs = torch_reads(path)
            try:
                ours = bnfreeze_reads(path)
            except CheckpointError:
                outcomes["refused"] += 1
                continue
            if theirs is None:
                outcomes["read, and torch refuses"] += 1
                continue
            assert ours.keys() == theirs.keys()
            for key, (dtype, shape, data) in ours.items():
                assert (dtype, shape) == theirs[key][:2]
                assert data is None or data == theirs[key][2]
            outcomes["agrees"] += 1
    return outcomes


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    outcomes = fuzz(count, seed)
    print(", ".join(f"{name} {number}" for name, number in sorted(outcomes.items())))


if __name__ == "__main__":
    main()
