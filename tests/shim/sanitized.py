"""Run variants of the kernel under the address and undefined-behaviour sanitizers.

    python sanitized.py LIBRARY CASE...

A process of its own, without torch, for the address sanitizer must be loaded before all else. Each
tensor is a block of memory of exactly its size. The sanitizers end the process at the first access
outside it, or at a misaligned address.
"""

import ctypes
import json
import random
import sys

from bnfreeze.nn.cuda import plan as plans
from bnfreeze.nn.cuda.plan import ARGS

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def block(size, *, ones=False):
    """Memory of just that many bytes, with small bit patterns: tiny numbers in every dtype."""
    pointer = libc.malloc(size)
    content = (b"\x00\x00\x80\x3f" if ones else b"\x01\x00\x02\x00") * (size // 4 + 1)
    ctypes.memmove(pointer, content, size)
    return pointer


def run(library, shape, dtype, rows, aligned, direction, activation, residual):
    plan = plans.elementwise(tuple(shape), dtype, rows, aligned, direction, activation, residual, 3)
    size = 4 if dtype == "f32" else 2
    channels = shape[1]
    for length in shape[:1] + shape[1:]:
        size *= length
    tensors = [block(size) for _ in range(5)]
    parameters = [block(4 * channels, ones=True) for _ in range(8)]
    partial = block(8 * channels * max(plan.blocks, 1))
    tail = (partial, 1e-5, 1e-5, 0, 0)
    launch(library, plan, (*tensors, *parameters, *tail))
    if plan.blocks:
        outs = [block(4 * channels) for _ in range(2)]
        finish = plans.finish(channels, plan.blocks)
        launch(library, finish, (0, 0, 0, *outs, *parameters, *tail))
        tensors += outs
    for pointer in (*tensors, *parameters, partial):
        libc.free(pointer)


def launch(library, plan, values):
    arguments = ctypes.create_string_buffer(ARGS.pack(*values, plan.geometry))
    assert len(arguments) == ARGS.size + 1
    address = ctypes.c_void_p(ctypes.addressof(arguments))
    getattr(library, plan.variant.name)(address, *plan.grid, random.randrange(1000))


if __name__ == "__main__":
    opened = ctypes.CDLL(sys.argv[1])
    for case in json.loads(sys.argv[2]):
        run(opened, *case)
    sys.stdout.write("clean\n")
