"""Pickles put together by hand, opcode by opcode, that no pickler would write."""

import struct


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    head = b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + struct.pack("<i", size)
    return head + value.to_bytes(size, "little", signed=True)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module, attribute):
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def storage(key, count, kind="FloatStorage"):
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count)
    return b"(" + parts + b"tQ"


def tensor(where, shape, stride, offset=0, metadata=b""):
    """A call of _rebuild_tensor_v2."""
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = where + number(offset) + numbers(shape) + numbers(stride) + b"\x89" + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + metadata + b"tR"


def mapping(pairs):
    return b"}(" + b"".join(text(key) + value for key, value in pairs) + b"u"


def whole(body):
    return b"\x80\x02" + body + b"."


def batch_norm(channels=4, key="0"):
    """A state_dict of one batch norm, all its statistics in one storage of `channels`."""
    return [
        (part, tensor(storage(key, channels), [channels], [1]))
        for part in ("bn.running_mean", "bn.running_var")
    ]


def calls(module, attribute, argument):
    """What an attacker puts in: a call of any function with a string."""
    return name(module, attribute) + b"(" + text(argument) + b"tR"
