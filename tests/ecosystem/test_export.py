"""torch.export and ONNX."""

import copy

import pytest
import torch
from torch.testing import assert_close

from .cells import cell
from .checks import assert_frozen_as, freeze_by, keeps_its_promise, train

PACKAGES = ("onnx", "onnxruntime", "onnxscript")

BATCH = torch.export.Dim.DYNAMIC


def run(file, images):
    """What onnxruntime computes."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    (out,) = session.run(None, {name: images.numpy()})
    return torch.from_numpy(out)


@cell("`torch.export.export`, {how}, evaluation")
@pytest.mark.parametrize("how", ["strict", "not strict"])
def test_it_exports_in_evaluation(model, images, policy, how):
    freeze_by(model, policy)
    expected = model.eval()(images)
    program = torch.export.export(
        model, (images,), dynamic_shapes={"x": {0: BATCH}}, strict=how == "strict"
    )
    assert_close(program.module()(images), expected)
    assert_close(program.module()(images[:2]), model(images[:2]))
    assert program.state_dict.keys() == model.state_dict().keys()
    model.train()
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@cell("`torch.export.export`, {how}, train mode")
@pytest.mark.parametrize("how", ["strict", "not strict"])
def test_what_is_exported_in_train_mode_holds_the_same(model, images, policy, how):
    freeze_by(model, policy)
    expected = copy.deepcopy(model).train()(images)
    exported = torch.export.export(model.train(), (images,), strict=how == "strict").module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(exported(images), expected)
    after = exported.state_dict()  # without what the graph makes no use of
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    counts = {name for name in before if "running" in name or "num_batches" in name}
    assert moved == (counts if policy == "affine" else set())
    assert_frozen_as(model, policy)


@cell("`torch.onnx.export`, {exporter}")
@pytest.mark.parametrize("exporter", ["`dynamo=True`", "`dynamo=False`"])
def test_it_exports_to_onnx(model, images, policy, exporter, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    freeze_by(model, policy)
    with torch.no_grad():
        expected = model.eval()(images)
    model.train()  # as it is in the midst of training
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model.eval(), (images,), file, dynamo="True" in exporter)
    assert_close(run(file, images), expected, rtol=1e-4, atol=1e-4)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)
