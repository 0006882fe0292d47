"""torch.export and ONNX."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import statistics

from .checks import POLICIES, assert_frozen_as, by_policy, freeze_by, keeps_its_promise, train

BATCH = torch.export.Dim.DYNAMIC


def run(file, images):
    """Compute with onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    (out,) = session.run(None, {name: images.numpy()})
    return torch.from_numpy(out)


@by_policy
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


@pytest.mark.parametrize("policy", [*POLICIES, "affine"])
@pytest.mark.parametrize("how", ["strict", "not strict"])
def test_it_exports_in_train_mode(model, images, policy, how):
    freeze_by(model, policy)
    expected = copy.deepcopy(model).train()(images)
    exported = torch.export.export(model.train(), (images,), strict=how == "strict").module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_close(exported(images), expected)
    after = exported.state_dict()  # only what the graph uses
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == (statistics(before) if policy == "affine" else set())
    assert_frozen_as(model, policy)


@by_policy
@pytest.mark.parametrize("exporter", ["`dynamo=True`", "`dynamo=False`"])
def test_it_exports_to_onnx(model, images, policy, exporter, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    freeze_by(model, policy)
    with torch.no_grad():
        expected = model.eval()(images)
    model.train()
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model.eval(), (images,), file, dynamo="True" in exporter)
    assert_close(run(file, images), expected, rtol=1e-4, atol=1e-4)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)
