"""Norm layers that are no torch class, forwards of the user's own, and layers in odd places."""

import copy
import functools
import pickle
import types

import pytest
import torch
from timm.layers import EvoNorm2dB0, convert_splitbn_model
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its customary name

from bnfreeze import (
    DriftError,
    NotFrozenError,
    PolicyError,
    assert_frozen,
    freeze,
    guard,
    inspect,
    snapshot,
    unfreeze,
    verify,
)
from bnfreeze.inspection.behaviour import fate
from tests.helpers import copied, moved, state, step

X = torch.randn(4, 3, 5, 5) * 2 + 1


class OwnNorm(nn.Module):
    """As in many tutorials: one statistic is assigned, one is written in place, and a count."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("running_var", torch.ones(1, 3, 1, 1))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if self.training:
            var, mean = torch.var_mean(x.detach(), (0, 2, 3), keepdim=True)
            self.running_mean = torch.lerp(self.running_mean, mean, 0.1)
            self.running_var.lerp_(var, 0.1)
            self.steps += 1
        return self.gamma * (x - self.running_mean) / self.running_var.sqrt()


class NeverEval(OwnNorm):
    """Ignores its mode: a normaliser of observations."""

    def forward(self, x):
        self.running_mean.lerp_(x.detach().mean((0, 2, 3), keepdim=True), 0.1)
        return x - self.running_mean


class PlainAttribute(nn.Module):
    """As in Dive into Deep Learning: under another name, and in no registry."""

    def __init__(self):
        super().__init__()
        self.moving_mean = torch.zeros(3)

    def forward(self, x):
        self.moving_mean = self.moving_mean + x.detach().mean((0, 2, 3))
        return x - self.moving_mean.view(1, 3, 1, 1)


class PerDomain(nn.Module):
    """As PyG's HeteroBatchNorm: a row of statistics for each type, in parameters without grad."""

    def __init__(self):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(2, 3), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.running_mean[0] += x.mean((0, 2, 3))
        return x - self.running_mean[0].view(1, 3, 1, 1)


class PerStep(nn.Module):
    """As in recurrent batch norm: numbered statistics, one pair for each time step."""

    def __init__(self):
        super().__init__()
        for i in range(2):
            self.register_buffer(f"running_mean_{i}", torch.zeros(3))
            self.register_buffer(f"running_var_{i}", torch.ones(3))

    def forward(self, x, time=1):
        mean, var = (getattr(self, f"running_{what}_{time}") for what in ("mean", "var"))
        return F.batch_norm(x, mean, var, training=self.training)


class Adaptive(nn.Module):
    """As in MUNIT: another module computes weight and bias, and the statistics never change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))
        self.weight = self.bias = None

    def forward(self, x):
        mean, var = self.running_mean.repeat(len(x)), self.running_var.repeat(len(x))
        out = F.batch_norm(x.flatten(0, 1)[None], mean, var, self.weight, self.bias, training=True)
        return out.view_as(x)


class BiasFree(nn.Module):
    """As in bias_free_denoising: a standard deviation and no mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_sd", torch.ones(1, 3, 1, 1))

    def forward(self, x):
        if self.training:
            self.running_sd.lerp_(x.detach().std((0, 2, 3), keepdim=True), 0.1)
        return x / self.running_sd


FOREIGN = {
    "own": OwnNorm,
    "bias free": BiasFree,
    "per step": PerStep,
    "never eval": NeverEval,
    "attribute": PlainAttribute,
    "per domain": PerDomain,
    "EvoNorm": lambda: EvoNorm2dB0(3),
}


def model_with(layer, *others):
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer, *others)


def codes(report):
    return [(f.name, f.code) for f in report.findings if f.code != "never-trained"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_norm_layer_is_found_watched_and_never_called_absent(name):
    model = model_with(FOREIGN[name]())
    said = inspect(model)
    (facts,) = said.layers
    assert (facts.name, facts.normalizes_with, facts.updates_statistics) == ("1", "unknown", True)
    assert codes(said) == [("1", "layer-foreign")]
    for rule in ("eval", {"**": "stats"}):
        with pytest.raises(PolicyError, match=r"^1 is a \w+, which keeps running stat.*{'1': "):
            freeze(model, rule)
    with pytest.raises(NotFrozenError, match="running statistics in a way of its own"):
        assert_frozen(model)
    before = snapshot(model, tensors="norm")
    with pytest.raises(DriftError, match=r"freeze\(model, {'1': 'eval'}\)"):  # noqa: SIM117
        with guard(model, tensors="norm"):
            model.train()(X)
    assert {d.name.split(".")[0] for d in verify(model, before).drifts} == {"1"}


def test_of_a_weight_that_comes_from_outside_the_remedies_freeze_the_statistics():
    model = model_with(Adaptive())
    model[1].weight = model[1].bias = model[0].weight.mean() * torch.ones(12)
    with pytest.raises(PolicyError, match=r"weight and bias come from outside .* {'1': 'eval'}"):
        freeze(model, {"1": "eval+affine"})
    with pytest.raises(NotFrozenError, match=r"statistics may update .*\n.*{'1': 'eval'}"):
        assert_frozen(model)
    freeze(model, {"1": "eval"})
    assert_frozen(model)


@pytest.mark.parametrize("policy", ["eval+weights", "fused+weights"])
def test_a_weight_that_comes_from_outside_is_never_called_absent_or_frozen(policy):
    model, style = nn.Sequential(nn.BatchNorm2d(4, affine=False)), nn.Linear(2, 8)
    layer = model[0]
    del layer._parameters["weight"], layer._parameters["bias"]

    def assign():
        layer.weight, layer.bias = style(torch.ones(2)).chunk(2)

    assign()
    (row,) = freeze(model, policy).layers
    assert row.note == "weight and bias are set from outside the layer"
    (facts,) = inspect(model).layers
    assert (facts.trains_affine, fate(facts)) == (True, ("frozen", "train"))
    assert_frozen(model)
    with pytest.raises(NotFrozenError, match="the module that sets them"):
        assert_frozen(model, strict=True)
    style.requires_grad_(False)
    assign()
    (facts,) = inspect(model).layers
    assert (facts.trains_affine, fate(facts)) == (False, ("frozen", "fixed"))
    assert_frozen(model, strict=True)


@pytest.mark.parametrize("policy", ["stats", "eval", "fused", "eval+affine"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_rule_that_names_a_foreign_norm_layer_freezes_it(name, policy):
    model = model_with(FOREIGN[name](), nn.BatchNorm2d(3))
    kind = type(model[1])
    freeze(model, {"": "eval", "1": policy})
    assert codes(inspect(model)) == []
    with guard(model, tensors="norm"):
        model.train()(X).sum().backward()
        model.eval()(X)
    facts = inspect(model).layers[0]
    assert (facts.normalizes_with, facts.updates_statistics) == ("unknown", False)
    trains = any(p.requires_grad for p in model[1].parameters())
    assert facts.trains_affine is trains
    assert not (trains and policy in ("fused", "eval+affine"))
    assert model.train()[1].training is (policy == "stats")
    assert_frozen(model)
    with pytest.raises(NotFrozenError, match="may not use its running statistics"):
        assert_frozen(model, strict=True)
    twin = copy.deepcopy(model)
    unfreeze(twin)
    assert type(twin[1]) is kind
    assert verify(model, snapshot(model, tensors="norm"))


def test_a_policy_for_the_whole_model_leaves_a_foreign_norm_layer_alone_and_says_so():
    model = model_with(OwnNorm(), nn.BatchNorm2d(3))
    for policy in ("eval", {"**": "fused"}, {"": "eval+weights"}):
        report = freeze(model, policy)
        assert ("1", "layer-foreign") in codes(report)
        assert type(model[1]).__name__ in ("OwnNorm", "FixedAffineOwnNorm")
        before = state(model)
        step(model, X)
        assert {"1.running_mean", "1.steps"} <= moved(before, model)
    freeze(model, {"1": "none"})
    assert_frozen(model)  # left alone on purpose


def test_a_module_that_contains_others_is_frozen_only_by_a_rule_of_its_own():
    class Agent(NeverEval):
        def __init__(self):
            super().__init__()
            self.net = model_with(OwnNorm(), nn.BatchNorm2d(3))

        def forward(self, x):
            return self.net(super().forward(x))

    model = nn.ModuleDict({"agent": Agent()})
    for rules in ("eval", {"agent.net": "eval+affine"}):
        freeze(model, rules)
        assert model["agent"].training
        assert model["agent"].gamma.requires_grad
    assert not model["agent"].net.train()[1].training, "the rule reaches the one without modules"
    freeze(model, {"agent": "stats"})
    before = state(model)
    model["agent"](X)
    assert moved(before, model) == set()


def test_a_model_that_is_one_foreign_norm_layer_is_frozen():
    layer = OwnNorm()
    freeze(layer, "eval+affine")
    before = state(layer)
    layer.train()(X)
    assert moved(before, layer) == set()
    assert copied(layer, "pickle").train().training is False


def test_the_layers_of_a_graph_are_refused_with_a_remedy_that_works():
    live = model_with(nn.BatchNorm2d(3))
    exported = torch.export.export(live.train(), (X,)).module()
    assert codes(inspect(exported)) == [("1", "layer-foreign")]
    with pytest.raises(PolicyError, match=r"1 is a Module.*Freeze the original model, then exp"):
        freeze(exported)
    with pytest.raises(PolicyError, match="belongs to a graph"):
        freeze(exported, {"1": "stats"})
    flat = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    flat.register_buffer("L__self___bn_running_mean", torch.zeros(3))
    assert codes(inspect(flat)) == [("", "layer-foreign")]
    freeze(live, "eval")
    exported = torch.export.export(live.train(), (X,)).module()
    with guard(exported, tensors="norm"):
        exported(X)


def test_observers_of_quantisation_are_no_norm_layers():
    class MovingObserver(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))

    assert inspect(model_with(MovingObserver())).layers == ()


# Forwards of the user's own.


class Renormalised(nn.BatchNorm2d):
    """Uses the batch and updates its statistics, whatever its mode."""

    def forward(self, x):
        self.num_batches_tracked += 1
        self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)


# Said by torch.compile in torch 2.10.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("policy", ["stats", "eval", "fused", "fused-act", "eval+weights"])
def test_a_forward_that_ignores_its_mode_cannot_move_frozen_statistics(policy):
    model = model_with(Renormalised(3), nn.ReLU())
    (facts,) = inspect(model).layers
    assert (facts.normalizes_with, facts.updates_statistics) == ("unknown", True)
    report = freeze(model, policy)
    before = state(model)
    model.train()(X)
    expected = model.eval()(X)
    assert torch.equal(torch.compile(model, backend="eager")(X), expected)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
    assert moved(before, model) == set()
    (facts,) = inspect(model).layers
    assert (facts.normalizes_with, facts.updates_statistics) == ("unknown", False)
    assert report.sheet().rows[0][4] == "unknown"


class Ghost(nn.BatchNorm2d):
    """Averages its statistics when it goes to eval mode, as ghost batch norms do."""

    def train(self, mode=True):
        if not mode:
            self.running_mean += 1
            self.running_var = self.running_var * 2
        return super().train(mode)


class RenormalisedGhost(Ghost, Renormalised):
    pass


@pytest.mark.parametrize("kind", [Ghost, RenormalisedGhost])
@pytest.mark.parametrize("policy", ["stats", "eval", "fused", "eval+weights"])
def test_a_train_of_the_layers_own_cannot_move_frozen_statistics(kind, policy):
    model = model_with(kind(3), nn.ReLU())
    freeze(model, policy)
    before = state(model)
    model.train()(X)
    model.eval()(X)
    assert moved(before, model) == set()
    unfreeze(model)
    model.train().eval()
    assert {"1.running_mean", "1.running_var"} <= moved(before, model)


@pytest.mark.parametrize("policy", ["stats", "eval", "affine"])
def test_a_forward_set_on_the_instance_is_refused_where_it_could_write(policy):
    plain, own = model_with(nn.BatchNorm2d(3)), model_with(Renormalised(3))
    for model in (plain, own):
        model[1].forward = types.MethodType(type(model[1]).forward, model[1])
        if policy == "stats" or (policy == "eval" and model is own):
            with pytest.raises(PolicyError, match="its forward is set on the instance"):
                freeze(model, policy)
            continue
        freeze(model, policy)
        before = state(model)
        model.train()(X)
        assert bool(moved(before, model)) is (policy == "affine")


def batch_statistics(layer):
    """As once-for-all's set_running_statistics sets it, and it writes."""
    return lambda x: F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, training=True
    )


def hooked(layer):
    """As Accelerate's add_hook_to_module sets it."""
    old = layer.forward
    return functools.update_wrapper(functools.partial(lambda module, x: old(x), layer), old)


@pytest.mark.parametrize("policy", ["stats", "eval", "eval+affine", "fused"])
def test_a_replaced_forward_is_refused_and_after_freezing_no_claim_is_made(policy):
    model = model_with(nn.BatchNorm2d(3))
    model[1].forward = batch_statistics(model[1])
    with pytest.raises(PolicyError, match="not that of its class"):
        freeze(model, policy)
    del model[1].forward
    freeze(model, policy)
    model[1].forward = batch_statistics(model[1])
    before = state(model)
    model.train()(X)
    assert moved(before, model) == {"1.running_mean", "1.running_var"}
    (facts,) = inspect(model).layers
    assert (facts.normalizes_with, facts.updates_statistics) == ("unknown", True)
    with pytest.raises(NotFrozenError, match="its statistics may update"):
        assert_frozen(model)


def mixed_with_the_batch(layer, x):
    """As in test-time adaptation (MEMO), which sets it on the class; and it writes."""
    layer.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
    mean, var = layer.running_mean, layer.running_var
    return F.batch_norm(x, mean, var, layer.weight, layer.bias)


@pytest.mark.parametrize("policy", ["stats", "eval", "eval+affine", "fused"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.modules.batchnorm._BatchNorm])
def test_a_forward_replaced_on_the_class_is_kept_and_on_copies(policy, kind, monkeypatch):
    monkeypatch.setattr(kind, "forward", mixed_with_the_batch, raising=False)
    model = model_with(nn.BatchNorm2d(3))
    expected = copy.deepcopy(model).eval()(X)
    (row,) = freeze(model, policy).layers
    before = state(model)
    assert torch.equal(model.train()(X), expected)
    assert moved(before, model) == set()
    (facts,) = inspect(model).layers
    assert (facts.normalizes_with, facts.updates_statistics) == ("unknown", False)
    assert ("replaced on the class" in row.note) is (policy == "fused")


@pytest.mark.parametrize("policy", ["stats", "eval", "fused"])
def test_a_forward_replaced_on_the_class_after_freezing_is_seen(policy, monkeypatch):
    model = model_with(nn.BatchNorm2d(3))
    freeze(model, policy)
    before = state(model)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", mixed_with_the_batch, raising=False)
    model.train()(X)
    (facts,) = inspect(model).layers
    assert facts.updates_statistics is bool(moved(before, model)) is (policy == "eval")
    freeze(model, policy)
    before = state(model)
    model.train()(X)
    assert moved(before, model) == set()
    assert not inspect(model).layers[0].updates_statistics


@pytest.mark.parametrize("policy", ["stats", "eval", "fused"])
def test_a_forward_that_wraps_the_layers_own_is_trusted(policy):
    model = model_with(nn.BatchNorm2d(3))
    freeze(model, policy)
    model[1].forward = hooked(model[1])
    for each in (model, copy.deepcopy(model)):
        before = state(each)
        each.train()(X)
        assert moved(before, each) == set()
        (facts,) = inspect(each).layers
        assert facts.normalizes_with == ("running" if policy == "fused" else "unknown")
        assert not facts.updates_statistics
        assert_frozen(each)


def test_a_weight_that_another_frozen_layer_shares_is_not_said_to_be_frozen_by_hand():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    _, row = freeze(model, {"0": "eval+affine"}).layers
    assert row.note == (
        "weight frozen with the layer that shares it; bias frozen by you (requires_grad=False)"
    )


# Layers in odd places.


def test_the_compiled_form_of_a_traced_module_is_not_called_unregistered():
    traced = torch.jit.trace(model_with(nn.BatchNorm2d(3)).eval(), X)
    findings = inspect(nn.Sequential(traced)).findings
    assert {finding.code for finding in findings} == {"layer-foreign", "never-trained"}


def test_norm_layers_that_are_not_registered_are_findings_with_their_path():
    model = model_with(nn.BatchNorm2d(3))
    model[0].norms = [nn.ReLU(), {"day": nn.BatchNorm2d(3)}]
    model.pair = (nn.Linear(2, 2), model[1])  # registered, too
    teacher = model_with(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    teacher.more = {OwnNorm()}
    object.__setattr__(model, "teacher", teacher)
    for report in (inspect(model), freeze(model)):
        found = [f for f in report.findings if f.code == "layer-unregistered"]
        assert {(f.name, f.level, f.message[:1]) for f in found} == {
            ("0.norms[1]['day']", "warning", "1"),
            ("teacher", "note", "2"),
            ("teacher.more[0]", "warning", "1"),
        }
    freeze(teacher, "eval")
    assert "teacher" not in {f.name for f in inspect(model).findings}
    hides = nn.Linear(2, 2)
    hides.hidden = [nn.BatchNorm1d(2)]
    with pytest.raises(PolicyError, match=r"hidden\[0\] is not. Keep it in an nn.ModuleList"):
        freeze(hides)


def test_a_norm_layer_inside_a_frozen_one_is_a_finding():
    model = convert_splitbn_model(model_with(nn.BatchNorm2d(3)), 2)
    assert [f.level for f in inspect(model).findings if f.code == "layer-inside-norm"] == ["note"]
    report = freeze(model, "eval")
    for findings in (report.findings, inspect(model).findings):
        found = [(f.name, f.level) for f in findings if f.code == "layer-inside-norm"]
        assert found == [("1", "warning")]
    ran = []
    model[1].aux_bn[0].register_forward_hook(lambda *_: ran.append(1))
    model.train()(X)
    assert not ran, "the trap is real"
    freeze(model, "stats")  # the remedy
    before = state(model)
    model.train()(X)
    assert ran
    assert moved(before, model) == set()


def test_pickled_state_of_a_foreign_layer_round_trips():
    model = model_with(OwnNorm())
    freeze(model, {"1": "eval"})
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin.train()(X), model.train()(X))
    twin.load_state_dict(model_with(OwnNorm()).state_dict(), strict=True)


def test_keras_variables_in_a_parameter_dict_are_watched_and_never_called_absent():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            names = "bn/moving_mean", "bn/moving_variance"
            zeros = {name: nn.Parameter(torch.zeros(3), requires_grad=False) for name in names}
            self._torch_params = nn.ParameterDict(zeros)

        def forward(self, x):
            self._torch_params["bn/moving_variance"].data += 1
            return x

    model = nn.Sequential(Layer(), nn.BatchNorm2d(3))
    freeze(model, "eval+affine")
    assert ("0._torch_params", "layer-foreign") in codes(inspect(model))
    with pytest.raises(NotFrozenError, match=r"0\._torch_params"):
        assert_frozen(model)
    with pytest.raises(DriftError, match="moving_variance"), guard(model, tensors="norm"):
        model(X)


@pytest.mark.parametrize("policy", ["stats", "eval"])
def test_a_graph_that_torch_fx_traces_of_a_frozen_model_does_not_move_its_statistics(policy):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    model = nn.Sequential(Own(3))
    freeze(model, policy)
    before = state(model)
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(X), model(X))
    assert moved(before, model) == set()
    assert {"0.running_mean", "0.running_var"} <= {*graph.state_dict()}
