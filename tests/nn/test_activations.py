"""The table of activations agrees with torch, and the CUDA source knows every entry."""

import re

import pytest
import torch
from torch import nn

from bnfreeze.nn.activations import KERNEL_NAMES, TABLE, activation_of
from bnfreeze.nn.cuda.build import program


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_an_entry_agrees_with_the_module_in_torch(entry):
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    expected, grad = entry.module()(x), torch.randn(x.shape, dtype=torch.float64)
    (right,) = torch.autograd.grad(expected, x, grad)
    for function in entry.functions:
        assert torch.equal(function(x.detach().clone()), expected)
    for method in entry.methods:
        assert torch.equal(getattr(x.detach().clone(), method)(), expected)
    changed = x.detach().clone()
    assert entry.functions[0](changed, inplace=True) is changed
    assert torch.equal(changed, expected)
    kept = expected if entry.from_output else x
    for enabled in (False, True):  # as in a first backward, and in a double one
        with torch.set_grad_enabled(enabled):
            assert torch.allclose(entry.gradient(grad, kept.detach()), right)
    forward, wide = entry.functions[0], x.float()
    assert forward(wide.bfloat16()).dtype is torch.bfloat16
    assert entry.exact == torch.equal(forward(wide.bfloat16()), forward(wide).bfloat16())


def test_a_module_is_an_activation_only_if_it_computes_just_that():
    for entry in TABLE:
        assert activation_of(entry.module()) == entry.name
        assert activation_of(entry.module(inplace=True)) == entry.name
        assert activation_of(type("Own", (entry.module,), {})()) is None
    six = nn.ReLU6()
    six.max_val = 5.0
    assert activation_of(six) is None
    assert activation_of(nn.Identity()) is None
    assert activation_of("relu") is None


def test_the_cuda_source_knows_every_activation():
    source = program([])
    (names,) = re.findall(r"enum Activation \{ (.*) \};", source)
    assert names.split(", ") == list(KERNEL_NAMES.values())
    for function in ("activate", "deactivate"):
        body = re.search(rf"float {function}\(.*?\n}}", source, re.DOTALL)[0]
        assert re.findall(r"ACT == (\w+)", body) == [KERNEL_NAMES[entry.name] for entry in TABLE]
    (line,) = re.findall(r"constexpr bool from_input = (.*);", source)
    from_input = [KERNEL_NAMES[entry.name] for entry in TABLE if not entry.from_output]
    assert re.findall(r"ACT == (\w+)", line) == from_input
