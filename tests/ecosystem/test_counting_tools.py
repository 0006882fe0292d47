"""Tools that look up the class of a module: FLOP counters, BackPACK. docs/other-tools.md tells."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

from bnfreeze import freeze, inspect, unfreeze
from tests.helpers import moved, state

X = torch.randn(2, 3, 8, 8)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def thop(model):
    tool = pytest.importorskip("thop")
    return tool.profile(model, (X,), verbose=False)


def ptflops(model):
    tool = pytest.importorskip("ptflops")
    with contextlib.redirect_stdout(io.StringIO()):
        return tool.get_model_complexity_info(
            model, (3, 8, 8), as_strings=False, print_per_layer_stat=False, backend="pytorch"
        )


def fvcore(model):
    tool = pytest.importorskip("fvcore.nn")
    count = tool.FlopCountAnalysis(model, X).unsupported_ops_warnings(False)
    return count.uncalled_modules_warnings(False).total()


def torchinfo(model):
    tool = pytest.importorskip("torchinfo")
    return tool.summary(model, input_data=X, verbose=0).total_mult_adds


def flop_counter_mode(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as count:
        model(X)
    return count.get_total_flops()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["stats", "eval+affine", "fused"])
@pytest.mark.parametrize("tool", [thop, ptflops, fvcore, torchinfo, flop_counter_mode])
def test_no_tool_thaws_a_layer_and_an_unfrozen_copy_counts_as_before(tool, policy):
    expected = tool(small().eval())
    model = small()
    freeze(model, policy)
    twin, before = copy.deepcopy(model), state(model)
    count = tool(model)
    (facts,) = inspect(model).layers
    assert not facts.updates_statistics
    keys = {
        key: value for key, value in state(model).items() if key.split(".")[-1][:5] != "total"
    }
    assert keys.keys() == before.keys()
    assert all(torch.equal(keys[key], before[key]) for key in before)
    assert (count != expected) is (tool in (thop, ptflops) or (policy, tool) == ("stats", fvcore))
    unfreeze(twin)
    assert tool(twin.eval()) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["eval", "fused"])
def test_backpack_knows_no_frozen_layer_and_does_an_unfrozen_copy(policy):
    pytest.importorskip("einops")  # which it needs
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad, DiagGGNExact

    def run(model, extension):
        model = backpack.extend(model)
        loss = backpack.extend(nn.CrossEntropyLoss())
        with backpack.backpack(extension):
            loss(model(X), torch.tensor([0, 1])).backward()
        return {name for name, p in model.named_parameters() if hasattr(p, extension.savefield)}

    frozen = small().eval()
    freeze(frozen, policy)
    before = state(frozen)
    assert not {n for n in run(copy.deepcopy(frozen), BatchGrad()) if n.startswith("1.")}
    with pytest.raises(NotImplementedError):
        run(copy.deepcopy(frozen), DiagGGNExact())
    unfreeze(twin := copy.deepcopy(frozen))
    assert {"1.weight", "1.bias"} <= run(twin.eval(), DiagGGNExact())
    assert moved(before, frozen) == set()
