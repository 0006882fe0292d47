"""Whole models frozen, trained and verified on a GPU.

Among the slow tests they run on the CPU as well. If only a GPU fails, the test is not at fault.
"""

import copy

import pytest
import torch
import torchvision
from torch import nn

import bnfreeze
from bnfreeze.nn.functional import backend
from tests.helpers import FAKE, moved, state

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(FAKE or not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def no_tf32():
    # Compiled, a convolution is another algorithm; in TF32 the two differ by a thousandth.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def model():
    """A ResNet-18 whose statistics and parameters are not those of a new one."""
    model = torchvision.models.resnet18(num_classes=7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def train(model, images, steps=3, *, forward=None, **autocast):
    """Steps as people write them; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        with torch.autocast(images.device.type, enabled=bool(autocast), **autocast):
            loss = (forward or model)(images).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


def draw(device, layout=torch.contiguous_format):
    return torch.randn(2, 3, 64, 64).to(device).contiguous(memory_format=layout)


@pytest.mark.parametrize("policy", ["fused", "fused-act"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_model_trains_as_with_eval_and_is_undone(policy, layout, device, model):
    twin = copy.deepcopy(model).to(device, memory_format=layout)
    model, before = model.to(device, memory_format=layout), state(model)
    bnfreeze.freeze(twin, "eval+affine")
    images = draw(device, layout)
    path = backend(torch.empty(2, 64, 8, 8, device=device), model.bn1.running_mean)
    assert path.path == ("kernel" if device == "cuda" else "aten"), path.why
    report = bnfreeze.freeze(model, policy)
    with bnfreeze.guard(model, tensors="norm") as watch:
        losses = train(model, images)
    assert watch.report.ok
    assert watch.step == 3
    assert torch.allclose(losses, train(twin, images), rtol=1e-2)
    assert not any("bn" in name or "downsample.1" in name for name in moved(before, model))
    bnfreeze.unfreeze(model)
    assert type(model.bn1) is nn.BatchNorm2d
    assert report.layers


@pytest.mark.parametrize("policy", ["fused", "fused-act"])
def test_under_autocast_too(policy, device, model):
    model.to(device)
    bnfreeze.freeze(model, policy)
    with bnfreeze.guard(model, tensors="norm") as watch:
        losses = train(model, draw(device), dtype=torch.bfloat16)
    assert watch.report.ok
    assert losses.isfinite().all()


def test_trained_weights_move_and_the_statistics_do_not(device, model):
    model.to(device)
    bnfreeze.freeze(model, "fused")
    model.layer1.requires_grad_(True)
    before = state(model)
    train(model, draw(device))
    changed = {name for name in moved(before, model) if ".bn" in name}
    assert changed
    assert all(name.startswith("layer1") and "running" not in name for name in changed)


def test_a_drift_is_found_by_its_step_and_its_element(device, model):
    model.to(device)
    bnfreeze.freeze(model, "fused")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch = bnfreeze.guard(model)
    with pytest.raises(bnfreeze.DriftError) as caught, watch:
        for step in range(1, 5):
            model(draw(device)).square().mean().backward()
            if step == 2:
                model.layer2[0].bn1.running_var[3] += 1
            optimizer.step()
    (drift,) = caught.value.report.drifts
    assert (drift.name, drift.step) == ("layer2.0.bn1.running_var", 2)
    assert (drift.changed, drift.first_index) == (1, (3,))


@pytest.mark.parametrize("policy", ["fused", "fused-act"])
def test_compiled_it_computes_what_it_computes_eagerly(policy, device, model):
    model = nn.Sequential(model.conv1, model.bn1, model.relu).to(device)
    bnfreeze.freeze(model, policy)
    images = draw(device)
    eager = model(images)
    compiled = torch.compile(model, fullgraph=True)(images)
    assert torch.allclose(eager, compiled, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("policy", ["fused", "fused-act"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_whole_step_is_captured_and_replayed(policy, device, model):
    model.to(device).requires_grad_(True)
    bnfreeze.freeze(model, policy)
    images, twin = draw(device), copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (images.clone(),))
    losses = train(model, images, forward=graphed)
    assert torch.allclose(losses, train(twin, images), rtol=1e-2)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_on_two_streams_at_once(device, model):
    model.to(device).eval()
    bnfreeze.freeze(model, "fused-act")
    with torch.no_grad():
        images = [draw(device) for _ in range(2)]
        expected = [model(one) for one in images]
        torch.cuda.synchronize()
        streams, outs = [torch.cuda.Stream() for _ in range(2)], []
        for stream, one in zip(streams, images, strict=True):
            with torch.cuda.stream(stream):
                outs.append(model(one))
        torch.cuda.synchronize()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(outs, expected, strict=True))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_snapshot_of_the_gpu_holds_for_the_model_there(device, model, tmp_path):
    model.to(device)
    bnfreeze.freeze(model, "fused")
    before = bnfreeze.snapshot(model)
    before.save(tmp_path / "before")
    train(model, draw(device))
    saved = bnfreeze.Snapshot.load(tmp_path / "before")
    assert bnfreeze.verify(model, before).ok
    assert bnfreeze.verify(model, saved).ok
    model.cpu()
    # What is read from a file may have come from anywhere.
    assert bnfreeze.verify(model, saved).ok
    assert {drift.kind for drift in bnfreeze.verify(model, before).drifts} == {"device"}


@pytest.mark.parametrize("policy", ["folded", "folded+weights"])
@pytest.mark.parametrize("autocast", [False, True])
def test_folded_computes_what_eval_computes(policy, autocast, device, model):
    model.to(device, memory_format=torch.channels_last)
    twin, images = copy.deepcopy(model).eval(), draw(device, torch.channels_last)
    bnfreeze.freeze(model, policy)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        made, right = model(images).float(), twin(images).float()
    assert (made - right).norm() <= (3e-2 if autocast else 1e-4) * right.norm()
    model.fc.requires_grad_(True)
    with bnfreeze.guard(model, tensors="norm") as watch:
        train(model, images, **({"dtype": torch.bfloat16} if autocast else {}))
    assert watch.report.ok


def test_probe_and_recalibrate_find_what_they_find_on_the_cpu(device, model):
    data = [torch.randn(8, 3, 64, 64) + 0.5 for _ in range(2)]
    twin, there = copy.deepcopy(model), copy.deepcopy(model).to(device)
    images = [batch.to(device) for batch in data]
    ours, right = bnfreeze.probe(there, images), bnfreeze.probe(twin, data)
    assert [layer.verdict for layer in ours.layers] == [layer.verdict for layer in right.layers]
    bnfreeze.recalibrate(there, images)
    bnfreeze.recalibrate(twin, data)
    for name, buffer in twin.named_buffers():
        assert torch.allclose(there.get_buffer(name).cpu(), buffer, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("policy", ["fused", "fused-act", "folded"])
def test_a_model_frozen_on_the_cpu_moves_to_the_device_and_back(policy, device, model, tmp_path):
    bnfreeze.freeze(model, policy)
    images = draw("cpu")
    with torch.no_grad():
        here = model.eval()(images)
        there = model.to(device)(images.to(device))
        torch.save(model.state_dict(), tmp_path / "there.pt")
        back = model.cpu()(images)
    assert torch.allclose(here, there.cpu(), atol=1e-3)
    assert torch.equal(here, back)
    assert len(bnfreeze.inspect(tmp_path / "there.pt").layers) == 20


@pytest.mark.parametrize("policy", ["eval", "stats", "fused"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_synchronised_norm_layers_of_a_process_group_stay_frozen(policy, device, model, tmp_path):
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model).to(device)
        bnfreeze.freeze(model, policy)
        with bnfreeze.guard(model) as watch:
            train(nn.parallel.DistributedDataParallel(model), draw(device))
        assert watch.report.ok
    finally:
        torch.distributed.destroy_process_group()
