"""FrozenBatchNorm1d, 2d and 3d as modules."""

import copy

import pytest
import torch
import torch.utils.checkpoint
import torchvision
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.feature_extraction import create_feature_extractor

import bnfreeze
from bnfreeze import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, PolicyError
from tests.helpers import copied, saved_mib

KINDS = [
    (FrozenBatchNorm1d, nn.BatchNorm1d, (4, 6)),
    (FrozenBatchNorm1d, nn.BatchNorm1d, (4, 6, 5)),
    (FrozenBatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 3)),
    (FrozenBatchNorm3d, nn.BatchNorm3d, (4, 6, 2, 3, 3)),
]


def trained(kind, *, affine=True, eps=1e-3, **kwargs):
    """A norm layer that has seen something."""
    torch.manual_seed(0)
    bn = kind(6, eps=eps, affine=affine, **kwargs)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    bn.num_batches_tracked.fill_(7)
    for parameter in bn.parameters():
        nn.init.normal_(parameter)
    return bn


@pytest.mark.parametrize(("frozen", "kind", "shape"), KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_from_batchnorm_computes_what_eval_does_and_keeps_eps(frozen, kind, shape, affine):
    bn = trained(kind, affine=affine)
    layer = frozen.from_batchnorm(bn)
    x = torch.randn(shape)
    assert torch.equal(layer(x), bn.eval()(x))
    assert layer.eps == 1e-3
    assert list(layer.parameters()) == []
    for name, value in bn.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
        assert layer.state_dict()[name].data_ptr() != value.data_ptr()


def test_from_batchnorm_takes_sync_look_alikes_and_a_weight_without_bias():
    x = torch.randn(4, 6, 5, 3)
    sync = trained(nn.SyncBatchNorm).eval()
    assert torch.equal(FrozenBatchNorm2d.from_batchnorm(sync)(x), sync(x))
    theirs = torchvision.ops.FrozenBatchNorm2d(6, eps=0.01)
    theirs.load_state_dict(trained(nn.BatchNorm2d).state_dict())
    assert torch.allclose(FrozenBatchNorm2d.from_batchnorm(theirs)(x), theirs(x), atol=1e-5)
    bn = trained(nn.BatchNorm2d).eval()
    bn.register_parameter("bias", None)
    layer = FrozenBatchNorm2d.from_batchnorm(bn)
    assert layer.bias is None
    assert torch.equal(layer(x), bn(x))


def test_from_batchnorm_refuses_what_it_would_change():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(PolicyError, match="WithActivation"):
        FrozenBatchNorm2d.from_batchnorm(WithActivation(6))
    with pytest.raises(PolicyError, match="BatchNorm1d"):
        FrozenBatchNorm2d.from_batchnorm(nn.BatchNorm1d(6))
    with pytest.raises(PolicyError, match="track_running_stats"):
        FrozenBatchNorm2d.from_batchnorm(nn.BatchNorm2d(6, track_running_stats=False))


def test_neither_train_mode_nor_tools_for_batch_norm_change_anything():
    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    model, x = nn.Sequential(layer), torch.randn(4, 6, 5, 3)
    before, expected = copy.deepcopy(layer.state_dict()), layer(x)
    layer.training = True
    assert model.train()[0].training is vars(layer)["training"] is False
    assert torch.equal(model(x), expected)
    torch.optim.swa_utils.update_bn([x], model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.func.replace_all_batch_norm_modules_(model)
    assert model[0] is layer
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(("frozen", "kind", "shape"), KINDS)
def test_the_wrong_rank_or_channels_is_a_value_error_that_names_both(frozen, kind, shape):
    with pytest.raises(ValueError, match=r"takes a .*D.* input with 6 channels; this one is 6D"):
        frozen(6)(torch.randn(1, 6, 1, 1, 1, 1))
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, 1.*C = 6 channels"):
        frozen(6)(torch.randn(shape)[:, :1])


def test_statistics_stay_the_same_fp32_objects_through_half_and_follow_double_and_devices():
    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    buffers, values = dict(layer.named_buffers()), copy.deepcopy(layer.state_dict())
    for half in (torch.float16, torch.bfloat16):
        nn.Sequential(layer).to(half)
        assert layer.weight.dtype is layer.bias.dtype is half
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert getattr(layer, name) is buffers[name]
            assert torch.equal(buffers[name], values[name])
        assert layer(torch.randn(2, 6, 3, 3, dtype=half)).dtype is half
    assert layer.double().running_mean.dtype is layer.running_var.dtype is torch.float64
    assert layer.half().running_var.dtype is torch.float32
    meta = FrozenBatchNorm2d(6, dtype=torch.bfloat16).to("meta")
    assert meta.running_mean.is_meta
    assert meta.to_empty(device="cpu").running_var.dtype is torch.float32


def test_state_dicts_load_in_every_direction_with_and_without_the_count():
    def fresh():
        made = FrozenBatchNorm2d(6), torchvision.ops.FrozenBatchNorm2d(6), nn.BatchNorm2d(6)
        return {type(each).__module__.partition(".")[0]: each for each in made}

    live = trained(nn.BatchNorm2d)
    sources = fresh()
    for source in sources.values():
        source.load_state_dict(live.state_dict())
    assert list(sources["bnfreeze"].state_dict()) == list(live.state_dict())
    for source in sources.values():
        for target in fresh().values():
            target.load_state_dict(source.state_dict())
            for name, value in target.state_dict().items():
                if name in source.state_dict():
                    assert torch.equal(value, live.state_dict()[name])
    layer, without = sources["bnfreeze"], sources["torchvision"].state_dict()
    assert "num_batches_tracked" not in without
    layer.load_state_dict(without)
    assert layer.num_batches_tracked == 7
    with pytest.raises(RuntimeError, match="running_var"):
        layer.load_state_dict({k: v for k, v in without.items() if k != "running_var"})


def test_an_assigned_checkpoint_gives_fp32_statistics_and_buffers():
    live = trained(nn.BatchNorm2d).state_dict(keep_vars=True)
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in live.items()}
    for state in (live, halves):
        layer = FrozenBatchNorm2d(6, device="meta")
        layer.load_state_dict(state, assign=True)
        assert layer.weight.dtype is state["weight"].dtype
        assert torch.equal(layer.weight, state["weight"])
        assert layer.running_mean.dtype is layer.running_var.dtype is torch.float32
        assert torch.equal(layer.running_mean, state["running_mean"].float())
        assert list(layer.parameters()) == []
        assert not layer.weight.requires_grad


@pytest.mark.parametrize("policy", [None, "eval", "fused", "stats"])
def test_a_checkpoint_without_a_count_leaves_nothing_of_a_meta_model_behind(policy):
    # A plain dict, as it comes from a file of safetensors or from before torch 0.4.1.
    state = dict(trained(nn.BatchNorm2d).state_dict())
    del state["num_batches_tracked"]
    with torch.device("meta"):
        layer = nn.BatchNorm2d(6) if policy else FrozenBatchNorm2d(6)
    if policy:
        bnfreeze.freeze(layer, policy)
    layer.load_state_dict(state, strict=False, assign=True)
    assert layer.num_batches_tracked.item() == 0
    assert not any(value.is_meta for value in layer.to("cpu").state_dict().values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_pickles_saves_and_prints(how):
    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    x, twin = torch.randn(2, 6, 3, 3), copied(layer, how)
    assert torch.equal(twin(x), layer(x))
    assert twin.train().training is False
    assert repr(twin) == "FrozenBatchNorm2d(6, eps=0.001, affine=True)"


def test_it_has_torchvisions_parameters_and_a_model_does_not_thaw_it():
    ours, theirs = (
        torchvision.models.resnet18(norm_layer=layer)
        for layer in (FrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d)
    )
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    state = torch.optim.AdamW(ours.parameters()).state_dict()
    torch.optim.AdamW(theirs.parameters()).load_state_dict(state)
    ours.requires_grad_(True)
    before = copy.deepcopy(ours.bn1.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0, weight_decay=0.1)
    ours.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in ours.bn1.state_dict().items())
    layers = bnfreeze.inspect(ours).layers
    assert len(layers) == 20
    assert not any(layer.trains_affine or layer.updates_statistics for layer in layers)
    assert {layer.normalizes_with for layer in layers} == {"running"}
    assert all("buffers" in layer.why["affine"] for layer in layers)
    # Five tensors a layer: all of them are frozen.
    assert bnfreeze.verify(ours, bnfreeze.snapshot(ours)).checked == 100


def test_a_layer_that_freeze_made_keeps_its_parameters():
    model = nn.Sequential(trained(nn.BatchNorm2d))
    parameters = list(model.parameters())
    bnfreeze.freeze(model, "fused")
    assert isinstance(model[0], FrozenBatchNorm2d)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert not any(p.requires_grad for p in parameters)
    model.requires_grad_(True)
    x, twin = torch.randn(4, 6, 3, 3), trained(nn.BatchNorm2d).eval()
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert torch.allclose(model[0].weight.grad, twin.weight.grad, rtol=1e-4)
    assert torch.allclose(model[0].bias.grad, twin.bias.grad, rtol=1e-4)


@pytest.mark.parametrize(("frozen", "kind", "shape"), KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_live_layer_whose_class_is_swapped_works_as_it_stands(frozen, kind, shape, affine):
    bn = trained(kind, affine=affine)
    twin = copy.deepcopy(bn).eval()
    bn.__class__ = type(f"Frozen{kind.__name__}", (frozen,), {})
    x = torch.randn(shape)
    assert torch.equal(bn.train()(x), twin(x))
    assert bn.training is False
    buffers = dict(bn.named_buffers())
    bn.to(torch.bfloat16).load_state_dict(twin.state_dict())
    assert all(buffer is buffers[name] for name, buffer in bn.named_buffers())
    assert "Frozen" in repr(bn)


def test_torch_compile_export_and_functional_call_take_the_layer():
    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    x = torch.randn(4, 6, 3, 3)
    assert torch.equal(layer(x, x, "relu"), (layer(x) + x).relu())
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, x, "relu"), layer(x, x, "relu"))
    program = torch.export.export(layer, (x,))
    assert torch.allclose(program.module()(x), layer(x))
    half = {name: value * 0.5 for name, value in layer.named_buffers() if "running" not in name}
    out = torch.func.functional_call(layer, half, (x,))
    assert torch.allclose(out, layer(x) * 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "autocast", "most"),
    [(torch.float32, False, 39.6), (torch.bfloat16, False, 20.6), (torch.float32, True, 20.6)],
    ids=["fp32", "bf16", "autocast"],
)
def test_what_a_resnet50_saves_for_backward_per_image(dtype, autocast, most):
    model = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d).to(dtype)
    assert saved_mib(model, torch.randn(1, 3, 224, 224, dtype=dtype), autocast) <= most


def test_activation_checkpointing_gives_the_same_gradients():
    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    layer.weight.requires_grad_()
    x = torch.randn(4, 6, 3, 3, requires_grad=True)
    for activation in ("relu", "silu"):
        plain = torch.autograd.grad(layer(x, x, activation).square().sum(), (x, layer.weight))
        again = torch.utils.checkpoint.checkpoint(layer, x, x, activation, use_reentrant=False)
        kept = torch.autograd.grad(again.square().sum(), (x, layer.weight))
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_a_parametrized_weight_is_used():
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d, affine=True))
    layer.bias.zero_()
    x = torch.randn(2, 6, 3, 3)
    whole = layer(x)
    parametrize.register_parametrization(layer, "weight", Half())
    assert torch.allclose(layer(x), whole / 2)


def test_symbolic_trace_and_torchvisions_feature_extractor_take_the_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    )
    x = torch.randn(2, 3, 4, 4)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(traced.double()(x.double()), model.double()(x.double()))
    live = torchvision.models.resnet18().eval()
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    resnet.load_state_dict(live.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(resnet.train()(x), live(x))
    extractor = create_feature_extractor(resnet, ["layer1"])
    assert extractor(torch.randn(1, 3, 32, 32))["layer1"].shape == (1, 64, 8, 8)


@pytest.mark.parametrize("dynamo", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.filterwarnings("ignore")  # the exporters' own, of which there are many
def test_onnx_export_computes_the_same(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    layer = FrozenBatchNorm2d.from_batchnorm(trained(nn.BatchNorm2d))
    x = torch.randn(2, 6, 4, 4)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(model, (x,), path, dynamo=dynamo)
    exported = onnx.load(path)
    feed = {exported.graph.input[0].name: x.numpy()}
    (out,) = reference.ReferenceEvaluator(exported).run(None, feed)
    assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-5)
