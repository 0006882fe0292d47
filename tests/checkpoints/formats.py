"""Makers of honest checkpoints, in each format that is read."""

import json
import mmap
import pickle
import struct
import warnings
import zipfile
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn


def plain(state):
    """Without aliases and strides, which safetensors does not store."""
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def save_zip(state, path):
    torch.save(state, path)
    return path


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def save_safetensors(state, path):
    save_file(plain(state), path)
    return path


def save_shards(state, path, count=3):
    """A folder with an index and `count` shards, as Hugging Face writes them."""
    path.mkdir()
    names = list(state)
    places = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        mine = names[number::count]
        save_file(plain({name: state[name] for name in mine}), path / shard)
        places |= dict.fromkeys(mine, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: places[name] for name in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path / "model.safetensors.index.json"


def save_distributed(state, path):
    with warnings.catch_warnings():
        # That it is a single process is what is meant; and torch 2.10 warns of its own code.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        dcp.save({"model": dict(state)}, checkpoint_id=path, no_dist=True)
    return path


FORMATS = {
    "torch zip": save_zip,
    "torch legacy": save_legacy,
    "safetensors": save_safetensors,
    "shard index": save_shards,
    "distributed": save_distributed,
}


def module_of(state):
    """A module whose state_dict is `state`."""
    root = nn.Module()
    for name, value in state.items():
        holder = root
        *above, last = name.split(".")
        for part in above:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]
        holder.register_buffer(last, value)
    return root


class _Exported(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + 1


def arrays(state):
    """As NumPy has them, which knows no bfloat16."""
    return {
        name: (value.float() if value.dtype is torch.bfloat16 else value).numpy()
        for name, value in state.items()
    }


def save_whole(state, path):
    torch.save(module_of(state), path)
    return path


def save_torchscript(state, path):
    torch.jit.save(torch.jit.script(module_of(state)), path)
    return path


def save_export(state, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the export's own views
        program = torch.export.export(_Exported(module_of(state)), (torch.ones(1),))
        torch.export.save(program, path.with_suffix(".pt2"))
    return path.with_suffix(".pt2")


def save_pickle(state, path):
    path.write_bytes(pickle.dumps({"model": arrays(state)}))
    return path


def save_npz(state, path):
    np.savez(path.with_suffix(".npz"), **arrays(state))
    return path.with_suffix(".npz")


def save_onnx(state, path):
    import onnx

    names = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"])
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in arrays(state).items()]
    graph = onnx.helper.make_graph([node], "net", [], [], stored)
    onnx.save(onnx.helper.make_model(graph), path.with_suffix(".onnx"))
    return path.with_suffix(".onnx")


# Formats that say less than a state_dict in memory, or more, or that NumPy's dtypes limit.
FURTHER_FORMATS = {
    "whole model": save_whole,
    "TorchScript": save_torchscript,
    "torch.export": save_export,
    "pickle": save_pickle,
    "npz": save_npz,
}
if find_spec("onnx"):
    FURTHER_FORMATS["ONNX"] = save_onnx


def zip_file(path, entries, compression=zipfile.ZIP_STORED):
    """A zip file of (name, bytes) pairs, in the given order; a name may come twice."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Duplicate name")
                archive.writestr(name, data)
    return path


def torch_zip(path, pickle, records=(), **options):
    """A file as torch.save writes it, of a given pickle and storages."""
    entries = [("archive/data.pkl", pickle), ("archive/byteorder", b"little")]
    entries += [(f"archive/data/{key}", data) for key, data in records]
    return zip_file(path, [*entries, ("archive/version", b"3\n")], **options)


def safetensors_file(path, header, data=b""):
    """A safetensors file of a header, given as text or as an object, and of bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# Of a sparse checkpoint.
LAYERS = 500


def sparse_checkpoint(path, size):
    """500 norm layers among convolutions that make up `size` bytes, which are holes."""
    norms = {}
    state = {}
    for number in range(LAYERS):
        state[f"layer{number}.conv.weight"] = torch.empty(size // LAYERS // 4)
        norm = nn.BatchNorm2d(256)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked += 7
        norms |= {f"layer{number}.bn.{name}": value for name, value in norm.state_dict().items()}
        state |= {name: value for name, value in norms.items() if name not in state}
    with torch.serialization.skip_data():
        torch.save(state, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        saved = torch.load(path, mmap=True, weights_only=True)
    for name, value in norms.items():
        saved[name].copy_(value)
    return norms


# Prints the peak memory of the process, in KiB, on stderr. (What getrusage gives is the parent's,
# where that is larger.)
MEASURED = """
import sys
from bnfreeze.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""
