"""The table of activations agrees with torch, and the CUDA source knows every entry."""

import re

import pytest
import torch
from torch import nn

from bnfreeze.nn.activations import ACTIVATIONS, TABLE, activation_of, settings_of
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
    result = ACTIVATIONS[entry.name](changed, inplace=True)
    assert torch.equal(result, expected)
    assert (result is changed) is entry.in_place
    kept = expected if entry.from_output else x
    for enabled in (False, True):  # as in a first backward, and in a double one
        with torch.set_grad_enabled(enabled):
            assert torch.allclose(entry.gradient(grad, kept.detach()), right)
    forward, wide = entry.functions[0], x.float()
    assert forward(wide.bfloat16()).dtype is torch.bfloat16
    assert entry.exact == torch.equal(forward(wide.bfloat16()), forward(wide).bfloat16())


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_the_table_says_whether_torch_keeps_the_output(entry):
    x = torch.linspace(-8, 8, 5, requires_grad=True)
    y = entry.functions[0](x)
    y.detach().zero_()
    if entry.torch_keeps_output:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()


def test_a_module_is_an_activation_only_if_it_computes_just_that():
    for entry in TABLE:
        assert activation_of(entry.module()) == entry.name
        if entry.in_place:
            assert activation_of(entry.module(inplace=True)) == entry.name
        assert activation_of(type("Own", (entry.module,), {})()) is None
        for name, value in entry.settings:
            module = entry.module()
            assert settings_of(module) == entry.settings
            setattr(module, name, f"not {value}")
            assert activation_of(module) is None
    assert dict(settings_of(nn.ReLU6())) == {"min_val": 0.0, "max_val": 6.0}
    assert activation_of(nn.Identity()) is None
    assert settings_of(nn.Identity()) == ()
    assert activation_of("relu") is None


def test_the_cuda_source_knows_every_activation():
    source = program([])
    (names,) = re.findall(r"enum Activation \{ (.*) \};", source)
    assert names.split(", ") == ["NONE", *(entry.name.upper() for entry in TABLE)]
    for function in ("activate", "deactivate"):
        body = re.search(rf"float {function}\(.*?\n}}", source, re.DOTALL)[0]
        assert re.findall(r"ACT == (\w+)", body) == [entry.name.upper() for entry in TABLE]
    (line,) = re.findall(r"constexpr bool from_input = (.*);", source)
    from_input = [entry.name.upper() for entry in TABLE if not entry.from_output]
    assert re.findall(r"ACT == (\w+)", line) == from_input
