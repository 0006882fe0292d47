"""Run variants of the kernel under the address and undefined-behaviour sanitizers.

    python sanitized.py LIBRARY JSON

A process of its own, which imports neither torch nor bnfreeze, for the address sanitizer must be
loaded before all else. Each tensor is a block of memory of exactly its size. The sanitizers end the
process at the first access outside it, or at a misaligned address.
"""

import ctypes
import json
import random
import struct
import sys

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]


def block(size, *, ones=False):
    """Memory of just that many bytes, with small bit patterns: tiny numbers in every dtype."""
    pointer = libc.malloc(size)
    content = (b"\x00\x00\x80\x3f" if ones else b"\x01\x00\x02\x00") * (size // 4 + 1)
    ctypes.memmove(pointer, content, size)
    return pointer


def run(library, layout, case):
    """Launch the plans of one case, which test_shim_catches_bugs.py has written down."""
    channels, blocks = case["channels"], case["blocks"]
    tensors = [block(case["bytes"]) for _ in range(5)]
    parameters = [block(4 * channels, ones=True) for _ in range(8)]
    partial = block(8 * channels * max(blocks, 1))
    for name, grid, geometry in case["launches"]:
        if name == "bnfreeze_finish":
            tensors = [0, 0, 0, block(4 * channels), block(4 * channels)]
        values = (*tensors, *parameters, partial, 1e-5, 1e-5, 0, 0, bytes.fromhex(geometry))
        arguments = ctypes.create_string_buffer(struct.pack(layout, *values))
        address = ctypes.c_void_p(ctypes.addressof(arguments))
        getattr(library, name)(address, *grid, random.randrange(1000))


if __name__ == "__main__":
    opened, asked = ctypes.CDLL(sys.argv[1]), json.loads(sys.argv[2])
    for case in asked["cases"]:
        run(opened, asked["layout"], case)
    sys.stdout.write("clean\n")
