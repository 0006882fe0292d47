"""The policy `folded`: folded where that gives the same, and the two layers where it does not.

What blocks have in common with `fused-act` is in test_fused_act.
"""

import copy
import statistics

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from bnfreeze import freeze, guard, unfreeze
from bnfreeze.fusion import folded
from bnfreeze.nn import functional, modules
from tests.fusion import fusions
from tests.fusion.fusions import lively
from tests.helpers import copied, moved, state

C = 8


class Residual(nn.Module):
    """A block as in a ResNet, with an activation of one's choice."""

    def __init__(self, act=nn.ReLU, **options):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, **{"padding": 1, **options}), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.act, self.branch = (
            act(inplace=True),
            nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
        )

    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += self.branch(x)
        return self.act(out)


ALL = {"bn1": "conv+relu", "bn2": "conv+add+relu", "branch.1": "conv"}


@pytest.fixture
def x():
    return torch.randn(3, C, 6, 6)


@pytest.fixture
def model():
    return lively(Residual())


@pytest.fixture
def calls(monkeypatch):
    """The name of each computation: folded, or a frozen layer by itself."""
    seen = []
    for where, name in ((folded, "_folded"), (functional, "_apply"), (modules, "_apply")):
        monkeypatch.setattr(where, name, spying(seen, name, getattr(where, name)))
    return seen


def spying(seen, name, real):
    return lambda *args: seen.append(name) or real(*args)


def fold(model, policy="folded"):
    return {row.name: row.fuses for row in freeze(model, policy, traceable=[__name__]).layers}


def note(model):
    return freeze(model, "folded", traceable=[__name__]).layers[0].note


def evaluated(model):
    """A copy of the model, frozen the plain way."""
    twin = copy.deepcopy(model)
    freeze(twin, "eval+affine")
    return twin


def results(model, x):
    """The output, and the gradients of the input and of all parameters."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model.train()(x)
    y.float().square().mean().backward()
    return y, [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def agree(model, other, x, tolerance=1e-5):
    (one, grads), (two, others) = results(model, x), results(other, x)
    pairs = [(one, two), *zip(grads, others, strict=True)]
    return all(a.dtype is b.dtype and error(a, b) <= tolerance for a, b in pairs)


def error(value, expected):
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


# What is folded.


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"groups": C}, {"groups": 2, "dilation": 2, "padding": 2}],
    ids=str,
)
def test_a_block_is_folded_and_computes_what_eval_mode_does(act, options, x, calls):
    model = lively(Residual(act, **options)).double()
    twin, name = evaluated(model), act.__name__.lower()
    assert fold(model) == {key: fuses.replace("relu", name) for key, fuses in ALL.items()}
    assert agree(model, twin, x.double(), 1e-13)
    assert calls == ["_folded"] * 3


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_convolutions_of_every_rank_and_linear_layers_are_folded(rank, layout, calls):
    kinds = [(nn.Linear, nn.BatchNorm1d), (nn.Conv1d, nn.BatchNorm1d),
             (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)]  # fmt: skip
    conv, norm = kinds[rank]
    args = (2, stride := 2) if rank else ()
    model = lively(nn.Sequential(conv(C, 2 * C, *args), norm(2 * C, affine=False)))
    x = torch.randn(60, C, *[5] * rank)
    if layout == "channels_last" and rank > 1:
        where = torch.channels_last if rank == 2 else torch.channels_last_3d
        x, model = x.to(memory_format=where), model.to(memory_format=where)
    twin = evaluated(model)
    assert fold(model) == {"1": "conv" if rank else "linear"}
    assert agree(model, twin, x)
    assert model(x).stride() == twin(x).stride()
    assert set(calls) == {"_folded"}
    assert not args or stride == model[0].stride[0]


def test_what_a_resnet_a_mobilenet_and_an_efficientnet_fold():
    expected = {
        "resnet50": {"conv+relu": 33, "conv+add+relu": 16, "conv": 4},
        "mobilenet_v2": {"conv+relu6": 35, "conv+add": 10, "conv": 7},
        "timm/efficientnet_lite0": {"conv+relu6": 33, "conv+add": 9, "conv": 7},
        "densenet121": {"conv+relu": 59, "relu": 62},
    }
    for name, counts in expected.items():
        assert fusions.counts(freeze(fusions.build(name), "folded")) == counts


def test_timms_layer_is_folded_with_its_own_activation(x, calls):
    model = lively(nn.Sequential(nn.Conv2d(C, C, 1), timm.layers.BatchNormAct2d(C)))
    twin = evaluated(model)
    assert fold(model) == {"1": "conv+relu"}
    assert agree(model, twin, x)
    assert set(calls) == {"_folded"}
    model[1].act.register_forward_hook(lambda module, args, out: out + 1)
    assert error(model(x), twin(x) + 1) < 1e-5
    alone = lively(nn.Sequential(timm.layers.BatchNormAct2d(C)))
    row = freeze(alone, "folded").layers[0]
    assert (row.fuses, row.note) == ("relu", "not folded: no convolution comes before it")


def test_two_folded_layers_in_one_sum_and_one_without_a_convolution(x, calls):
    class Sums(Residual):
        def forward(self, x):
            return F.relu(self.bn1(x) + self.bn2(self.conv2(x)) + self.branch(x))

    model = lively(Sums())
    twin = evaluated(model)
    assert fold(model) == {"bn1": "", "bn2": "conv+add", "branch.1": "conv+add+relu"}
    assert agree(model, twin, x)
    assert calls.count("_folded") == 2


# What is not folded, and why.


class Mine(nn.Conv2d):
    pass


NOT_FOLDED = {
    "no convolution": (lambda m: setattr(m, "conv1", nn.MaxPool2d(1)), "MaxPool2d comes before it"),
    "a subclass": (lambda m: setattr(m, "conv1", Mine(C, C, 1)), "Mine comes before it"),
    "transposed": (
        lambda m: setattr(m, "conv1", nn.ConvTranspose2d(C, C, 1)),
        "ConvTranspose2d comes before it",
    ),
    "padding": (lambda m: setattr(m.conv1, "padding_mode", "circular"), "does not pad with zeros"),
    "a name as padding": (
        lambda m: setattr(m, "conv1", nn.Conv2d(C, C, 3, padding="same")),
        "padding is not a number",
    ),
    "a hook": (lambda m: m.conv1.register_forward_hook(lambda *_: None), "Conv2d has a hook"),
    "parametrized": (
        lambda m: parametrizations.weight_norm(m.conv1),
        "ParametrizedConv2d comes before it",
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_a_layer_that_cannot_be_folded_gets_fused_act_and_the_report_says_why(name, x):
    change, why = NOT_FOLDED[name]
    model = lively(Residual())
    change(model)
    twin = evaluated(model)
    row = freeze(model, "folded", traceable=[__name__]).layers[0]
    assert (row.policy, row.fuses) == ("folded", "relu")
    assert row.note.startswith("not folded: ")
    assert why in row.note
    assert agree(model, twin, x)


def test_an_input_that_changes_and_an_output_that_is_read_elsewhere_are_not_folded(x):
    class Changed(Residual):
        def forward(self, x):
            x = x + 1
            z = self.conv1(x)
            x.mul_(2)
            return F.relu(self.bn1(z)) + x

    class Read(Residual):
        def forward(self, x):
            z = self.conv1(x)
            return F.relu(self.bn1(z)) * z

    for kind, why in ((Changed, "its input may be changed"), (Read, "used elsewhere too")):
        model = lively(kind()).requires_grad_(False)
        twin = evaluated(model)
        assert why in note(model)
        assert torch.allclose(model(x), twin(x), atol=1e-5)


def test_a_shared_convolution_and_a_shared_norm_layer_are_folded_at_each_call(x, calls):
    class Shared(Residual):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.conv1(x)))
            return F.relu(self.bn1(self.conv2(x)))

    model = lively(Shared())
    twin = evaluated(model)
    assert fold(model) == {"bn1": "conv+relu", "bn2": "conv+relu", "branch.1": "conv"}
    assert agree(model, twin, x)
    assert calls == ["_folded"] * 3


RANKS = {
    "an unbatched Conv1d": (nn.Conv1d(C, C, 1), nn.BatchNorm1d(C), (C, C)),
    "a linear layer on (N, C, L)": (nn.Linear(C, C), nn.BatchNorm1d(C), (3, C, C)),
}


@pytest.mark.parametrize("name", RANKS)
def test_with_another_rank_the_norm_layer_normalises_along_its_own_axis(name):
    conv, norm, shape = RANKS[name]
    model = lively(nn.Sequential(conv, norm))
    twin = evaluated(model)
    fold(model)
    assert agree(model, twin, torch.randn(shape))


# When the two layers run after all: a later change takes effect.

LATER = {
    "a hook on the convolution": lambda m: m.conv1.register_forward_hook(lambda _, a, out: out + 1),
    "a hook on the norm layer": lambda m: m.bn1.register_forward_hook(lambda _, a, out: out + 1),
    "another convolution": lambda m: setattr(m, "conv1", nn.Identity()),
    "padding": lambda m: setattr(m.conv1, "padding_mode", "circular"),
    "a parametrization": lambda m: parametrizations.spectral_norm(m.conv1),
    "affine thawed by hand": lambda m: m.bn1.requires_grad_(True),
    "the norm layer unfrozen": lambda m: unfreeze(m.bn1),
    "another policy for the norm layer": lambda m: freeze(m.bn1, "fused"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_later_change_takes_effect(name, x, calls):
    model = lively(Residual())
    twin = evaluated(model)
    fold(model)
    for each in (model, twin):
        torch.manual_seed(0)
        LATER[name](each)
    freeze(twin, "eval")
    twin.bn1.requires_grad_("thawed" in name)
    twin.eval()
    torch.manual_seed(1)
    expected = twin(x)
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)
    assert calls.count("_folded") < 3


def test_nothing_is_stale(model, x):
    twin = evaluated(model)
    fold(model)
    model(x)
    other = lively(Residual()).state_dict()

    def written(m):
        m.conv1.weight.data.add_(0.5)
        m.conv2.bias.data.mul_(2)
        m.bn1.running_var.data.mul_(2)
        m.bn2.weight.data.neg_()

    for change in (
        written,
        lambda m: m.load_state_dict(other),
        lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv2.weight.expand(-1, -1, 3, 3))),
        lambda m: (setattr(m.conv1, "dilation", (2, 2)), setattr(m.conv1, "padding", (2, 2))),
        lambda m: m.double(),
        lambda m: m.float().to(memory_format=torch.channels_last),
    ):
        for each in (model, twin):
            change(each)
        x = x.to(model.conv1.weight.dtype)
        assert agree(model, twin, x)


# In place, by identity.


def test_unfreeze_is_exact_and_copies_are_folded_too(model, x, calls):
    before, objects = state(model), list(map(id, model.modules()))
    kinds = [type(module) for module in model.modules()]
    expected = copy.deepcopy(model).eval()(x)
    assert fold(model) == fold(model) == ALL
    assert list(map(id, model.modules())) == objects
    for how in ("deepcopy", "pickle", "save"):
        twin = copied(model, how)
        del calls[:]
        assert torch.allclose(twin.train()(x), expected, atol=1e-5)
        assert calls == ["_folded"] * 3
        unfreeze(twin)
        assert [type(module) for module in twin.modules()] == kinds
    with guard(model):
        model(x).sum().backward()
    unfreeze(model)
    assert [type(module) for module in model.modules()] == kinds
    assert moved(before, model) == set()
    assert torch.equal(model.eval()(x), expected)


def with_mode(model):
    def run(x):
        with torch.overrides.BaseTorchFunctionMode():
            return model(x)

    return run


@pytest.mark.parametrize(
    "how", ["compile", "export", "fx", "functional_call", "vmap", "checkpoint", "trace", "mode"]
)
def test_blocks_work_with_the_tools_of_torch(model, x, how, calls):
    fold(model)
    expected = model(x)
    other = model
    if how == "compile":
        other = torch.compile(model, backend="eager", fullgraph=True)
    elif how == "export":
        other = torch.export.export(model, (x,)).module()
    elif how == "fx":
        other = torch.fx.symbolic_trace(model)
    elif how == "functional_call":
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        other = lambda x: torch.func.functional_call(model, values, (x,))  # noqa: E731
    elif how == "vmap":
        other = lambda x: torch.vmap(model)(x[None])[0]  # noqa: E731
    elif how == "trace":
        other = torch.jit.trace(model, x, check_trace=False)
    elif how == "mode":
        other = with_mode(model)
    else:
        other = lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=False)  # noqa: E731
    del calls[:]
    out = other(x)
    assert torch.allclose(out, expected, atol=1e-5)
    out.sum().backward()
    assert ("_folded" in calls) == (how in ("functional_call", "checkpoint"))


@pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*world size is 1")
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP", "fully_shard"])
def test_distributed_wrappers_see_the_same_gradients(wrapper, x, calls):
    model = nn.Sequential(lively(Residual()))
    twin = evaluated(model)
    fold(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrapper == "DDP":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif wrapper == "FSDP":
            options = {"use_orig_params": True, "device_id": torch.device("cpu")}
            wrapped = FullyShardedDataParallel(model, **options)
        else:
            wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        wrapped(x).square().mean().backward()
        twin(x).square().mean().backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            grad = (
                mine.grad.full_tensor()
                if wrapper == "fully_shard" and theirs.requires_grad
                else mine.grad
            )
            assert theirs.grad is None or error(grad.view(theirs.shape), theirs.grad) < 1e-5
        # In FSDP's one flat parameter all parts of it require a gradient, frozen ones too.
        assert set(calls) == {"_apply" if wrapper == "FSDP" else "_folded"}
    finally:
        dist.destroy_process_group()


def test_gradients_and_their_gradients(x):
    model = lively(Residual(nn.SiLU)).double()
    fold(model)
    small = x[:2].double().requires_grad_()
    weights = [model.conv1.weight, model.conv2.bias]

    def run(x, *values):
        names = ("conv1.weight", "conv2.bias")
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (small, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (small, *weights), fast_mode=True)


def test_frozen_whole_no_graph_is_built(model, x, calls):
    fold(model, "folded+weights")
    assert not model(x).requires_grad
    assert calls == ["_folded"] * 3
    assert model(x.requires_grad_()).requires_grad


# Precision.


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "autocast"])
@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_it_is_as_exact_as_eval_mode(name, precision):
    """Against fp64 at most twice the error of the output, and thrice that of the gradients."""
    live = lively(fusions.build(name))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    live = live.to(dtype)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64).to(dtype)
    exact = results(evaluated(live).double(), x.double())
    errors = []
    for policy in ("folded", "eval+affine"):
        model = copy.deepcopy(live)
        freeze(model, policy)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            y, gradients = results(model, x)
        errors.append((error(y, exact[0]), statistics.median(map(error, gradients, exact[1]))))
    (output, gradient), (output2, gradient2) = errors
    assert output <= 2 * output2
    assert gradient <= 3 * gradient2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
@pytest.mark.parametrize("train", [True, False])
def test_nan_and_infinity_propagate_as_in_eval_mode(value, act, train, x):
    model = lively(Residual(act)).requires_grad_(train)
    twin = evaluated(model)
    fold(model)
    x[1, 2, 3, 3] = value
    for change in (None, ("conv1", 1.0), ("conv2", 1.0)):
        if change:
            x[1, 2, 3, 3] = change[1]
            for each in (model, twin):
                each.get_submodule(change[0]).weight.data[0, 0, 0, 0] = value
        y, expected = model(x.clone()), twin(x.clone())
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())
        assert y.isnan().any() or value != value or act in (nn.ReLU, nn.ReLU6)
    assert model(x[:0]).shape == (0, *x.shape[1:])


@pytest.mark.parametrize(("side", "folds"), [(12, True), (2, False)])
def test_a_weight_that_is_larger_than_the_output_is_not_scaled(side, folds, calls):
    model = lively(nn.Sequential(nn.Conv2d(C, C, 3, 2, 1), nn.BatchNorm2d(C)))
    twin, x = evaluated(model), torch.randn(2, C, side, side)
    assert fold(model) == {"1": "conv"}
    assert agree(model, twin, x)
    assert set(calls) == {"_folded" if folds else "_apply"}
