"""torch.compile and CUDA graphs."""

import copy
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock

from bnfreeze import unfreeze

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise, train


@pytest.fixture(autouse=True)
def forgotten():
    """Forget what other tests compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def outputs_and_gradients(model, images):
    images = images.clone().requires_grad_()
    out = model(images)
    out.square().mean().backward()
    return [out, images.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@by_policy
def test_compiled_training_computes_the_same(model, images, policy):
    freeze_by(model, policy)
    plain = copy.deepcopy(model)
    compiled = whole(model)
    assert_close(
        outputs_and_gradients(compiled.train(), images),
        outputs_and_gradients(plain.train(), images),
    )
    with keeps_its_promise(model, policy):
        train(compiled, images)
    assert_frozen_as(compiled, policy)


@by_policy
def test_compiled_evaluation_computes_the_same(model, images, policy):
    freeze_by(model, policy)
    expected = model.eval()(images)
    with torch.no_grad():
        assert_close(whole(model)(images), expected)
    assert_frozen_as(model, policy)


def cannot_compile():
    """Whether a C++ compiler or Python's headers are missing, which inductor needs."""
    compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    return not compiler or not Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(cannot_compile(), reason="needs a C++ compiler and Python's headers")
@pytest.mark.parametrize(
    "policy",
    ["fused-act", *(pytest.param(one, marks=pytest.mark.slow) for one in ("stats", "eval+affine"))],
)
def test_inductor_compiles_it(images, policy):
    model = nn.Sequential(BasicBlock(3, 3), nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    model(images)
    freeze_by(model, policy, head="2")
    with keeps_its_promise(model, policy, head="2"):
        train(whole(model, "inductor"), images)


@by_policy
def test_freezing_and_unfreezing_a_compiled_model_take_effect(model, images, policy):
    live = copy.deepcopy(model)
    compiled = whole(model)
    with keeps_its_promise(live, "none"), keeps_its_promise(model, "none"):
        train(compiled, images)
        train(live, images)
    freeze_by(compiled, policy)
    with keeps_its_promise(model, policy):
        train(compiled, images)
    assert_frozen_as(model, policy)
    unfreeze(compiled)
    with keeps_its_promise(model, "none"):
        train(compiled, images)


@by_policy
# A warning of torch.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_that_are_compiled_in_place(model, images, policy):
    model.layer1.compile(fullgraph=True, backend="aot_eager")
    freeze_by(model, policy)
    model.layer2.compile(fullgraph=True, backend="aot_eager")
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
@by_policy
def test_cuda_graphs_of_torch_compile(model, images, policy):
    model, images = model.cuda(), images.cuda()
    freeze_by(model, policy)
    compiled = torch.compile(model, mode="reduce-overhead")
    with keeps_its_promise(model, policy):
        train(compiled, images, steps=5)


@pytest.mark.gpu
@by_policy
def test_cuda_graphs_by_hand(model, images, policy):
    model, images = model.cuda(), images.cuda()
    freeze_by(model, policy)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model.train()(images).square().mean()
        loss.backward()
        optimizer.step()

    with keeps_its_promise(model, policy):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(3):
            graph.replay()
