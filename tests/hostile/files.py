"""Hostile files, made afresh by each run of the tests.

Each maker takes a folder and gives the path of what is to be looked at. What it makes must be
answered with the exit code that stands beside it, and with output that matches the expression.
"""

import collections
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import torch

from tests.checkpoints.formats import (
    FORMATS,
    safetensors_file,
    save_distributed,
    save_shards,
    torch_zip,
    zip_file,
)

from . import pickling as p

# name → (maker, exit code, a regular expression that what is printed must have)
HOSTILE = {}
# Those that take seconds, and show what others show in less.
SLOW = {"a_quarter_million_tensors", "a_memo_of_millions", "a_pickle_of_five_million_opcodes"}
MARKER = "executed"


def hostile(code, words):
    def add(maker):
        HOSTILE[maker.__name__] = (maker, code, words)
        return maker

    return add


class Payload:
    """Runs a command when it is unpickled in the ordinary way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def payload(folder):
    return Payload(f"touch '{folder / MARKER}'")


def state():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model(torch.randn(4, 3, 8, 8))
    return model.state_dict()


def changed(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


FOUR = struct.pack("<4f", 1, 2, 3, 4)

# Code in a pickle.


@hostile(1, r"runs-code[^}]*posix\.system")
def os_system_in_a_zip(folder):
    torch.save({"state_dict": state(), "x": payload(folder)}, folder / "a.pt")
    return folder / "a.pt"


@hostile(1, r"runs-code[^}]*posix\.system")
def os_system_in_a_legacy_file(folder):
    torch.save(
        {"state_dict": state(), "x": payload(folder)},
        folder / "a.pt",
        _use_new_zipfile_serialization=False,
    )
    return folder / "a.pt"


@hostile(2, r"would call `posix\.system`")
def os_system_in_a_plain_pickle(folder):
    (folder / "a.pt").write_bytes(pickle.dumps(payload(folder)))
    return folder / "a.pt"


@hostile(2, r"would call `posix\.system`")
def os_system_in_the_metadata_of_a_distributed_checkpoint(folder):
    path = save_distributed(state(), folder / "dcp")
    (path / ".metadata").write_bytes(pickle.dumps(payload(folder)))
    return path


@hostile(2, r"would call `posix\.system`")
def os_system_in_a_piece_of_a_distributed_checkpoint(folder):
    path = save_distributed(state(), folder / "dcp")
    metadata = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    buffer = io.BytesIO()
    torch.save(payload(folder), buffer)
    (file,) = path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = len(data), len(buffer.getvalue())
        data += buffer.getvalue()
    file.write_bytes(data)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


@hostile(2, r"would call `posix\.system`")
def os_system_in_the_storage_keys_of_a_legacy_file(folder):
    path = FORMATS["torch legacy"](state(), folder / "a.pt")
    data = path.read_bytes()
    # The list of keys is the last pickle: it begins after the fourth STOP.
    stream = io.BytesIO(data)
    for _ in range(4):
        for opcode, _, _ in __import__("pickletools").genops(stream):
            if opcode.name == "STOP":
                break
    path.write_bytes(data[: stream.tell()] + pickle.dumps(payload(folder), 2))
    return path


@hostile(2, r"would call `builtins\.eval`")
def a_name_that_is_put_together_on_the_stack(folder):
    body = b"\x8c\x08builtins\x8c\x04eval\x93" + b"(" + p.text("1") + b"tR"
    return torch_zip(folder / "a.pt", b"\x80\x04" + body + b".")


@hostile(2, r"would call `builtins\.getattr`")
def names_of_python_2(folder):
    return torch_zip(folder / "a.pt", p.whole(p.calls("__builtin__", "getattr", "x")))


@hostile(2, r"would call `torch\.serialization\.add_safe_globals`")
def a_call_that_widens_what_torch_allows(folder):
    body = p.calls("torch.serialization", "add_safe_globals", "os")
    return torch_zip(folder / "a.pt", p.whole(body))


@hostile(2, r"would call `posix\.system`")
def code_by_an_old_opcode(folder):
    return torch_zip(folder / "a.pt", b"\x80\x02(" + p.text("x") + b"iposix\nsystem\n.")


@hostile(2, r"uses EXT1, which is not read")
def a_name_from_the_extension_registry(folder):
    return torch_zip(folder / "a.pt", b"\x80\x02\x82\x01.")


@hostile(0, r"name.: .1.")
def a_harmless_name_that_weights_only_refuses(folder):
    return FORMATS["torch zip"](
        {"state_dict": state(), "x": collections.defaultdict(list)}, folder / "a.pt"
    )


@hostile(0, r"runs-code[^}]*torch\.nn\.modules\.batchnorm\.BatchNorm2d")
def a_whole_model(folder):
    torch.save(torch.nn.BatchNorm2d(4), folder / "a.pt")
    return folder / "a.pt"


@hostile(0, r"runs-code[^}]*torch\.nn\.modules\.batchnorm\.BatchNorm2d")
def a_whole_model_in_a_legacy_file(folder):
    return FORMATS["torch legacy"](torch.nn.BatchNorm2d(4), folder / "a.pt")


# Claims.


@hostile(2, r"said to have 400,000,000,000 bytes, and 'data/0' has 16")
def a_storage_of_a_claimed_size(folder):
    where = p.storage("0", 10**11)
    pairs = [("bn.running_mean", p.tensor(where, [10**11], [1]))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"reaches to byte 20 of its storage, which has 16")
def a_tensor_past_its_storage(folder):
    pairs = [("bn.running_mean", p.tensor(p.storage("0", 4), [4], [1], offset=1))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"shape, stride and offset do not make sense")
def a_negative_stride(folder):
    pairs = [("bn.running_mean", p.tensor(p.storage("0", 4), [4], [-1], offset=3))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"shape, stride and offset do not make sense")
def a_negative_offset(folder):
    pairs = [("bn.running_mean", p.tensor(p.storage("0", 4), [4], [1], offset=-4))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ channels up to 'bn'")
def stride_0_and_a_shape_of_a_trillion(folder):
    pairs = [
        (part, p.tensor(p.storage("0", 4), [10**12], [0]))
        for part in ("bn.running_mean", "bn.running_var")
    ]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ dimensions of a tensor")
def a_million_dimensions(folder):
    one = p.tensor(p.storage("0", 4), [1] * 100_000, [0] * 100_000)
    return torch_zip(folder / "a.pt", p.whole(p.mapping([("x", one)])), [("0", FOUR)])


@hostile(2, r"Refused: .*compressed")
def a_record_that_inflates(folder):
    pairs = p.mapping(p.batch_norm(2**24))
    with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", p.whole(pairs), zipfile.ZIP_STORED)
        with archive.open("a/data/0", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(2**20))
    return folder / "a.pt"


@hostile(2, r"Refused: .*compressed")
def a_pickle_that_inflates(folder):
    body = p.whole(b"(" + b"}" * 60_000_000 + b"t")
    return torch_zip(folder / "a.pt", body, compression=zipfile.ZIP_DEFLATED)


@hostile(2, r"Refused: [\d,]+ opcodes of a pickle")
def a_pickle_of_five_million_opcodes(folder):
    return torch_zip(folder / "a.pt", p.whole(b"(" + b"}" * 5_000_000 + b"t"))


@hostile(2, r"Refused: [\d,]+ bytes of a pickle")
def a_pickle_of_forty_megabytes(folder):
    return torch_zip(folder / "a.pt", p.whole(p.text("x" * 40_000_000)))


@hostile(2, r"Refused: [\d,]+ opcodes of a pickle|Damaged")
def a_memo_of_millions(folder):
    return torch_zip(folder / "a.pt", b"\x80\x04]" + b"\x94" * 5_000_000 + b".")


@hostile(2, r"no tensors by name")
def a_memo_index_of_a_quarter_billion(folder):
    (folder / "a.pt").write_bytes(b"\x80\x02Nr\0\0\0\x10.")
    return folder / "a.pt"


@hostile(2, r"ends or breaks off|Refused: [\d,]+ bytes of a pickle")
def a_string_of_claimed_exabytes(folder):
    body = b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x."
    return torch_zip(folder / "a.pt", body)


@hostile(2, r"ends or breaks off|Refused")
def a_number_of_a_million_digits(folder):
    return torch_zip(folder / "a.pt", b"\x80\x02I" + b"9" * 1_000_000 + b"\n.")


@hostile(0, r'"name": "bn"')
def a_tuple_shared_two_to_the_sixtieth_times(folder):
    shared = p.number(1) + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(60))
    pairs = [*p.batch_norm(), ("x", shared)]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(0, r'"name": "bn"')
def a_key_that_takes_for_ever_to_hash(folder):
    shared = p.number(1) + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(60))
    body = p.mapping(p.batch_norm()) + shared + b"Ns"
    return torch_zip(folder / "a.pt", p.whole(body), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ levels of nesting")
def a_list_nested_200_000_deep(folder):
    body = b"]" * 200_000 + b"a" * 199_999
    pairs = [*p.batch_norm(), ("x", body)]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ levels of nesting")
def a_tuple_nested_200_000_deep(folder):
    pairs = [*p.batch_norm(), ("x", b")" + b"\x85" * 200_000)]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ levels of nesting")
def a_key_nested_200_000_deep(folder):
    body = p.mapping(p.batch_norm()) + b")" + b"\x85" * 200_000 + b"Ns"
    return torch_zip(folder / "a.pt", p.whole(body), [("0", FOUR)])


@hostile(0, r'"name": "bn"')
def a_dict_that_holds_itself(folder):
    body = b"}q\0" + p.text("self") + b"h\0s" + p.text("state_dict")
    body += p.mapping(p.batch_norm()) + b"s"
    return torch_zip(folder / "a.pt", p.whole(body), [("0", FOUR)])


@hostile(0, r'"bytes": 40000')
def ten_thousand_names_on_one_storage(folder):
    whole = torch.ones(10_000)
    torch.save({f"n{i}": whole[i : i + 1] for i in range(10_000)}, folder / "a.pt")
    return folder / "a.pt"


@hostile(2, r"Refused: [\d,]+ (tensors|opcodes)")
def a_quarter_million_tensors(folder):
    one = p.tensor(b"h\0", [1], [1])
    body = p.storage("0", 4) + b"q\0" + b"0" * 0
    body += b"(" + b"".join(one for _ in range(250_000)) + b"t"
    return torch_zip(folder / "a.pt", p.whole(body), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ characters of a tensor's name")
def a_name_of_a_megabyte(folder):
    pairs = [("x" * 1_000_000 + key, value) for key, value in p.batch_norm()]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(0, r"stats-unread")
def a_variance_whose_sign_is_turned_by_a_flag(folder):
    negated = b"}" + p.text("neg") + b"\x88s"
    pairs = [
        ("bn.running_mean", p.tensor(p.storage("0", 4), [4], [1])),
        ("bn.running_var", p.tensor(p.storage("0", 4), [4], [1], metadata=negated)),
    ]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"Refused: 64 dimensions of a tensor")
def as_many_dimensions_as_numpy_has_and_two_halves(folder):
    where = p.storage("1", 4, "ComplexDoubleStorage")
    pairs = [*p.batch_norm(), ("x", p.tensor(where, [1] * 62 + [2, 2], [1] * 63 + [2]))]
    records = [("0", FOUR), ("1", bytes(64))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), records)


@hostile(2, r"the sizes of a tensor do not make sense")
def an_empty_tensor_whose_other_sizes_overflow(folder):
    empty = p.tensor(p.storage("0", 4), [2**62, 2**62, 0], [0, 0, 1])
    pairs = [*p.batch_norm(), ("x", empty)]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


# Zip files that two readers could see in two ways.


@hostile(2, r"Ambiguous: .*more than once")
def two_pickles(folder):
    body = p.whole(p.mapping(p.batch_norm()))
    entries = [("a/data.pkl", body), ("a/data.pkl", body), ("a/data/0", FOUR)]
    return zip_file(folder / "a.pt", entries)


@hostile(2, r"Ambiguous: .*more than once")
def two_pickles_in_letters_of_another_size(folder):
    body = p.whole(p.mapping(p.batch_norm()))
    entries = [("a/data.pkl", body), ("a/DATA.pkl", body), ("a/data/0", FOUR)]
    return zip_file(folder / "a.pt", entries)


@hostile(2, r"Ambiguous: .*several folders")
def two_archives_in_one(folder):
    body = p.whole(p.mapping(p.batch_norm()))
    entries = [("a/data.pkl", body), ("b/data.pkl", body), ("a/data/0", FOUR)]
    return zip_file(folder / "a.pt", entries)


@hostile(2, r"one size here and another there|overlap|not where")
def a_local_header_that_tells_another_size(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    data = bytearray(path.read_bytes())
    at = data.index(b"archive/data/0") - 12
    data[at : at + 4] = struct.pack("<I", 8)
    path.write_bytes(data)
    return path


@hostile(2, r"not where the zip file's directory says")
def a_local_header_of_another_name(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"archive/data/0", b"archive/data/9", 1))
    return path


@hostile(2, r"overlap")
def two_entries_over_the_same_bytes(folder):
    """One entry lies inside the bytes of another, with a local header of its own there."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("archive/data/1", FOUR)
    data = inner.getvalue()
    outer = data[: data.index(b"PK\1\2")]
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", outer)])
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    entry = bytearray(inner.getvalue()[inner.getvalue().index(b"PK\1\2") :][: 46 + 14])
    entry[42:46] = struct.pack("<I", data.index(outer))
    (count,) = struct.unpack_from("<H", data, end + 10)
    size, at = struct.unpack_from("<2I", data, end + 12)
    closing = (b"PK\5\6", 0, 0, count + 1, count + 1, size + len(entry), at, 0)
    path.write_bytes(data[:end] + entry + struct.pack("<4s4H2LH", *closing))
    return path


@hostile(2, r"encrypted")
def an_encrypted_entry(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + 8
    data[at] |= 1
    path.write_bytes(data)
    return path


@hostile(2, r"Ambiguous: .*as a folder")
def a_storage_that_is_marked_as_a_folder(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    data = bytearray(path.read_bytes())
    data[data.rindex(b"archive/data/0") - 8] |= 0x10
    path.write_bytes(data)
    return path


@hostile(2, r"Truncated|contradicts itself")
def a_zip_file_with_a_comment(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5\6" + bytes(18)
    return path


@hostile(2, r"contradicts itself|not where")
def a_zip_file_after_something_else(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    path.write_bytes(b"PK\3\4" + path.read_bytes())
    return path


@hostile(2, r"entries of a zip file|contradicts itself|Truncated")
def a_directory_of_claimed_billions(folder):
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, 2**45, 4)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 4, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    (folder / "a.pt").write_bytes(b"PK\3\4" + end64 + locator + end)
    return folder / "a.pt"


@hostile(2, r"bytes in it do not match the checksum")
def a_pickle_with_a_flipped_bit(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    return changed(path, b"bn.running_mean", b"bn.running_maan")


@hostile(2, r"do not match the checksum")
def statistics_with_a_flipped_bit(folder):
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", FOUR)])
    return changed(path, FOUR, FOUR[:-1] + b"\x41")


# Safetensors.

STATISTICS = {
    "bn.running_mean": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "bn.running_var": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
}


@hostile(2, r"Ambiguous: its header has the name 'bn.running_var' twice")
def a_header_with_a_name_twice(folder):
    text = (
        json.dumps(STATISTICS)[:-1]
        + ', "bn.running_var": '
        + json.dumps(STATISTICS["bn.running_var"])
    )
    return safetensors_file(folder / "a.safetensors", text.encode() + b"}", bytes(32))


@hostile(2, r"Ambiguous: its header has the name 'shape' twice")
def a_tensor_with_a_shape_twice(folder):
    text = json.dumps(STATISTICS).replace('"shape": [4]', '"shape": [4], "shape": [2]', 1)
    return safetensors_file(folder / "a.safetensors", text.encode(), bytes(32))


@hostile(2, r"Damaged")
def overlapping_offsets(folder):
    header = {name: {**content, "data_offsets": [0, 16]} for name, content in STATISTICS.items()}
    return safetensors_file(folder / "a.safetensors", header, bytes(32))


@hostile(2, r"Damaged")
def offsets_past_the_end(folder):
    return safetensors_file(folder / "a.safetensors", STATISTICS, bytes(20))


@hostile(2, r"Damaged")
def a_shape_that_overflows(folder):
    header = {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}
    return safetensors_file(folder / "a.safetensors", header, bytes(16))


@hostile(2, r"Damaged")
def a_gap_between_tensors(folder):
    header = {**STATISTICS, "x": {"dtype": "F32", "shape": [1], "data_offsets": [36, 40]}}
    return safetensors_file(folder / "a.safetensors", header, bytes(40))


@hostile(2, r"Refused: [\d,]+ bytes of a safetensors header")
def a_header_of_claimed_exabytes(folder):
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    return folder / "a.safetensors"


@hostile(2, r"Refused|Damaged")
def a_header_nested_without_end(folder):
    text = b'{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    return safetensors_file(folder / "a.safetensors", text)


@hostile(2, r"dtype 'F31'")
def a_dtype_that_does_not_exist(folder):
    header = {"x": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}}
    return safetensors_file(folder / "a.safetensors", header, bytes(16))


@hostile(2, r"Damaged")
def a_header_that_describes_no_tensors(folder):
    return safetensors_file(folder / "a.safetensors", {"x": 1, "y": [1, 2]}, bytes(16))


@hostile(2, r"Damaged|Refused")
def a_number_of_a_million_digits_in_a_header(folder):
    text = b'{"x":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,16]}}'
    return safetensors_file(folder / "a.safetensors", text, bytes(16))


# Indexes and folders.


def index(folder, change):
    path = save_shards(state(), folder / "hf")
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))
    return path


@hostile(2, r"Refused: it refers to '\.\./\.\./etc/passwd', and not to a file beside it")
def a_shard_outside_the_folder(folder):
    return index(folder, lambda places: places.update({"1.running_var": "../../etc/passwd"}))


@hostile(2, r"Refused: it refers to '/dev/zero', and not to a file beside it")
def a_shard_that_is_a_device(folder):
    return index(folder, lambda places: places.update({"1.running_var": "/dev/zero"}))


@hostile(2, r"Shard model\.safetensors\.index\.json: .*index")
def an_index_that_names_itself(folder):
    itself = "model.safetensors.index.json"
    return index(folder, lambda places: places.update({"1.running_var": itself}))


@hostile(2, r"Shard .*: Cannot be opened")
def a_shard_that_is_missing(folder):
    path = save_shards(state(), folder / "hf")
    next(path.parent.glob("*-00002-*")).unlink()
    return path


@hostile(2, r"is said to be in it, and is not")
def a_tensor_that_is_not_in_its_shard(folder):
    return index(folder, lambda places: places.update({"nowhere": next(iter(places.values()))}))


@hostile(2, r"no weight_map")
def other_json(folder):
    (folder / "config.json").write_text('{"architectures": ["ResNet"]}')
    return folder / "config.json"


def metadata(folder, change):
    path = save_distributed(state(), folder / "dcp")
    content = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    change(content)
    (path / ".metadata").write_bytes(pickle.dumps(content))
    return path


def every_place(**fields):
    def change(content):
        for info in content.storage_data.values():
            for name, value in fields.items():
                setattr(info, name, value)

    return change


@hostile(2, r"Refused: it refers to '\.\./\.\./etc/passwd'")
def a_piece_outside_the_folder(folder):
    return metadata(folder, every_place(relative_path="../../etc/passwd"))


@hostile(2, r"should reach to byte")
def a_piece_past_the_end(folder):
    return metadata(folder, every_place(length=10**15))


@hostile(2, r"pieces overlap")
def pieces_that_are_all_the_same_bytes(folder):
    return metadata(folder, every_place(offset=0, length=3000))


@hostile(2, r"does not fit|do not make it up")
def a_distributed_tensor_of_a_claimed_size(folder):
    def change(content):
        for tensor in content.state_dict_metadata.values():
            tensor.size = torch.Size([10**12])

    return metadata(folder, change)


@hostile(2, r"does not fit|has another tensor")
def a_distributed_tensor_of_another_dtype(folder):
    def change(content):
        for tensor in content.state_dict_metadata.values():
            tensor.properties.dtype = torch.float64

    return metadata(folder, change)


@hostile(2, r"Cannot be opened")
def a_piece_that_is_missing(folder):
    path = save_distributed(state(), folder / "dcp")
    next(path.glob("*.distcp")).unlink()
    return path


@hostile(2, r"A folder without \.metadata")
def an_empty_folder(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


@hostile(2, r"Not a regular file")
def a_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@hostile(2, r"Cannot be opened")
def nothing(folder):
    return folder / "nothing.pt"


# What is no checkpoint.


def written(folder, data, name="a.pt"):
    (folder / name).write_bytes(data)
    return folder / name


@hostile(2, r"The file is empty")
def an_empty_file(folder):
    return written(folder, b"")


@hostile(2, r"Git LFS pointer.*git lfs pull")
def a_git_lfs_pointer(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
    return written(folder, pointer + b"\nsize 102530333\n")


@hostile(2, r"A web page")
def a_web_page(folder):
    return written(folder, b"\n<!DOCTYPE html><html><title>Sign in</title></html>")


@hostile(2, r"begins with zeros")
def nothing_but_zeros(folder):
    return written(folder, bytes(100_000))


@hostile(2, r"Truncated: it begins as a zip file")
def half_a_zip_file(folder):
    path = FORMATS["torch zip"](state(), folder / "a.pt")
    return written(folder, path.read_bytes()[:1500])


@hostile(2, r"ends or breaks off|Damaged or truncated")
def half_a_legacy_file(folder):
    path = FORMATS["torch legacy"](state(), folder / "a.pt")
    return written(folder, path.read_bytes()[:-100])


@hostile(2, r"bytes follow after the last storage")
def a_legacy_file_with_something_after_it(folder):
    path = FORMATS["torch legacy"](state(), folder / "a.pt")
    return written(folder, path.read_bytes() + b"PK")


@hostile(0, r"TorchScript")
def torch_script(folder):
    torch.jit.save(torch.jit.script(torch.nn.BatchNorm2d(4)), folder / "a.pt")
    return folder / "a.pt"


@hostile(2, r"none of torch\.save")
def another_zip_file(folder):
    return zip_file(folder / "a.docx", [("word/document.xml", b"<w/>")])


@hostile(2, r"compressed with gzip")
def a_compressed_file(folder):
    return written(folder, b"\x1f\x8b" + zlib.compress(b"x"))


@hostile(2, r"tar archive")
def a_tar_archive(folder):
    return written(folder, b"storages".ljust(257, b"\0") + b"ustar\x0000" + bytes(400))


@hostile(2, r"no tensors by name")
def a_plain_pickle(folder):
    return written(folder, pickle.dumps({"a": 1}))


@hostile(2, r"no tensors by name")
def a_checkpoint_without_tensors(folder):
    return FORMATS["torch zip"]({"epoch": 3}, folder / "a.pt")


# Names.

EVIL = "layer[/foo][bold]\x1b[31m\x1b]0;title\x07\u202egpj\r\n\u2066.bn"


@hostile(0, r"layer\[/foo\]")
def a_name_that_is_markup_and_escape_sequences(folder):
    torch.save(
        {f"{EVIL}.{k}": v for k, v in torch.nn.BatchNorm2d(4).state_dict().items()}, folder / "a.pt"
    )
    return folder / "a.pt"


@hostile(0, r"ud800")
def a_name_that_is_no_unicode(folder):
    pairs = [(f"\ud800{key}", value) for key, value in p.batch_norm()]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"would call `posix\.\\x1b")
def a_name_with_an_escape_sequence(folder):
    body = b"\x8c\x05posix\x8c\x05\x1b[31m\x93)R"
    return torch_zip(folder / "a.pt", b"\x80\x04" + body + b".")


# Amplifiers: a few bytes that ask for much, again and again.


def pieces_of(text, count):
    return b"".join([text] * count)


@hostile(2, r"Refused: [\d,]+ copied entries")
def an_ordered_dict_copied_again_and_again(folder):
    pair = p.text("a") + b"N\x86q\1"
    items = b"]q\0(" + pair + pieces_of(b"h\1", 100_000) + b"e"
    calls = p.name("collections", "OrderedDict") + b"q\2" + pieces_of(b"h\2h\0\x85R", 100_000)
    return torch_zip(folder / "a.pt", p.whole(b"(" + items + calls + b"t"))


@hostile(2, r"Refused: [\d,]+ characters of a name")
def long_names_put_together_again_and_again(folder):
    body = p.text("m" * 5_000_000) + b"q\0" + p.text("n" * 5_000_000) + b"q\1"
    body += pieces_of(b"h\0h\1\x93", 500_000)
    return torch_zip(folder / "a.pt", p.whole(body))


@hostile(2, r"no tensors by name")
def two_hundred_thousand_names(folder):
    body = b"".join(p.name(f"a{i}", "b") for i in range(200_000))
    return torch_zip(folder / "a.pt", p.whole(body))


@hostile(2, r"Refused: [\d,]+ dicts of tensors")
def a_tensor_in_thirty_thousand_dicts(folder):
    body = p.tensor(p.storage("0", 4), [4], [1]) + b"q\0" + p.text("k" * 900) + b"q\1"
    body += b"(" + pieces_of(b"}h\1h\0s", 30_000) + b"t"
    return torch_zip(folder / "a.pt", p.whole(b"(" + body + b"t"), [("0", FOUR)])


@hostile(2, r"Refused: [\d,]+ channels up to")
def thirty_thousand_layers_on_the_same_megabyte(folder):
    one = p.tensor(p.storage("0", 2**18), [2**18], [1])
    pairs = b"".join(
        p.text(f"{i}.{part}") + b"h\0"
        for i in range(30_000)
        for part in ("running_mean", "running_var")
    )
    body = b"(" + one + b"q\0}(" + pairs + b"ut"
    return torch_zip(folder / "a.pt", p.whole(body), [("0", bytes(2**20))])


@hostile(2, r"strewn over")
def statistics_strewn_over_megabytes(folder):
    pairs = [
        (part, p.tensor(p.storage("0", 2**20), [2], [2**20 - 1]))
        for part in ("bn.running_mean", "bn.running_var")
    ]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", bytes(2**22))])


@hostile(2, r"a byte order that does not exist")
def a_byte_order_of_a_gigabyte(folder):
    path = folder / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", p.whole(p.mapping(p.batch_norm())))
        archive.writestr("a/data/0", FOUR)
        with archive.open("a/byteorder", "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(2**20))
    return path


# Calls that torch knows, with arguments that it does not.


@hostile(2, r"is called with arguments that it does not take")
def a_tensor_out_of_a_tensor(folder):
    inner = p.tensor(p.storage("0", 4), [4], [1])
    pairs = [("bn.running_mean", p.tensor(inner, [4], [1]))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"is called with arguments that it does not take")
def a_meta_tensor_of_no_dtype(folder):
    body = p.name("torch._utils", "_rebuild_meta_tensor_no_storage") + b"("
    body += p.name("torch", "per_tensor_affine") + b"))\x89tR"
    return torch_zip(folder / "a.pt", p.whole(body))


@hostile(2, r"do not make sense")
def a_size_of_ten_thousand_digits(folder):
    size = p.number(10**9_999)
    hooks = p.name("collections", "OrderedDict") + b")R"
    body = p.name("torch._utils", "_rebuild_tensor_v2") + b"(" + p.storage("0", 4)
    body += b"K\0(" + size + b"t(K\1t\x89" + hooks + b"tR"
    return torch_zip(folder / "a.pt", p.whole(p.mapping([("x", body)])), [("0", FOUR)])


@hostile(2, r"a storage without kind, key or size")
def a_storage_of_ten_thousand_digits(folder):
    where = b"(" + p.text("storage") + p.name("torch", "FloatStorage") + p.text("0")
    where += p.text("cpu") + p.number(10**9_999) + b"tQ"
    pairs = [("x", p.tensor(where, [4], [1]))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)])


@hostile(2, r"is called with arguments that it does not take")
def a_tensor_type_inside_a_tensor_type_without_end(folder):
    builder = p.name("torch._tensor", "_rebuild_from_type_v2")
    # Each is the arguments of the one around it: (builder, Tensor, those inside, None).
    inside = b")" + pieces_of(b"q\2(h\0h\1h\2Nt", 50_000) + b"q\2"
    body = builder + b"q\0" + p.name("torch", "Tensor") + b"q\1" + inside + b"h\0h\2R"
    return torch_zip(folder / "a.pt", p.whole(b"(" + body + b"t"))


@hostile(2, r"Damaged")
def a_pickle_that_takes_more_than_it_put(folder):
    return torch_zip(folder / "a.pt", b"\x80\x02(\x86.")


@hostile(2, r"Damaged")
def a_pickle_that_builds_on_nothing(folder):
    return torch_zip(folder / "a.pt", b"\x80\x02b.")


@hostile(2, r"Refused: it refers to")
def a_shard_under_many_names(folder):
    return index(
        folder, lambda places: places.update({"1.running_var": f"./{places['1.running_var']}"})
    )


@hostile(2, r"same file as another shard")
def a_shard_behind_a_link(folder):
    path = index(folder, lambda places: places.update({"1.running_var": "link.safetensors"}))
    (path.parent / "link.safetensors").symlink_to(next(path.parent.glob("*-00001-*")))
    return path


@hostile(1, r'"stats-nonfinite"')
def signalling_nans(folder):
    data = struct.pack("<4I", 0x7F800001, 0xFF800001, 0x7F800001, 0)
    return torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm())), [("0", data)])


@hostile(2, r"Not the name of a file|Refused: it refers to")
def a_shard_whose_name_is_no_name(folder):
    return index(folder, lambda places: places.update({"1.running_var": "a\0b"}))


def shared_metadata(folder, change):
    """Metadata in which the parts of one tensor are changed, and shared by many names."""

    def spread(content):
        name, tensor = next(iter(content.state_dict_metadata.items()))
        change(tensor)
        content.state_dict_metadata |= {f"{name}{i}": tensor for i in range(50_000)}

    return metadata(folder, spread)


@hostile(2, r"Refused: [\d,]+ fields of an object")
def an_object_of_many_fields_under_many_names(folder):
    return shared_metadata(
        folder, lambda tensor: vars(tensor).update({f"x{i}": 1 for i in range(50_000)})
    )


@hostile(2, r"Refused: [\d,]+ dimensions of a tensor")
def a_distributed_tensor_of_many_dimensions(folder):
    return shared_metadata(folder, lambda tensor: setattr(tensor, "size", (1,) * 50_000))


@hostile(2, r"Refused: [\d,]+ pieces of tensors|does not fit|do not make it up|is missing")
def a_distributed_tensor_of_the_same_piece_many_times(folder):
    def change(content):
        name = "model.1.running_mean"
        tensor = content.state_dict_metadata[name]
        tensor.size = tensor.chunks[0].sizes = torch.Size([0])
        tensor.chunks = tensor.chunks * 200_001

    return metadata(folder, change)


@hostile(2, r"the place of .* is none")
def a_place_that_is_no_name(folder):
    def change(content):
        deep = ()
        for _ in range(90):
            deep = (deep,)
        content.planner_data = dict.fromkeys(content.planner_data, (deep, 10**5000))

    return metadata(folder, change)


@hostile(2, r"Cannot be opened: File name too long")
def a_name_longer_than_any(folder):
    return index(folder, lambda places: places.update({"1.running_var": "x" * 5_000}))


# Values that torch would take from elsewhere than from the storage that a tensor names first.


def with_variance(folder, variance):
    """A batch norm whose variance is made in a way of its own; storage 1 has other values."""
    pairs = [("bn.running_mean", four()), ("bn.running_var", variance)]
    records = [("0", FOUR), ("1", struct.pack("<4f", -1, -2, -3, -4))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), records)


def four(key="0", metadata=b""):
    return p.tensor(p.storage(key, 4), [4], [1], metadata=metadata)


def with_attribute(name, value):
    state = p.mapping([(name, value)])
    builder = p.name("torch._utils", "_rebuild_parameter_with_state")
    return builder + b"(" + four() + b"\x89" + p.name("collections", "OrderedDict") + b")R" + state


ELSEWHERE = b"(" + p.storage("1", 4) + p.number(0) + p.numbers([4]) + p.numbers([1]) + b"t"


@hostile(2, r"changes something after it was made")
def a_tensor_put_on_another_storage_afterwards(folder):
    return with_variance(folder, four() + ELSEWHERE + b"b")


@hostile(2, r"is called with arguments that it does not take")
def a_parameter_whose_attribute_is_its_data(folder):
    return with_variance(folder, with_attribute("data", four("1")) + b"tR")


@hostile(2, r"is called with arguments that it does not take")
def a_parameter_whose_attribute_is_its_real_part(folder):
    return with_variance(folder, with_attribute("real", p.number(5)) + b"tR")


def of_a_type(function, arguments, state):
    builder = p.name("torch._tensor", "_rebuild_from_type_v2")
    return builder + b"(" + function + p.name("torch", "Tensor") + arguments + state + b"tR"


@hostile(2, r"is called with arguments that it does not take")
def a_slot_of_a_tensor_that_is_its_data(folder):
    function = p.name("torch._utils", "_rebuild_tensor_v2")
    arguments = b"(" + p.storage("0", 4) + p.number(0) + p.numbers([4]) + p.numbers([1]) + b"\x89Nt"
    state = b"N" + p.mapping([("data", four("1"))]) + b"\x86"
    return with_variance(folder, of_a_type(function, arguments, state))


@hostile(0, r"stats-unread")
def a_sign_turned_by_a_flag_in_a_counter(folder):
    flags = p.name("collections", "Counter") + b"}" + p.text("neg") + b"\x88s\x85R"
    return with_variance(folder, four(metadata=flags))


@hostile(2, r"Ambiguous: a storage is said to hold float32 here and int32 there")
def a_storage_of_two_dtypes(folder):
    return with_variance(folder, p.tensor(p.storage("0", 4, "IntStorage"), [4], [1]))


@hostile(2, r"is called with arguments that it does not take")
def a_tensor_made_by_its_constructor(folder):
    return with_variance(folder, p.name("torch", "Tensor") + p.numbers([7, 8]) + b"\x85R")


@hostile(2, r"is called with arguments that it does not take")
def a_size_that_grows_after_it_was_made(folder):
    size = p.name("torch", "Size") + b"]q\0" + p.number(4) + b"a\x85R"
    variance = b"(" + size + b"h\0" + p.number(4) + b"at"
    return with_variance(folder, variance)


@hostile(1, r'"key": "state_dict"')
def a_state_dict_that_is_a_counter(folder):
    """Its variances are negative; a harmless state_dict stands beside it."""
    pairs = [(f"bn.running_{part}", four("1")) for part in ("mean", "var")]
    counter = p.name("collections", "Counter") + p.mapping(pairs) + b"\x85R"
    body = p.mapping([("model", p.mapping(p.batch_norm())), ("state_dict", counter)])
    records = [("0", FOUR), ("1", struct.pack("<4f", -1, -2, -3, -4))]
    return torch_zip(folder / "a.pt", p.whole(body), records)


@hostile(2, r"a tensor's storage 'data/├ç' is missing|no text")
def a_storage_whose_name_is_another_in_another_encoding(folder):
    """The bytes of one name, read as code page 437, are the other name."""
    key = "\xc7".encode().decode("cp437")
    path = torch_zip(folder / "a.pt", p.whole(p.mapping(p.batch_norm(key=key))), [("XX", FOUR)])
    path.write_bytes(path.read_bytes().replace(b"data/XX", b"data/\xc3\x87"))
    return path


@hostile(2, r"changes something after it was made")
def a_state_that_changes_after_it_was_set(folder):
    path = save_distributed(state(), folder / "dcp")
    information = p.name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    fields = b"}q\0" + p.text("relative_path") + p.text("a") + b"s"
    body = information + b")\x81" + fields + b"b" + b"h\0" + p.text("offset") + p.number(1) + b"s"
    (path / ".metadata").write_bytes(p.whole(body))
    return path


# Objects that are described and not made.


def beside_a_batch_norm(folder, body, **options):
    """A file with a batch norm, and something else under the key 'x'."""
    pairs = [("state_dict", p.mapping(p.batch_norm())), ("x", body)]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), [("0", FOUR)], **options)


MODULE_PARTS = [(part, b"}") for part in ("_parameters", "_buffers", "_modules")]


@hostile(1, r"runs-code[^}]*subprocess\.Popen")
def a_command_that_looks_like_a_module(folder):
    body = p.name("subprocess", "Popen") + b")R" + p.mapping(MODULE_PARTS) + b"b"
    return beside_a_batch_norm(folder, body)


@hostile(1, r"runs-code[^}]*posix\.system")
def a_dict_whose_missing_values_are_made_by_a_command(folder):
    body = p.name("collections", "defaultdict") + p.name("posix", "system") + b"\x85R"
    return beside_a_batch_norm(folder, body)


@hostile(1, r"runs-code[^}]*posix\.system")
def a_random_generator_made_by_a_command(folder):
    body = p.name("numpy.random._pickle", "__generator_ctor")
    body += b"(" + p.text("true") + p.name("posix", "system") + b"tR"
    return beside_a_batch_norm(folder, body)


@hostile(1, r"runs-code[^}]*bnfreeze\.policies\.class_swap\._rebuild")
def a_frozen_layer_made_by_a_command(folder):
    body = p.name("bnfreeze.policies.class_swap", "_rebuild") + b"("
    body += p.name("torch.nn.modules.batchnorm", "BatchNorm2d")
    body += p.name("bnfreeze.policies.eval", "ForceEval") + p.name("posix", "system")
    return beside_a_batch_norm(folder, body + b"(" + p.text("true") + b"ttR")


@hostile(1, r"runs-code[^}]*builtins\.getattr\(")
def a_call_of_what_a_call_gave(folder):
    made = p.name("types", "SimpleNamespace") + b")R"
    function = p.name("builtins", "getattr") + b"(" + made + p.text("f") + b"tR"
    return beside_a_batch_norm(folder, function + b")R")


@hostile(1, r"runs-code[^}]*os\.environ\.__setitem__")
def an_environment_that_is_changed_without_a_call(folder):
    return beside_a_batch_norm(folder, p.name("os", "environ") + p.text("a") + p.text("b") + b"s")


@hostile(1, r"runs-code[^}]*sys\.path\.append")
def a_path_that_grows_without_a_call(folder):
    return beside_a_batch_norm(folder, p.name("sys", "path") + p.text("/tmp") + b"a")


@hostile(1, r"runs-code[^}]*torch\.Tensor\.__setstate__")
def a_class_that_gets_another_method(folder):
    state = b"N" + p.mapping([("__add__", p.name("posix", "system"))]) + b"\x86"
    return beside_a_batch_norm(folder, p.name("torch", "Tensor") + state + b"b")


@hostile(1, r"runs-code[^}]*posix\.system")
def a_command_in_a_file_that_looks_like_torchscript(folder):
    pairs = [*p.batch_norm(), ("x", p.calls("posix", "system", "true"))]
    entries = [("a/data.pkl", p.whole(p.mapping(pairs))), ("a/data/0", FOUR)]
    return zip_file(folder / "a.pt", [*entries, ("a/constants.pkl", p.whole(b")"))])


@hostile(0, r'"name": "bn"')
def a_state_that_fifty_thousand_objects_share(folder):
    items = b"".join(p.text(f"k{i}") + b"N" for i in range(50_000))
    body = b"(" + p.name("argparse", "Namespace") + b"q\0}(" + items + b"uq\x010"
    return beside_a_batch_norm(folder, body + pieces_of(b"h\0)\x81h\1b", 50_000) + b"t")


@hostile(2, r"Refused: [\d,]+ copied entries")
def arguments_that_fifty_thousand_calls_share(folder):
    body = b"(" + p.name("argparse", "Namespace") + b"q\0(" + b"N" * 50_000 + b"tq\x010"
    return beside_a_batch_norm(folder, body + pieces_of(b"h\0h\1R", 50_000) + b"t")


@hostile(0, r'"name": "bn"')
def arguments_of_an_unknown_class_that_fifty_thousand_calls_share(folder):
    body = b"(" + p.name("config", "Config") + b"q\0(" + b"N" * 50_000 + b"tq\x010"
    return beside_a_batch_norm(folder, body + pieces_of(b"h\0h\1R", 50_000) + b"t")


@hostile(2, r"Refused: [\d,]+ (modules|entries of modules)")
def a_module_inside_itself_two_to_the_twentieth_times(folder):
    module = p.name("torch.nn", "Module") + b")\x81"
    parts = b"}" + p.text("_parameters") + b"}s" + p.text("_buffers") + b"}s" + p.text("_modules")
    body = module + parts + b"}sbq\0"
    for _ in range(22):
        body = body + b"0" + module + parts
        body += b"}(" + p.text("a") + b"h\0" + p.text("b") + b"h\0usbq\0"
    return beside_a_batch_norm(folder, body)


@hostile(2, r"Refused: [\d,]+ (modules|entries of modules|levels of modules|levels of nesting)")
def a_module_that_is_its_own_child(folder):
    body = p.name("torch.nn", "Module") + b")\x81q\0}" + p.text("_parameters") + b"}s"
    body += p.text("_buffers") + b"}s" + p.text("_modules") + b"}" + p.text("a") + b"h\0ssb"
    return beside_a_batch_norm(folder, body)


@hostile(2, r"no tensors by name")
def a_storage_in_a_pickle_that_is_loaded_again_and_again(folder):
    stream = io.BytesIO()
    storage = torch.ones(4).untyped_storage()
    torch.save(storage, stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue()
    body = b"(" + p.name("torch.storage", "_load_from_bytes") + b"q\0"
    body += b"B" + struct.pack("<I", len(data)) + data + b"\x85q\1"
    return written(folder, b"\x80\x03" + body + pieces_of(b"h\0h\1R", 100_000) + b"t.", "a.pkl")


def numpy_dtype(text):
    return p.name("numpy", "dtype") + b"(" + p.text(text) + b"\x89\x88tR"


def numpy_array(dtype, shape, data, order=b"\x89"):
    """An array in the way in which NumPy itself writes it; `dtype` and `data` are pickled."""
    made = p.name("numpy._core.multiarray", "_reconstruct") + b"("
    made += p.name("numpy", "ndarray") + b"(K\0tC\x01btR"
    return made + b"(K\1" + p.numbers(shape) + dtype + order + data + b"tb"


@hostile(2, r"1 elements of float64 is said to lie in 1,048,576 bytes")
def a_number_of_a_megabyte(folder):
    body = p.name("numpy._core.multiarray", "scalar") + b"(" + numpy_dtype("f8")
    body += b"B" + struct.pack("<I", 2**20) + bytes(2**20) + b"tR"
    return beside_a_batch_norm(folder, body)


@hostile(2, r"changes something after it was made")
def a_dtype_that_changes_after_an_array_was_made_of_it(folder):
    array = numpy_array(numpy_dtype("f4") + b"q\0", [1], b"C\x04" + bytes(4))
    order = b"(K\3" + p.text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
    return beside_a_batch_norm(folder, b"(" + array + b"h\0" + order + b"bt")


@hostile(2, r"said to lie in")
def an_array_of_a_claimed_size(folder):
    array = numpy_array(numpy_dtype("f4"), [2**40], b"C\x04" + bytes(4))
    return beside_a_batch_norm(folder, array)


@hostile(2, r"bytes follow after its pickle")
def a_second_pickle_after_the_first(folder):
    first = pickle.dumps({"bn.running_mean": 1})
    return written(folder, first + pickle.dumps(payload(folder)), "a.pkl")


@hostile(2, r"numpy\.savez_compressed")
def an_archive_of_arrays_that_inflate(folder):
    np.savez_compressed(folder / "a.npz", **{"bn.running_mean": np.zeros(2**24)})
    return folder / "a.npz"


@hostile(2, r"a header that is none|not numbers|no tensors by name|do not make sense|said to lie")
def an_array_whose_header_is_code(folder):
    header = b"{'descr': __import__('os').system('true'), 'shape': (4,)}\n"
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(16)
    return zip_file(folder / "a.npz", [("bn.running_mean.npy", data)])


# What was read otherwise than it is loaded, or not at all.


def negative_array(dtype, order=b"\x89"):
    """Four variances, of which the last is negative."""
    data = np.array([1, 1, 1, -1], dtype).tobytes()
    return numpy_array(numpy_dtype(dtype), [2, 2], b"C" + bytes([len(data)]) + data, order)


def pickled_variance(folder, body):
    """A plain pickle of a batch norm whose variance is made in a way of its own."""
    mean = negative_array("f4")
    return written(
        folder,
        p.whole(p.mapping([("bn.running_mean", mean), ("bn.running_var", body)])),
        "a.pkl",
    )


@hostile(2, r"Ambiguous: .*OrderedDict of something and leaves it empty")
def a_dict_that_loses_what_it_is_made_of(folder):
    body = p.name("collections", "OrderedDict") + p.mapping(p.batch_norm()) + b"\x85\x81"
    return beside_a_batch_norm(folder, body)


@hostile(0, r"stats-un(read|paired)")
def an_array_of_an_unusual_name_of_a_dtype(folder):
    return pickled_variance(folder, negative_array("float32"))


@hostile(0, r"numpy\.ndarray")
def an_array_made_by_its_class(folder):
    array = p.name("numpy", "ndarray") + b"((K\4t" + numpy_dtype("f4") + b"C\x10" + FOUR + b"tR"
    return beside_a_batch_norm(folder, array)


def of_nan(key="1"):
    return p.mapping(p.batch_norm(key=key))


def beside_nan(folder, body):
    """A good batch norm, and another whose statistics are not numbers."""
    pairs = [("state_dict", p.mapping(p.batch_norm())), ("x", body)]
    records = [("0", FOUR), ("1", struct.pack("<4f", *[float("nan")] * 4))]
    return torch_zip(folder / "a.pt", p.whole(p.mapping(pairs)), records)


@hostile(1, r'"stats-nonfinite"')
def a_model_under_a_key_that_is_a_tuple(folder):
    return beside_nan(folder, b"})" + of_nan() + b"s")


@hostile(1, r'"stats-nonfinite"')
def a_model_under_a_number_of_ten_thousand_digits(folder):
    return beside_nan(folder, b"}" + p.number(10**9_999) + of_nan() + b"s")


@hostile(1, r'"stats-nonfinite"')
def a_model_in_an_array_of_objects(folder):
    return beside_nan(folder, numpy_array(numpy_dtype("O8"), [1], b"](" + of_nan() + b"e"))


@hostile(1, r'"stats-nonfinite"')
def a_model_in_a_module_that_is_a_dict_as_well(folder):
    body = p.name("config", "Net") + b")\x81" + p.text("a") + of_nan() + b"s"
    return beside_nan(folder, body + p.mapping(MODULE_PARTS) + b"b")


@hostile(1, r'"stats-nonfinite"')
def statistics_in_a_module_that_is_a_dict_as_well(folder):
    items = b"(" + of_nan()[2:]
    body = p.name("config", "Net") + b")\x81" + items
    return beside_nan(folder, body + p.mapping(MODULE_PARTS) + b"b")


@hostile(0, r'"name": "bn"')
def fifteen_thousand_models_whose_keys_look_alike(folder):
    one = p.tensor(p.storage("0", 4), [1], [1]) + b"q\0" + p.text("w") + b"q\1"
    pairs = b"".join(b"K\0M" + struct.pack("<H", i) + b"\x86}h\1h\0s" for i in range(15_000))
    return beside_a_batch_norm(folder, b"(" + one + b"}(" + pairs + b"ut")


@hostile(2, r"levels of nesting")
def a_frozen_layer_made_by_another_without_end(folder):
    one, other = (
        p.name("bnfreeze.policies.a", "_rebuild"),
        p.name("bnfreeze.policies.b", "_rebuild"),
    )
    body = b"(" + one + b"q\1" + other + b"q\2" + p.name("torch.nn", "BatchNorm2d") + b"q\3"
    body += b"(h\3tq\4"
    for number in range(3_000):
        body += b"0(h\3h\1h" + bytes([1 + number % 2]) + b"h\4tq\4"
    return beside_a_batch_norm(folder, body + b"h\1h\4Rt")


@hostile(1, r'"name": "bn"')
def a_module_whose_many_buffers_are_all_looked_for_in_a_long_list(folder):
    names = b"".join(p.text(f"b{i}") + b"N" for i in range(60_000))
    unsaved = b"".join(p.text(f"c{i}") for i in range(60_000))
    parts = p.mapping([*MODULE_PARTS[::2], ("_buffers", b"}(" + names + b"u")])
    parts += p.text("_non_persistent_buffers_set") + b"](" + unsaved + b"es"
    return beside_a_batch_norm(folder, p.name("torch.nn", "Module") + b")\x81" + parts + b"b")


@hostile(1, r"runs-code[^}]*os\.abort")
def a_function_behind_a_module_of_layers(folder):
    body = b"\x8c\x17torch.nn.modules.module\x8c\x11warnings.os.abort\x93"
    return beside_a_batch_norm(folder, body + b")R" + p.mapping(MODULE_PARTS) + b"b")


@hostile(0, r'"eps": null')
def a_layer_whose_eps_is_no_number(folder):
    torch.save(torch.nn.BatchNorm2d(4, eps=float("nan")), folder / "a.pt")
    return folder / "a.pt"


@hostile(2, r"the sizes of a tensor do not make sense")
def a_weight_of_torch_export_whose_sizes_are_texts(folder):
    meta = {"dtype": 7, "sizes": [{"as_int": "x"}], "strides": []}
    weight = {"tensor_meta": meta, "path_name": "w", "use_pickle": True}
    config = json.dumps({"config": {"a": weight}}).encode()
    return zip_file(folder / "a.pt2", [("a/data/weights/m_weights_config.json", config)])


@hostile(1, r"runs-code[^}]*posix\.system")
def os_system_in_an_object_of_a_distributed_checkpoint(folder):
    """torch loads it without `weights_only`."""
    content = {**state(), "hyperparameters": payload(folder)}
    return save_distributed(content, folder / "dcp")


@hostile(2, r"is in two shards")
def a_tensor_in_two_shards(folder):
    path = index(folder, lambda places: None)
    places = json.loads(path.read_text())["weight_map"]
    first, second = sorted({*places.values()})[:2]
    (path.parent / second).write_bytes((path.parent / first).read_bytes())
    name = next(name for name, place in places.items() if place == first)
    left = {name: place for name, place in places.items() if place != second}
    path.write_text(json.dumps({"weight_map": left | {name: second}}))
    return path
