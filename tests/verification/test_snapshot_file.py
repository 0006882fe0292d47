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
from bnfreeze import CorruptCheckpointError, Snapshot, UnsupportedFormatError
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


def test_a_snapshot_comes_back_as_it_was(model, digest, tmp_path):
    before = bnfreeze.snapshot(model, tensors="all", digest=digest)
    before.save(tmp_path / "before")
    again = Snapshot.load(tmp_path / "before")
    assert again.names == before.names
    assert again.tensors == "all"
    assert again.digest is digest
    assert again.state.facts == before.state.facts
    assert again == before
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
    assert (drift.name, drift.kind) == (name, "value")
    assert drift.changed is None if digest else drift.changed == 1


def test_the_values_can_be_read_by_anything_that_reads_safetensors(model, tmp_path):
    bnfreeze.snapshot(model).save(tmp_path / "held.safetensors")
    values = load_file(tmp_path / "held.safetensors")
    assert torch.equal(values["norm.running_var"], model.norm.running_var)


def test_flags_and_classes_are_compared_after_loading(model, tmp_path):
    bnfreeze.snapshot(model).save(tmp_path / "before")
    bnfreeze.unfreeze(model)
    kinds = {
        drift.kind for drift in bnfreeze.verify(model, Snapshot.load(tmp_path / "before")).drifts
    }
    assert kinds == {"thawed", "requires-grad"}


def test_a_class_that_moved_to_another_module_is_the_same(model, tmp_path):
    bnfreeze.snapshot(model, tensors="all").save(tmp_path / "before")
    Mixed.__module__ = "__main__"
    assert bnfreeze.verify(model, Snapshot.load(tmp_path / "before")).ok


def test_a_file_is_written_whole_or_not_at_all(model, digest, tmp_path, monkeypatch):
    path = tmp_path / "before"
    bnfreeze.snapshot(model, digest=digest).save(path)
    content = path.read_bytes()
    model.norm.running_mean += 1

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        bnfreeze.snapshot(model, digest=digest).save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"{}", b"[]", b'{"format": "x"}'])
def test_what_is_no_snapshot_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UnsupportedFormatError, match="not a snapshot"):
        Snapshot.load(tmp_path / "file")


def test_a_checkpoint_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "file")
    with pytest.raises(UnsupportedFormatError, match="lacks the facts"):
        Snapshot.load(tmp_path / "file")


def damaged(path, edit):
    """Rewrite the header of a saved snapshot."""
    raw = path.read_bytes()
    if raw.startswith(b"{"):
        header = json.loads(raw)
        edit(header)
        path.write_text(json.dumps(header))
        return
    (size,) = struct.unpack("<Q", raw[:8])
    outer = json.loads(raw[8 : 8 + size])
    header = json.loads(outer["__metadata__"]["bnfreeze"])
    edit(header)
    outer["__metadata__"]["bnfreeze"] = json.dumps(header)
    text = json.dumps(outer).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def first(header):
    return header["facts"]["tensors"]["norm.weight"]


DAMAGE = {
    "a later schema": (lambda h: h.update(schema=2), UnsupportedFormatError, "schema 2"),
    "no facts": (lambda h: h.pop("facts"), CorruptCheckpointError, "incomplete"),
    "facts of another kind": (lambda h: h.update(facts=[]), CorruptCheckpointError, "incomplete"),
    "a field missing": (lambda h: first(h).pop("kind"), CorruptCheckpointError, "incomplete"),
    "a field too many": (lambda h: first(h).update(evil=1), CorruptCheckpointError, "incomplete"),
    "a dtype that is no text": (
        lambda h: first(h).update(dtype=3),
        CorruptCheckpointError,
        "not text",
    ),
    "an endless shape": (
        lambda h: first(h).update(shape=[float("inf")]),
        CorruptCheckpointError,
        "incomplete",
    ),
    "no tensors": (lambda h: h["facts"].update(tensors={}), CorruptCheckpointError, "fit together"),
    "no owner": (lambda h: h["facts"].update(owners={}), CorruptCheckpointError, "fit together"),
    "an unknown alias": (
        lambda h: first(h).update(first="x"),
        CorruptCheckpointError,
        "fit together",
    ),
    "an unknown group": (
        lambda h: h["facts"].update(groups=[["x", "y"]]),
        CorruptCheckpointError,
        "fit together",
    ),
    "a tensor not noted": (
        lambda h: h["facts"]["tensors"].pop("norm.running_var"),
        CorruptCheckpointError,
        "which is not noted",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_snapshot_is_refused_with_the_reason(damage, digest, tmp_path):
    edit, error, reason = DAMAGE[damage]
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    bnfreeze.freeze(model)
    bnfreeze.snapshot(model, digest=digest).save(tmp_path / "file")
    damaged(tmp_path / "file", edit)
    with pytest.raises(error, match=reason):
        Snapshot.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda h: first(h).update(shape=[4]), "noted with the shape"),
        (lambda h: first(h).update(dtype="float64"), "noted as float64"),
        (lambda h: first(h).update(dtype="uint16"), "noted as uint16"),
        (
            lambda h: h["facts"]["tensors"].update(
                {"norm.more": {**first(h), "first": "norm.more"}}
            ),
            "values are missing",
        ),
    ],
)
def test_values_that_contradict_the_facts_are_refused(edit, reason, tmp_path):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    bnfreeze.freeze(model)
    bnfreeze.snapshot(model).save(tmp_path / "file")
    damaged(tmp_path / "file", edit)
    with pytest.raises(CorruptCheckpointError, match=reason):
        Snapshot.load(tmp_path / "file")


def test_an_unknown_dtype_is_refused(tmp_path):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    bnfreeze.freeze(model)
    bnfreeze.snapshot(model).save(tmp_path / "file")
    damaged(tmp_path / "file", lambda h: first(h).update(dtype="nn"))
    with pytest.raises(UnsupportedFormatError, match="dtype 'nn', which bnfreeze does not know"):
        Snapshot.load(tmp_path / "file")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedFormatError, match="not a regular file"):
        Snapshot.load(tmp_path / "pipe")


def test_a_list_of_digests_of_any_size_is_not_read(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.write(b"{")
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CorruptCheckpointError, match="larger than any list"):
        Snapshot.load(tmp_path / "file")


def test_values_of_another_shape_than_is_noted_of_a_shard_are_not_compared(tmp_path):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    bnfreeze.freeze(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    bnfreeze.snapshot(model).save(tmp_path / "file")
    # What is noted of a shard is the shape of the whole.
    damaged(tmp_path / "file", lambda h: first(h).update(placement="Shard(dim=0) over (2,)"))
    values = load_file(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as opened:
        metadata = opened.metadata()
    values["norm.weight"] = torch.ones(1_000_000)
    save_file(values, tmp_path / "file", metadata)
    before = Snapshot.load(tmp_path / "file")
    assert [d.kind for d in compare(before.state, before.state).drifts] == ["unverified"]
    small = bnfreeze.snapshot(model).state
    facts = replace(small.facts, tensors=before.state.facts.tensors)
    (drift,) = compare(before.state, replace(small, facts=facts), gathered=True).drifts
    assert (drift.name, drift.kind) == ("norm.weight", "unverified")
    assert "(1000000,) → (3,)" in drift.after


def test_a_file_cut_short_is_refused_wherever_it_was_cut(digest, tmp_path):
    model = nn.BatchNorm1d(2)
    bnfreeze.freeze(model)
    path = tmp_path / "file"
    bnfreeze.snapshot(model, digest=digest).save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises((CorruptCheckpointError, UnsupportedFormatError)):
            Snapshot.load(path)


@pytest.mark.parametrize("digests", [None, [], {"norm.weight": 3}, {"norm.weight": "short"}])
def test_digests_that_are_none_are_refused(digests, tmp_path):
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(3)})
    bnfreeze.freeze(model)
    bnfreeze.snapshot(model, digest=True).save(tmp_path / "file")
    damaged(tmp_path / "file", lambda h: h.update(sha256=digests))
    with pytest.raises(CorruptCheckpointError, match="no list of SHA-256"):
        Snapshot.load(tmp_path / "file")
