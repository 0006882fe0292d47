"""Honest checkpoints: in every format the same facts, and those of the live model."""

import json
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze import UnsupportedFormatError, inspect
from bnfreeze.checkpoints import open_checkpoint
from bnfreeze.checkpoints.torch_calls import STORAGES, TORCH_NAMES
from bnfreeze.verification.diff import diff
from tests.checkpoints.formats import FORMATS, safetensors_file, save_zip
from tests.helpers import bits

# Findings that come of the statistics' values, and so can be seen in a file as well.
OF_VALUES = {"stats-dtype", "stats-nonfinite", "stats-var-nonpositive", "never-trained"}


def trained(model, images):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(images + torch.randn_like(images))
        output = getattr(output, "logits", output)
        output.square().mean().backward()
        optimizer.step()
    return model


def torchvision_resnet():
    import torchvision

    return trained(torchvision.models.resnet18(), torch.randn(4, 3, 64, 64))


def torchvision_mobilenet():
    import torchvision

    return trained(torchvision.models.mobilenet_v3_small(), torch.randn(4, 3, 64, 64))


def torchvision_with_frozen_layers():
    import torchvision

    layer = torchvision.ops.FrozenBatchNorm2d
    return torchvision.models.resnet18(norm_layer=layer)


def timm_regnet():
    import timm

    return trained(timm.create_model("regnetx_002"), torch.randn(4, 3, 64, 64))


def transformers_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=3)
    return trained(ResNetForImageClassification(config), torch.randn(4, 3, 32, 32))


MODELS = [
    torchvision_resnet,
    torchvision_mobilenet,
    torchvision_with_frozen_layers,
    timm_regnet,
    transformers_resnet,
]


def keyless(rows):
    """Rows or findings without the key under which their state_dict lies in its file."""
    return [replace(row, key="") for row in rows]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_real_models_give_the_same_facts_in_every_format_and_alive(make, tmp_path):
    model = make()
    alive = inspect(model)
    in_memory = inspect(model.state_dict())
    assert [x.name for x in in_memory.layers] == [x.name for x in alive.layers]
    assert [x.num_features for x in in_memory.layers] == [x.num_features for x in alive.layers]
    of_values = [
        {(f.code, f.name) for f in x.findings if f.code in OF_VALUES} for x in (alive, in_memory)
    ]
    assert of_values[0] == of_values[1]
    for kind, save in FORMATS.items():
        path = save(model.state_dict(), tmp_path / kind)
        read = inspect(path)
        assert read.origin.kind == kind
        order = (lambda layer: layer.name) if kind == "safetensors" else (lambda layer: 0)
        assert sorted(keyless(read.layers), key=order) == sorted(in_memory.layers, key=order)
        assert set(keyless(read.findings)) == set(in_memory.findings)
        with open_checkpoint(path) as checkpoint:
            tensors = checkpoint.chosen().models[0].tensors
            assert set(tensors) == set(model.state_dict())
            for name, value in model.state_dict().items():
                assert tensors[name].shape == tuple(value.shape)
                assert tensors[name].words().tobytes() == bits(value).numpy().tobytes()


def test_the_facts_are_those_of_the_values(model, tmp_path):
    model.stem[1].running_var[1] = 3e-6
    model.stem[1].weight.data[2] = 1e-5
    (layer, *_) = inspect(save_zip(model.state_dict(), tmp_path / "a.pt")).layers
    norm = model.stem[1]
    assert layer.name == "stem.1"
    assert layer.kind == "batch norm"
    assert layer.batches == 3
    assert layer.dtype == "float32"
    assert layer.affine
    assert layer.near_dead == 2
    assert layer.mean.low == norm.running_mean.min().item()
    assert layer.var.high == norm.running_var.max().item()
    assert layer.var.deciles[0] == layer.var.low
    assert list(layer.var.deciles) == sorted(layer.var.deciles)
    assert len(layer.var.deciles) == 11


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_dtype_and_layout_is_read_bit_for_bit(kind, tmp_path):
    base = torch.arange(24).reshape(2, 3, 4) - 5
    state = {}
    for dtype in DTYPES:
        if dtype is torch.complex128 and kind in {"safetensors", "shard index"}:
            continue
        state[f"{dtype}".removeprefix("torch.")] = base.to(dtype)
    state["empty"] = torch.empty(0, 3)
    state["scalar"] = torch.tensor(2.5)
    if kind in {"torch zip", "torch legacy"}:
        state["transposed"] = base.float().transpose(0, 2)
        state["slice"] = base.double()[:, 1:, ::2]
        state["expanded"] = torch.ones(1, 3).expand(4, 3)
        state["complex transposed"] = base.to(torch.complex128).transpose(0, 1)
        state["parameter"] = nn.Parameter(torch.randn(3))
    with open_checkpoint(FORMATS[kind](state, tmp_path / "saved")) as checkpoint:
        tensors = checkpoint.chosen().models[0].tensors
        assert set(tensors) == set(state)
        for name, value in state.items():
            assert tensors[name].dtype == str(value.dtype).removeprefix("torch.")
            assert tensors[name].words().tobytes() == bits(value).numpy().tobytes(), name
            assert tensors[name].shape == tuple(value.shape)
            values = tensors[name].values()
            if values is not None:
                assert values.tolist() == value.detach().reshape(-1).tolist()


def test_a_file_without_checksums_is_read(tmp_path):
    old = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save_zip(nn.BatchNorm2d(4).state_dict(), tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(old)
    assert len(inspect(path).layers) == 1


def test_tensors_without_values_are_listed(tmp_path):
    with torch.device("meta"):
        layer = nn.BatchNorm2d(4)
    for what in (layer.state_dict(), save_zip(layer.state_dict(), tmp_path / "a.pt")):
        said = inspect(what)
        assert said.layers[0].num_features == 4
        assert said.layers[0].var is None
        assert "stats-unread" in {finding.code for finding in said.findings}


def test_a_shared_storage_is_counted_once(tmp_path):
    whole = torch.zeros(100)
    state = {f"n{i}": whole[i:] for i in range(50)}
    assert inspect(save_zip(state, tmp_path / "a.pt")).origin.bytes == 400
    assert inspect(state).origin.bytes == 400


# Wrappers.


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "keys", "stripped"),
    [
        (lambda s: s, [""], ()),
        (lambda s: {"state_dict": s, "epoch": 3}, ["state_dict"], ()),
        (lambda s: {"model": s, "model_ema": s.copy()}, ["model", "model_ema"], ()),
        (lambda s: {"weights": under("module.", s)}, ["weights"], ("module.",)),
        (lambda s: under("module._orig_mod.", s), [""], ("module.", "_orig_mod.")),
        (lambda s: under("_orig_mod.module.", s), [""], ("_orig_mod.", "module.")),
        (
            lambda s: {"n_averaged": torch.tensor(3)} | under("module.", s),
            [""],
            ("module.",),
        ),
        (lambda s: {"step": torch.tensor(3), "model": s}, ["model"], ()),
        (lambda s: {"ema": {"shadow": dict(s)}, "net": s}, ["net", "ema.shadow"], ()),
        (lambda s: {"trainer": {"deep": {"inside": s}}}, ["trainer.deep.inside"], ()),
        (lambda s: [3, {"model": s}], ["1.model"], ()),
    ],
)
def test_every_model_is_found_and_named(wrap, keys, stripped, model, tmp_path):
    state = model.state_dict()
    torch.save(wrap(state), tmp_path / "a.pt")
    found = inspect(tmp_path / "a.pt")
    names = ["stem.1", "backbone.0.1", "backbone.1.1", "head.2"]
    assert [(layer.key, layer.name) for layer in found.layers] == [
        (key, name) for key in keys for name in names
    ]
    assert [one.key for one in found.origin.models] == keys
    assert all(set(one.stripped) == set(stripped) for one in found.origin.models)
    assert all(word in str(found) for word in (*keys, *stripped))


def test_a_compiled_submodule_keeps_its_plain_name(model):
    state = {
        name.replace("backbone.", "backbone._orig_mod."): value
        for name, value in model.state_dict().items()
    }
    said = inspect(state)
    assert said.layers[1].name == "backbone.0.1"
    assert said.origin.models[0].stripped == ("_orig_mod.",)


def test_the_key_chooses_among_several(model, tmp_path):
    other = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": other}, tmp_path / "a.pt")
    assert inspect(tmp_path / "a.pt").layers[0].batches == 3
    assert inspect(tmp_path / "a.pt", key="model_ema").layers[0].batches == 4
    with pytest.raises(
        UnsupportedFormatError, match=r"No state_dict under the key 'x'\. There are"
    ):
        inspect(tmp_path / "a.pt", key="x")


def test_a_lightning_checkpoint_is_read(model, tmp_path):
    optimizer = torch.optim.Adam(model.parameters())
    model.head(model.backbone(model.stem(torch.randn(4, 3, 10, 10)))).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1},
        },
        tmp_path / "last.ckpt",
    )
    said = inspect(tmp_path / "last.ckpt")
    assert said.origin.key == "state_dict"
    # The prefix is the LightningModule's own name for it.
    assert said.layers[0].name == "model.stem.1"


# Distributed.


def test_a_checkpoint_of_two_ranks_is_read(tmp_path):
    code = """
        import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
        import torch.distributed.checkpoint as dcp
        from torch.distributed.tensor import distribute_tensor, Shard
        from torch.distributed.device_mesh import init_device_mesh

        def rank(number, folder):
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2
            )
            torch.manual_seed(0)
            mesh = init_device_mesh("cpu", (2,))
            model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
            model(torch.randn(4, 3, 8, 8))
            state = model.state_dict()
            if number == 0:
                torch.save(state, f"{folder}/whole.pt")
            state["0.weight"] = distribute_tensor(state["0.weight"], mesh, [Shard(0)])
            state["1.running_var"] = distribute_tensor(state["1.running_var"], mesh, [Shard(0)])
            dcp.save({"model": state, "epoch": 3}, checkpoint_id=f"{folder}/dcp")
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.start_processes(rank, (sys.argv[1],), nprocs=2, start_method="fork")
    """
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(code))
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    said, whole = inspect(tmp_path / "dcp"), inspect(tmp_path / "whole.pt")
    assert keyless(said.layers) == keyless(whole.layers)
    assert said.origin.key == "model"
    with open_checkpoint(tmp_path / "dcp") as a, open_checkpoint(tmp_path / "whole.pt") as b:
        one, other = a.chosen().models[0].tensors, b.chosen().models[0].tensors
        assert set(one) == set(other)
        for name, tensor in one.items():
            assert tensor.words().tobytes() == other[name].words().tobytes()


# What is found.


def codes(said):
    return {finding.code for finding in said.findings}


def test_statistics_that_do_not_pair_up_are_told():
    state = nn.BatchNorm2d(4).state_dict()
    cases = {
        "no running_var": {k: v for k, v in state.items() if k != "running_var"},
        "no running_mean": {k: v for k, v in state.items() if k != "running_mean"},
        "no running_mean and running_var": {"num_batches_tracked": torch.tensor(1)},
        "differ in shape": {**state, "running_var": torch.ones(5)},
        "differ in shape: running_mean 4, running_var 4, weight 3": {
            **state,
            "weight": torch.ones(3),
        },
        "2 dimensions": {k: v.reshape(2, 2) if v.dim() else v for k, v in state.items()},
        "2 elements": {**state, "num_batches_tracked": torch.tensor([1, 2])},
    }
    for words, broken in cases.items():
        said = inspect({f"bn.{name}": value for name, value in broken.items()})
        (finding,) = [f for f in said.findings if f.code == "stats-unpaired"]
        assert finding.name == "bn"
        assert words in finding.message
        assert said.layers == ()


def test_mixed_counts_tiny_variances_and_missing_counts_are_told(model):
    state = model.state_dict()
    assert codes(inspect(state)) == set()
    state["head.2.num_batches_tracked"] += 5
    state["stem.1.running_var"][0] = 1e-9
    del state["backbone.0.1.num_batches_tracked"]
    said = inspect(state)
    assert codes(said) == {"stats-count-mixed", "stats-var-tiny", "stats-count-missing"}
    (mixed,) = [f for f in said.findings if f.code == "stats-count-mixed"]
    assert "is 3 in 2 layers, and 8 in 1 (first in head.2)" in mixed.message
    assert said.layers[1].kind == "frozen or old batch norm"
    assert said.layers[1].batches is None


def test_broken_values_are_errors(model):
    state = model.state_dict()
    state["stem.1.running_mean"][0] = float("nan")
    state["head.2.running_var"][0] = -1
    said = inspect(state)
    assert [(f.level, f.code) for f in said.findings] == [
        ("error", "stats-nonfinite"),
        ("error", "stats-var-nonpositive"),
    ]
    assert not said.ok


def test_a_layer_of_infinite_values_alone_is_shown():
    state = nn.BatchNorm2d(4).state_dict()
    state["running_var"].fill_(float("inf"))
    state["running_mean"].fill_(-3e38)
    said = inspect(state)
    assert said.layers[0].var is None
    assert "broken" in str(said)


def test_statistics_in_low_precision_are_told():
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        said = inspect(nn.BatchNorm2d(4).to(dtype).state_dict())
        assert "stats-dtype" in codes(said)
        assert said.layers[0].dtype == str(dtype).removeprefix("torch.")


# The one inspect.


def test_one_inspect_takes_models_mappings_and_paths(model, tmp_path):
    path = save_zip(model.state_dict(), tmp_path / "a.pt")
    for what in (model, model.state_dict(), {"state_dict": model.state_dict()}, path, str(path)):
        said = inspect(what)
        assert isinstance(said, bnfreeze.Inspection)
        assert [layer.num_features for layer in said.layers] == [4, 6, 6, 5]
        assert said.to_dict()["schema"] == 2
    with pytest.raises(TypeError, match="a checkpoint is not trained"):
        inspect(path, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match="a live model has no keys"):
        inspect(model, key="x")
    with pytest.raises(TypeError, match=r"Expected an nn\.Module, not int"):
        inspect(3)
    with pytest.raises(UnsupportedFormatError, match="no tensors by name"):
        inspect({})


def test_checkpoints_are_inspected_without_importing_torch(model, tmp_path):
    paths = [save(model.state_dict(), tmp_path / kind) for kind, save in FORMATS.items()]
    code = """
        import sys, bnfreeze
        for path in sys.argv[1:]:
            assert len(bnfreeze.inspect(path).layers) == 4
        print("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_what_is_allowed_here_torch_allows_too():
    from torch._weights_only_unpickler import _get_allowed_globals

    assert set(TORCH_NAMES) <= set(_get_allowed_globals())
    for name, dtype in STORAGES.items():
        if name != "torch.storage.UntypedStorage":
            kind = name.rpartition(".")[2]
            found = torch.storage._get_dtype_from_pickle_storage_type(kind)
            assert str(found) == f"torch.{dtype}"


def unreadable():
    """Tensors of which torch keeps more than a storage and a view of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantised tensors and sparse CSR are on their way out
        return {
            "sparse": torch.eye(4).to_sparse(),
            "compressed": torch.eye(4).to_sparse_csr(),
            "quantised": torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
            "conjugated": torch.randn(4, dtype=torch.complex64).conj(),
            "negated": torch.randn(4, dtype=torch.complex64).conj().imag,
            "described": torch.empty(4, device="meta"),
        }


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy"])
def test_what_cannot_be_read_is_described_and_never_called_identical(kind, tmp_path):
    tensors = unreadable()
    path = FORMATS[kind](tensors, tmp_path / "a.pt")
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.chosen().models[0].tensors
        assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
            name: (str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in tensors.items()
        }
        assert all(tensor.why and not tensor.has_values for tensor in found.values())
    difference = diff(path, path)
    assert {change.kind for change in difference.tensors} == {"unverified"}
    assert not difference.ok


def test_a_negative_variance_is_an_error_and_no_near_dead_channel():
    layer = torch.nn.BatchNorm2d(3)
    layer.running_var.copy_(torch.tensor([-1.0, 1e-8, 1.0]))
    found = inspect(layer.state_dict())
    assert found.layers[0].near_dead == 1
    assert not found.ok


def test_a_state_dict_with_tensors_that_cannot_be_read_is_looked_at():
    from torch.testing._internal.two_tensor import TwoTensor

    two = TwoTensor(torch.ones(4), torch.ones(4))
    layer = torch.nn.BatchNorm2d(4).state_dict()
    found = inspect({**unreadable(), **layer, "weight": two})
    assert [finding.code for finding in found.findings] == ["never-trained"]
    assert inspect({**layer, "running_var": two}).findings[0].code == "stats-unread"


def test_a_header_whose_size_begins_as_a_pickle_is_read(tmp_path):
    # 0x0480 bytes: the first two of the file are those of a pickle of protocol 4.
    name = "bn.running_mean"
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {}}
    text = json.dumps(header).encode().ljust(0x480)
    path = safetensors_file(tmp_path / "a.safetensors", text, bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x04"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert list(checkpoint.chosen().models[0].tensors) == [name]
