"""The files that ordinary users have: each is made by the library that people use for it.

Where that library is not installed with the tests' own dependencies, the test is skipped, or the
pickle is made with stand-ins of the same names, which the test says.
"""

import argparse
import collections
import datetime
import gzip
import io
import pathlib
import pickle
import re
import sys
import tarfile
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnfreeze
from bnfreeze import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from bnfreeze.checkpoints import open_checkpoint
from bnfreeze.cli import main
from tests.helpers import bits


def facts(path):
    """The models of a file by their keys, and the rest as plain data."""
    with open_checkpoint(path) as checkpoint:
        return types.SimpleNamespace(
            kind=checkpoint.kind,
            models={
                model.key: {
                    name: tensor.words().tobytes() for name, tensor in model.tensors.items()
                }
                for model in checkpoint.chosen().models
            },
            layers={model.key: dict(model.layers) for model in checkpoint.chosen().models},
            stripped={model.key: model.stripped for model in checkpoint.chosen().models},
            uninterpreted={(one.name, one.where) for one in checkpoint.uninterpreted},
            calls={(call.name, call.where): call.level for call in checkpoint.calls},
            remarks=checkpoint.remarks,
        )


def values(state):
    return {name: bits(value).numpy().tobytes() for name, value in state.items()}


class Config:
    """A class of a training script."""

    def __init__(self):
        self.width = 3


def stand_in(monkeypatch, name, base=object):
    """A class under the name of a library that is not installed."""
    module, _, attribute = name.rpartition(".")
    for end in [i for i, letter in enumerate(module) if letter == "."] + [len(module)]:
        package = module[:end]
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    made = type(attribute, (base,), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], attribute, made, raising=False)
    return made


# What stands beside the weights.


def test_what_training_scripts_write_beside_the_weights_is_read(model, tmp_path):
    torch.save(
        {
            "state_dict": model.state_dict(),
            "args": argparse.Namespace(lr=0.1, out=pathlib.Path("run")),
            "best": np.float64(0.75),
            "history": collections.defaultdict(list, {"loss": [1.0, 0.5]}),
            "counter": collections.Counter("abc"),
            "queue": collections.deque([1, 2]),
            "when": datetime.datetime(2025, 1, 1),
            "where": pathlib.Path("run"),
            "range": (range(3), slice(1, 2), 1j, b"x", bytearray(b"y"), {1}, frozenset({2})),
            "curve": np.arange(6.0).reshape(2, 3),
            "texts": np.array(["a", None], dtype=object),
            "dtype": (np.dtype("float32"), torch.float32, torch.Size([2]), torch.device("cpu")),
            "loss": nn.CrossEntropyLoss(),
        },
        tmp_path / "a.pt",
    )
    found = facts(tmp_path / "a.pt")
    assert found.models == {"state_dict": values(model.state_dict())}
    assert found.uninterpreted == {
        ("argparse.Namespace", "args"),
        (f"{type(pathlib.Path()).__module__}.{type(pathlib.Path()).__name__}", "where"),
    }
    assert found.calls == {("torch.nn.modules.loss.CrossEntropyLoss", "loss"): "note"}


def test_a_class_that_nobody_knows_is_named_and_cannot_be_judged(model, tmp_path):
    saved = {"state_dict": model.state_dict(), "hparams": {"config": Config(), "kind": Config}}
    torch.save(saved, tmp_path / "a.pt")
    found = facts(tmp_path / "a.pt")
    assert found.models == {"state_dict": values(model.state_dict())}
    name = f"{__name__}.Config"
    assert found.uninterpreted == {(name, "hparams.config")}
    assert found.calls == {(name, "hparams.config"): "warning"}


def test_a_lightning_checkpoint_with_objects_in_its_hyperparameters_is_read(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, args, root, loss, kind):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def training_step(self, batch, _):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Module(argparse.Namespace(lr=1), pathlib.Path("data"), nn.MSELoss(), nn.ReLU)
        trainer = lightning.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(2, 3, 8, 8)), batch_size=2))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = facts(tmp_path / "last.ckpt")
    assert found.models == {"state_dict": values(module.state_dict())}
    assert ("argparse.Namespace", "hyper_parameters.args") in found.uninterpreted
    assert "error" not in found.calls.values()


def test_what_timms_saver_writes_is_read(tmp_path):
    utils = pytest.importorskip("timm.utils")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    saver = utils.CheckpointSaver(
        net,
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        args=argparse.Namespace(model="x", lr=0.1),
        model_ema=utils.ModelEmaV3(net),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 1.0)
    found = facts(tmp_path / "last.pth.tar")
    assert set(found.models) == {"state_dict", "state_dict_ema"}
    assert found.uninterpreted == {("argparse.Namespace", "args")}
    assert not found.calls


def test_mmengines_history_is_read(model, tmp_path):
    logging = pytest.importorskip("mmengine.logging")
    history = logging.HistoryBuffer([1.0, 2.0], [1, 1])
    saved = {"state_dict": model.state_dict(), "message_hub": {"log_scalars": {"loss": history}}}
    torch.save(saved, tmp_path / "a.pth")
    found = facts(tmp_path / "a.pth")
    assert found.models == {"state_dict": values(model.state_dict())}
    name, where = "mmengine.logging.history_buffer.HistoryBuffer", "message_hub.log_scalars.loss"
    assert found.uninterpreted == {(name, where)}
    assert not found.calls


# Whole models.


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_model_is_read_with_its_kinds_and_settings(zipped, model, tmp_path):
    model.stem[1].momentum = None
    model.stem[1].eps = 1e-3
    model.head.eval()
    torch.save(model, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = facts(tmp_path / "a.pt")
    assert found.models == {"": values(model.state_dict())}
    layers = found.layers[""]
    assert set(layers) == {"stem.1", "backbone.0.1", "backbone.1.1", "head.2"}
    first, last = layers["stem.1"], layers["head.2"]
    kind = type(model.stem[1])
    assert first.class_name == f"{kind.__module__}.{kind.__name__}"
    assert (first.eps, first.momentum, first.training) == (1e-3, None, True)
    assert (last.momentum, last.training, last.frozen_by) == (0.1, False, "")
    assert set(found.calls.values()) == {"note"}


def test_both_halves_of_a_detectors_best_are_read(monkeypatch, tmp_path):
    """Ultralytics' own classes are stand-ins of the same names."""
    made = stand_in(monkeypatch, "ultralytics.nn.tasks.DetectionModel", nn.Module)
    conv = stand_in(monkeypatch, "ultralytics.nn.modules.conv.Conv", nn.Module)
    options = stand_in(monkeypatch, "ultralytics.utils.IterableSimpleNamespace")

    def detector():
        block = conv()
        block.conv, block.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)
        net = made()
        net.model = nn.Sequential(block)
        net.stride = torch.tensor([8.0])
        net.args = options()
        return net.half()

    saved = {"epoch": -1, "model": detector(), "ema": detector(), "updates": 3}
    saved |= {"optimizer": None, "train_args": {"imgsz": 640}, "date": "2025-01-01"}
    torch.save(saved, tmp_path / "best.pt")
    found = facts(tmp_path / "best.pt")
    assert found.models == {key: values(saved[key].state_dict()) for key in ("model", "ema")}
    assert found.layers["ema"]["model.0.bn"].eps == 1e-3
    assert set(found.calls.values()) == {"note"}
    assert ("ultralytics.nn.tasks.DetectionModel", "model") in found.calls


def test_a_model_that_was_saved_frozen_is_shown_as_frozen(model, tmp_path):
    with bnfreeze.freeze(model, "folded"):
        torch.save(model, tmp_path / "folded.pt")
    assert set(facts(tmp_path / "folded.pt").calls.values()) <= {"note", "warning"}
    bnfreeze.freeze(model, {"stem": "eval", "head": "fused", "backbone.0": "stats"})
    torch.save(model, tmp_path / "a.pt")
    found = facts(tmp_path / "a.pt")
    assert found.models == {"": values(model.state_dict())}
    assert {name: layer.frozen_by for name, layer in found.layers[""].items()} == {
        "stem.1": "bnfreeze",
        "backbone.0.1": "bnfreeze",
        "backbone.1.1": "",
        "head.2": "bnfreeze",
    }
    assert all("batchnorm" in layer.class_name.lower() for layer in found.layers[""].values())
    assert set(found.calls.values()) <= {"note", "warning"}


def test_models_inside_wrappers_and_objects_are_found(model, tmp_path):
    holder = Config()
    holder.learner = {"nets": [nn.DataParallel(model)]}
    hidden = nn.Sequential(nn.Linear(2, 2))
    hidden.__dict__["teacher"] = [nn.BatchNorm1d(3)]
    torch.save({"holder": holder, "student": hidden}, tmp_path / "a.pt")
    found = facts(tmp_path / "a.pt")
    assert found.models["holder.learner.nets.0"] == values(model.state_dict())
    assert "student.teacher.0" in found.models
    assert found.stripped["holder.learner.nets.0"] == ("module.",)


# Deployed models.


def trained():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, eps=1e-3)).train()
    with torch.no_grad():
        net(torch.randn(4, 3, 8, 8))
    net[2].weight.data.uniform_(1, 2)
    net[2].bias.data.uniform_(1, 2)
    return net.eval()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_is_read_and_its_code_is_not(how, tmp_path):
    net = trained()
    net = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.ones(1, 3, 8, 8))
    torch.jit.save(net, tmp_path / "a.pt")
    found = facts(tmp_path / "a.pt")
    assert found.kind == "TorchScript"
    assert found.models == {"": values(net.state_dict())}
    assert found.layers[""]["2"].class_name == "torch.nn.modules.batchnorm.BatchNorm2d"
    assert not found.calls
    assert not found.uninterpreted


def test_an_archive_of_torch_export_is_read(tmp_path):
    net = trained()
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 8, 8),)), tmp_path / "a.pt2")
    found = facts(tmp_path / "a.pt2")
    assert found.kind == "torch.export"
    assert "train mode" in found.remarks[0]
    assert found.models == {"": values(net.state_dict())}
    assert not found.calls


def test_an_archive_of_torch_export_from_before_torch_2_8_is_read(tmp_path):
    """Put together by hand, as torch 2.7 wrote it."""
    net, weights = trained(), io.BytesIO()
    torch.save(net.state_dict(), weights)
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", "{}", zipfile.ZIP_DEFLATED)
        archive.writestr("serialized_state_dict.pt", weights.getvalue())
    assert facts(tmp_path / "a.pt2").models == {"": values(net.state_dict())}


def onnx_model(net, path):
    pytest.importorskip("onnxscript")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.randn(2, 3, 8, 8),), path, dynamo=True, verbose=False)
    return path


def test_an_onnx_model_is_read(tmp_path):
    pytest.importorskip("onnx")
    net = trained()
    found = facts(onnx_model(net, tmp_path / "a.onnx"))
    assert found.kind == "ONNX"
    expected = values(net.state_dict())
    del expected["2.num_batches_tracked"]
    assert expected.items() <= found.models[""].items()
    layer = found.layers[""]["2"]
    assert (round(layer.eps, 6), layer.momentum, layer.training) == (1e-3, 0.1, False)
    folded = facts(onnx_model(net[:1], tmp_path / "b.onnx"))
    assert not folded.layers[""]
    assert "BatchNormalization" in folded.remarks[0]


def test_an_onnx_model_that_is_damaged_or_refers_elsewhere_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = onnx_model(trained(), tmp_path / "a.onnx")
    whole = path.read_bytes()
    (tmp_path / "b.onnx").write_bytes(whole[:-7])
    with pytest.raises(CorruptCheckpointError):
        facts(tmp_path / "b.onnx")
    loaded = onnx.load(path, load_external_data=False)
    tensor = next(one for one in loaded.graph.initializer if one.external_data)
    for key, value in {"location": "../../etc/passwd", "offset": "-1", "length": "x"}.items():
        changed = onnx.ModelProto.FromString(whole)
        (own,) = [one for one in changed.graph.initializer if one.name == tensor.name]
        next(entry for entry in own.external_data if entry.key == key).value = value
        (tmp_path / "c.onnx").write_bytes(changed.SerializeToString())
        with pytest.raises(CheckpointError, match=r"refers to|Damaged"):
            facts(tmp_path / "c.onnx")


def test_an_onnx_model_that_computes_its_statistics_says_so(tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("BatchNormalization", ["x", "a", "b", "c", "d"], ["y"])
    odd = onnx.helper.make_node("Identity", [], [])
    graph = onnx.helper.make_graph([node, odd], "g", [], [])
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, "f4"), "w"))
    model = onnx.helper.make_model(graph, producer_name="pytorch")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    found = facts(tmp_path / "a.onnx")
    assert not found.layers[""]
    assert found.remarks[0].startswith("1 of its BatchNormalization nodes")


@pytest.mark.parametrize("mode", [0, 1])
def test_an_onnx_model_that_was_exported_in_train_mode_says_so(mode, tmp_path):
    onnx = pytest.importorskip("onnx")
    names = [f"bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"], training_mode=mode)
    graph = onnx.helper.make_graph([node], "g", [], [])
    values = [onnx.numpy_helper.from_array(np.full(4, 0.5, "f4"), name) for name in names]
    graph.initializer.extend(values)
    model = onnx.helper.make_model(graph, producer_name="pytorch")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    codes = [f.code for f in bnfreeze.inspect(tmp_path / "a.onnx").findings]
    assert codes == ["layer-exported-training"] * mode


def test_a_script_that_was_saved_in_train_mode_says_so(tmp_path):
    net = trained()
    for training in (True, False):
        torch.jit.save(torch.jit.script(net.train(training)), tmp_path / "a.pt")
        codes = {f.code for f in bnfreeze.inspect(tmp_path / "a.pt").findings}
        assert ("layer-exported-training" in codes) is training
    torch.save(net.train(), tmp_path / "b.pt")  # eval() reaches this one
    assert "layer-exported-training" not in str(bnfreeze.inspect(tmp_path / "b.pt").to_dict())


def test_an_onnx_model_without_the_package_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(20))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedFormatError, match=r"pip install 'bnfreeze\[onnx\]'"):
        facts(tmp_path / "a.onnx")


# Model zoos.


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickled_arrays_as_detectron2_writes_them_are_read(protocol, model, tmp_path):
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    state["big-endian"] = np.arange(4, dtype=">f4")
    state["long"] = np.arange(100_000, dtype=np.int16)
    saved = {"model": state, "__author__": "a model zoo", "matching_heuristics": True}
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump(saved, file, protocol)
    found = facts(tmp_path / "a.pkl")
    assert found.kind == "pickle"
    assert found.models["model"] == {
        name: np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
        for name, array in state.items()
    }
    assert not found.calls
    assert not found.uninterpreted


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_state_dict_pickled_without_torch_save_is_read(protocol, model, tmp_path):
    with open(tmp_path / "a.pkl", "wb") as file:
        pickle.dump(model.state_dict(), file, protocol)
    found = facts(tmp_path / "a.pkl")
    assert found.models == {"": values(model.state_dict())}
    assert not found.calls


def test_numpys_archive_is_read_and_a_compressed_one_is_refused_by_name(model, tmp_path):
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(tmp_path / "a.npz", **state)
    found = facts(tmp_path / "a.npz")
    assert found.kind == "npz"
    assert found.models == {"": values(model.state_dict())}
    data = (tmp_path / "a.npz").read_bytes()
    mean = state["stem.1.running_mean"].tobytes()
    (tmp_path / "c.npz").write_bytes(data.replace(mean, mean[:-1] + b"\x77"))
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        facts(tmp_path / "c.npz")
    np.savez_compressed(tmp_path / "b.npz", **state)
    with pytest.raises(UnsafeCheckpointError, match=r"numpy\.savez_compressed"):
        facts(tmp_path / "b.npz")


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_a_folder_of_hugging_face_is_read(sharded, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    net = transformers.ResNetModel(config)
    net.save_pretrained(tmp_path / "hf", max_shard_size="1kB" if sharded else "5GB")
    assert (tmp_path / "hf" / "config.json").exists()
    found = facts(tmp_path / "hf")
    assert found.kind == ("shard index" if sharded else "safetensors")
    assert found.models == {"": values(net.state_dict())}


def test_a_folder_with_one_safetensors_file_says_which(model, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(model.state_dict(), tmp_path / "best.safetensors")
    torch.save(model.state_dict(), tmp_path / "last.pt")
    assert "best.safetensors" in bnfreeze.inspect(tmp_path).origin.remarks[0]


def test_the_usual_metadata_of_safetensors_is_no_other_name_of_a_tensor(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    safetensors_torch.save_file({"pt": torch.ones(3)}, path, metadata={"format": "pt"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.root.keys() == {"pt"}


def test_the_stride_of_a_single_place_may_be_anything(tmp_path):
    tensor = torch.arange(6.0).as_strided((1, 3, 2), (2**62, 1, 3))
    torch.save({"w": tensor}, tmp_path / "a.pt")
    assert bnfreeze.diff(tmp_path / "a.pt", {"w": tensor}).ok


def test_names_that_share_a_tensor_are_found_in_what_safetensors_saved(model, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    twice = nn.ModuleDict({"student": model, "teacher": model})
    safetensors_torch.save_model(twice, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len([*file.keys()]) == len(model.state_dict())
    assert facts(tmp_path / "a.safetensors").models == {"": values(twice.state_dict())}
    assert bnfreeze.diff(twice, tmp_path / "a.safetensors")
    bnfreeze.snapshot(twice, tensors="all").save(tmp_path / "before")
    assert main(["verify", str(tmp_path / "a.safetensors"), str(tmp_path / "before")]) == 0


def test_batch_norms_of_caffe2_are_called_folded(tmp_path):
    # As in the weights with which Detectron's models begin.
    blobs = {
        f"{name}{part}": np.ones(shape, np.float32)
        for name in ("conv1", "res2_0_branch2a")
        for part, shape in (("_w", (4, 3, 1, 1)), ("_bn_s", 4), ("_bn_b", 4))
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    (found,) = bnfreeze.inspect(tmp_path / "R-50.pkl").findings
    assert found.code == "model-no-norm-layer"
    assert "2 batch norms (conv1_bn, res2_0_branch2a_bn)" in found.message
    assert "folded" in found.message


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        # An own batch norm as in Dive into Deep Learning; TensorFlow's names in an .npz; MXNet's.
        (["1.gamma", "1.beta", "1.moving_mean", "1.moving_var"], ["1"]),
        (["a/bn/moving_mean", "a/bn/moving_variance", "b/moving_mean"], ["a/bn", "b"]),
        (["net/bn/gamma", "net/bn/moving_mean", "net/bn/moving_variance"], ["net/bn"]),
        (["bn6_3_gamma", "bn6_3_moving_mean", "bn6_3_moving_var"], ["bn6_3"]),
        (["moving_mean", "moving_var"], [""]),
        (["1.gammas", "1.running_sd"], ["1"]),
    ],
)
def test_statistics_under_other_names_are_never_called_absent(names, layers, tmp_path):
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, np.ones(4, np.float32)))
    for what in (tmp_path / "a.npz", {name: torch.ones(4) for name in names}):
        found = bnfreeze.inspect(what)
        said = [(one.code, one.name) for one in found.findings]
        assert said == [("layer-foreign", name) for name in layers]
        assert re.search("moving_mean|running_sd", found.findings[0].message)
        assert "torch's names" in found.sheet().verdict
    torch.save({"m": dict.fromkeys(names, torch.ones(4)), "n": batch_norm(1)}, tmp_path / "b.pt")
    assert {one.code for one in bnfreeze.inspect(tmp_path / "b.pt").findings} == {"layer-foreign"}


@pytest.mark.parametrize(
    ("names", "layer", "said"),
    [
        (["bn1.weight", "bn1._mean", "bn1._variance"], "bn1", "_mean and _variance"),
        (["a/bn/gamma", "a/bn/avg_mean", "a/bn/avg_var"], "a/bn", "avg_mean and avg_var"),
        (["params/n/scale", "batch_stats/n/mean", "batch_stats/n/var"], "batch_stats/n", "mean"),
        (["n/moving_mean/ExponentialMovingAverage"], "n", "moving_mean"),
    ],
    ids=["paddle", "chainer", "flax", "tensorflow"],
)
def test_the_statistics_of_other_frameworks_are_named(names, layer, said, tmp_path):
    values = dict.fromkeys(names, np.ones(4, np.float32))
    np.savez(tmp_path / "a.npz", **values)
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({**values, "StructuredToParameterName": {}}))
    for path in (tmp_path / "a.npz", tmp_path / "a.pdparams"):
        (found,) = bnfreeze.inspect(path).findings
        assert (found.code, found.name) == ("layer-foreign", layer)
        assert f"it has {said}" in found.message


def test_the_statistics_of_flax_are_named_in_a_nested_dict_too(tmp_path):
    one = np.ones(4, np.float32)
    variables = {"params": {"n": {"scale": one}}, "batch_stats": {"n": {"mean": one, "var": one}}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(variables))
    (found,) = [f for f in bnfreeze.inspect(tmp_path / "a.pkl").findings if f.level == "warning"]
    assert (found.code, found.key) == ("layer-foreign", "batch_stats.n")


@pytest.mark.parametrize("part", ["batch_stats.", "running_", "moving_mean_"])
def test_long_names_are_looked_at_once(part):
    """Each took 0.4 ms, and a file may have 200,000."""
    state = dict.fromkeys((part * (1000 // len(part)) + str(k) for k in range(5000)), torch.ones(1))
    start = time.process_time()
    bnfreeze.inspect(state)
    assert time.process_time() - start < 1


def test_a_mean_without_a_variance_is_no_statistic():
    state = dict.fromkeys(["image.mean", "image.std", "a._mean", "b.mean", "b.var"], torch.ones(3))
    found = bnfreeze.inspect(state)
    assert [one.code for one in found.findings] == ["model-no-norm-layer"]
    assert found.sheet().verdict == "No norm layer with statistics under torch's names."


def test_a_layer_of_onnx_whose_tensors_are_named_in_another_way_is_no_foreign_one(tmp_path):
    onnx = pytest.importorskip("onnx")
    names = [f"bn1_{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    values = [onnx.numpy_helper.from_array(np.full(4, 0.5, np.float32), n) for n in names]
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"])
    graph = onnx.helper.make_graph([node], "net", [], [], values)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "a.onnx")
    found = bnfreeze.inspect(tmp_path / "a.onnx")
    assert (len(found.layers), found.findings) == (1, ())


def test_an_old_folder_of_hugging_face_is_read(model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert facts(tmp_path).models == {"": values(model.state_dict())}


# Several models in one file.


def batch_norm(value):
    layer = nn.BatchNorm2d(4)
    layer.running_mean.fill_(value)
    return layer.state_dict()


@pytest.mark.parametrize(
    ("saved", "keys"),
    [
        ({"encoder": batch_norm(1), "decoder": batch_norm(2)}, ["encoder", "decoder"]),
        (
            {"netG": batch_norm(1), "netD": batch_norm(2), "optG": {"state": {}}},
            ["netG", "netD"],
        ),
        ([batch_norm(1), batch_norm(2)], ["0", "1"]),
        ({0: batch_norm(1), 1: batch_norm(2)}, ["0", "1"]),
        (
            {"model": batch_norm(1), "ema": batch_norm(2), "discriminator": batch_norm(3)},
            ["model", "ema", "discriminator"],
        ),
        ({"state_dict": batch_norm(1), "epoch": torch.tensor(3)}, ["state_dict"]),
        ({"a": {"b": batch_norm(1)}, "head": nn.Linear(2, 2).state_dict()}, ["a.b"]),
        (
            {"a": nn.Linear(2, 2).state_dict(), "b": nn.Linear(2, 2).state_dict()},
            ["a", "b"],
        ),
        ({"optimizer": {"net": batch_norm(1)}, "net": batch_norm(2)}, ["net", "optimizer.net"]),
    ],
)
def test_every_part_with_norm_layers_is_a_model(saved, keys, tmp_path):
    torch.save(saved, tmp_path / "a.pt")
    assert list(facts(tmp_path / "a.pt").models) == keys


def test_a_part_without_norm_layers_is_no_model_and_not_forgotten(tmp_path):
    torch.save({"net": batch_norm(1), "head": nn.Linear(2, 2).state_dict()}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert [one.key for one in checkpoint.chosen().models] == ["net"]
        assert [one.key for one in checkpoint.chosen().all] == ["net", "head"]


def test_a_key_chooses_a_model_by_its_path_or_its_last_part(tmp_path):
    shared = batch_norm(1)
    saved = {"run": {"net": shared, "ema": batch_norm(2)}, "copy": shared, "b": {"ema": [3]}}
    torch.save(saved, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        # The same dict under two keys is one model.
        assert {model.key for model in checkpoint.chosen().models} == {"copy", "run.ema"}
        assert checkpoint.chosen("ema").all[0].key == "run.ema"
        assert checkpoint.chosen("run.net").all[0].key == "run.net"
        assert checkpoint.chosen("net").all[0].tensors == checkpoint.chosen("copy").all[0].tensors
        with pytest.raises(UnsupportedFormatError, match="'copy'"):
            checkpoint.chosen("nothing")


def test_tensors_in_lists_and_under_numbers_are_not_forgotten(tmp_path):
    ones = torch.ones(3)
    saved = {"net": batch_norm(1), "shadow": [ones, ones * 2], "queue": {7: ones * 3}, "w": ones}
    torch.save(saved, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        found = {one.key: list(one.tensors) for one in checkpoint.chosen().all}
    del found["net"]
    assert found == {"": ["w"], "shadow": ["0", "1"], "queue": ["7"]}


def test_counters_losses_and_random_states_are_no_models(tmp_path):
    state = torch.get_rng_state()
    random = {"rng_state": state, "cuda_rng_state": [state], "rng": {"torch": state}}
    torch.save({"net": batch_norm(1), "best": torch.tensor(0.3), **random}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert [one.key for one in checkpoint.chosen().all] == ["net"]


def test_a_name_that_would_be_there_twice_keeps_its_prefix(tmp_path):
    state = {"n_averaged": torch.ones(2), "module.n_averaged": torch.zeros(2)}
    torch.save({**state, "module.running_mean": torch.ones(2)}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert len(checkpoint.chosen().models[0].tensors) == 3


def test_what_numpy_would_read_is_read(tmp_path):
    from tests.hostile.files import negative_array, numpy_dtype, p

    state = {
        "big-endian": negative_array(">f4"),
        "fortran": negative_array("f4", order=b"K\1"),
        "buffer": p.name("numpy._core.numeric", "_frombuffer")
        + b"(C\x08"
        + bytes(range(8))
        + numpy_dtype(">i4")
        + b"K\2\x85"
        + p.text("C")
        + b"tR",
    }
    (tmp_path / "a.pkl").write_bytes(p.whole(p.mapping(state.items())))
    arrays = pickle.loads((tmp_path / "a.pkl").read_bytes())
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        for name, tensor in checkpoint.chosen().models[0].tensors.items():
            assert tensor.values().tolist() == arrays[name].reshape(-1).tolist()


# What is named for what it is.


def tar_with(path, mode):
    with tarfile.open(path, mode) as archive:
        data = b"x"
        info = tarfile.TarInfo("model_weights.ckpt")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return path


def test_archives_are_named_for_what_they_are_and_how_to_unpack_them(model, tmp_path):
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    with zipfile.ZipFile(tmp_path / "ppo.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", "{}")
        archive.writestr("policy.pth", weights.getvalue())
    (tmp_path / "a.pt.gz").write_bytes(gzip.compress(weights.getvalue()))
    for path, words in {
        tmp_path / "ppo.zip": r"Stable-Baselines3.*policy\.pth.*unzip",
        tar_with(tmp_path / "a.nemo", "w"): r"tar archive.*\.nemo.*tar -xf",
        tar_with(tmp_path / "b.nemo", "w:gz"): r"gzip.*tar -xzf",
        tmp_path / "a.pt.gz": "gzip",
    }.items():
        with pytest.raises(UnsupportedFormatError, match=words):
            facts(path)
