"""A snapshot goes into a file and comes back, or the file is refused with the reason."""

import copy
import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bnfreeze
from bnfreeze import (
    CorruptCheckpointError,
    Snapshot,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from bnfreeze.verification.compare import compare


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.alias = self.norm
        self.register_buffer("spectrum", torch.randn(2, 3, dtype=torch.complex64))
        self.register_buffer("tiny", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("counts", torch.arange(3).to(torch.uint16))
        self.register_buffer("flag", torch.tensor(True), persistent=False)
        self.register_buffer("nothing", torch.empty(0, 2))
        self.register_buffer("payload", torch.tensor([0x7FC00001]).int().view(torch.float32))
        bnfreeze.freeze(self)


@pytest.fixture(params=[False, True], ids=["values", "digests"])
def digest(request):
    return request.param


@pytest.fixture
def model():
    return Mixed()


@pytest.fixture
def path(digest, tmp_path):
    """The snapshot of a small model."""
    return saved(tmp_path / "file", digest=digest)


def saved(path, **options):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    bnfreeze.freeze(model)
    bnfreeze.snapshot(model, **options).save(path)
    return path


def test_a_snapshot_comes_back_as_it_was(model, digest, tmp_path):
    before = bnfreeze.snapshot(model, tensors="all", digest=digest)
    before.save(tmp_path / "before")
    again = Snapshot.load(tmp_path / "before")
    assert (again.names, again.tensors, again.digest) == (before.names, "all", digest)
    for fact in ("tensors", "owners", "groups"):
        assert getattr(again.state, fact) == getattr(before.state, fact)
    assert again == before
    Mixed.__module__ = "__main__"  # in another process a class may come from another module
    for other in (model, copy.deepcopy(model)):
        report = bnfreeze.verify(other, again)
        assert report.ok
        assert any("read from a file" in note for note in report.notes)


@pytest.mark.parametrize(
    "name", ["norm.weight", "norm.num_batches_tracked", "spectrum", "tiny", "counts", "payload"]
)
def test_a_changed_bit_is_found_after_loading(model, digest, tmp_path, name):
    bnfreeze.snapshot(model, tensors="all", digest=digest).save(str(tmp_path / "before"))
    tensor = dict(model.named_parameters()).get(name, dict(model.named_buffers()).get(name))
    tensor.detach().reshape(-1).view(torch.uint8)[-1] ^= 1
    (drift,) = bnfreeze.verify(model, Snapshot.load(tmp_path / "before")).drifts
    assert (drift.name, drift.kind, drift.changed) == (name, "value", None if digest else 1)


def test_flags_and_classes_are_compared_after_loading(model, tmp_path):
    bnfreeze.snapshot(model).save(tmp_path / "before")
    values = load_file(tmp_path / "before")  # as anything that reads safetensors can
    assert torch.equal(values["norm.running_var"], model.norm.running_var)
    bnfreeze.unfreeze(model)
    drifts = bnfreeze.verify(model, Snapshot.load(tmp_path / "before")).drifts
    assert {drift.kind for drift in drifts} == {"thawed", "requires-grad"}


def test_a_file_is_written_whole_or_not_at_all(model, path, tmp_path, monkeypatch):
    content = path.read_bytes()

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        bnfreeze.snapshot(model).save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_snapshot_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "nowhere")
    for content in (b"", b"PK\x03\x04 a zip", b"{}", b"[]", b'{"format": "x"}'):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UnsupportedFormatError, match="not a snapshot"):
            Snapshot.load(tmp_path / "file")
    save_file({"a": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(UnsupportedFormatError, match="lacks the facts"):
        Snapshot.load(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedFormatError, match="not a regular file"):
        Snapshot.load(tmp_path / "pipe")


def damaged(path, edit):
    """Rewrite the header of a saved snapshot."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + size])
    header = json.loads(outer["__metadata__"]["bnfreeze"])
    edit(header)
    outer["__metadata__"]["bnfreeze"] = json.dumps(header)
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def first(header):
    return header["facts"]["tensors"]["norm.weight"]


def one_more(header):
    header["facts"]["tensors"]["norm.more"] = {**first(header), "first": "norm.more"}


# What is done to the facts, and a part of the reason. Each is refused in both forms.
DAMAGE = [
    (lambda h: h.pop("facts"), "incomplete"),
    (lambda h: h["facts"].pop("selection"), "incomplete"),
    (lambda h: h.update(facts=[]), "incomplete"),
    (lambda h: first(h).pop("kind"), "incomplete"),
    (lambda h: first(h).update(evil=1), "incomplete"),
    (lambda h: first(h).update(dtype=3), "3 in its facts is no dtype"),
    (lambda h: first(h).update(shape=[float("inf")]), "incomplete"),
    (lambda h: h["facts"].update(tensors={}), "fit together"),
    (lambda h: h["facts"].update(owners={}), "fit together"),
    (lambda h: first(h).update(first="x"), "fit together"),
    (lambda h: h["facts"].update(groups=[["x", "y"]]), "fit together"),
    (lambda h: h["facts"]["tensors"].pop("norm.running_var"), "norm.running_var is not noted"),
    (one_more, "values are missing"),
]
# Values that contradict the facts, and digests that are none.
CONTRADICTIONS = [
    (False, lambda h: first(h).update(shape=[4]), "noted as float32 of shape"),
    (False, lambda h: first(h).update(dtype="float64"), "noted as float64"),
    (False, lambda h: first(h).update(dtype="uint16"), "noted as uint16"),
    *(
        (True, lambda h, digests=digests: h.update(sha256=digests), "no list of SHA-256")
        for digests in (None, [], {"norm.weight": 3}, {"norm.weight": "short"})
    ),
]


@pytest.mark.parametrize(
    ("digest", "edit", "reason"),
    [*((digest, *damage) for damage in DAMAGE for digest in (False, True)), *CONTRADICTIONS],
)
def test_a_damaged_snapshot_is_refused_with_the_reason(digest, edit, reason, tmp_path):
    path = saved(tmp_path / "file", digest=digest)
    damaged(path, edit)
    with pytest.raises(CorruptCheckpointError, match=reason):
        Snapshot.load(path)


def test_a_later_schema_is_refused(tmp_path):
    damaged(saved(tmp_path / "later", digest=True), lambda h: h.update(schema=2))
    with pytest.raises(UnsupportedFormatError, match="schema 2"):
        Snapshot.load(tmp_path / "later")


def test_a_dtype_that_safetensors_lacks_is_refused_and_kept_as_a_digest(tmp_path):
    model = nn.Module()
    model.register_buffer("wide", torch.ones(2, dtype=torch.complex128))
    with pytest.raises(UnsupportedFormatError, match=r"wide has the dtype complex128.*digest=True"):
        bnfreeze.snapshot(model, tensors="all").save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    bnfreeze.snapshot(model, tensors="all", digest=True).save(tmp_path / "file")
    assert bnfreeze.verify(model, Snapshot.load(tmp_path / "file"))


def test_facts_of_any_size_are_not_read(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(struct.pack("<Q", 1 << 39) + b"{")
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(UnsafeCheckpointError, match="bytes of a safetensors header"):
        Snapshot.load(tmp_path / "file")


def test_metadata_that_is_no_text_is_refused(tmp_path):
    for metadata in (b"[]", b'{"bnfreeze": 3}'):
        text = b'{"__metadata__": ' + metadata + b"}"
        (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(UnsupportedFormatError, match="lacks the facts"):
            Snapshot.load(tmp_path / "file")


def test_values_of_another_shape_than_is_noted_of_a_shard_are_not_compared(tmp_path):
    path = saved(tmp_path / "file")
    now = Snapshot.load(path).state
    # What is noted of a shard is the shape of the whole.
    damaged(path, lambda h: first(h).update(placement="Shard(dim=0) over (2,)"))
    values = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    values["norm.weight"] = torch.ones(1_000_000)
    save_file(values, path, metadata)
    before = Snapshot.load(path).state
    assert [d.kind for d in compare(before, before).drifts] == ["unverified"]
    (drift,) = compare(before, replace(now, tensors=before.tensors), gathered=True).drifts
    assert (drift.name, drift.kind) == ("norm.weight", "unverified")
    assert "(1000000,) → (3,)" in drift.after


def test_a_file_cut_short_is_refused_wherever_it_was_cut(path):
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises((CorruptCheckpointError, UnsupportedFormatError)):
            Snapshot.load(path)
