"""Every kind of norm layer that there is, and what wraps a model."""

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from timm.layers import freeze_batch_norm_2d as timm_freeze
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

from bnfreeze import PolicyError, freeze, inspect, unfreeze
from tests.helpers import moved, state, statistics, step


class OwnForward(nn.BatchNorm2d):
    """Writes to its statistics without asking track_running_stats, as hand-written ones do."""

    def forward(self, x):
        if self.training:
            mean, var = x.mean((0, 2, 3)).detach(), x.var((0, 2, 3)).detach()
            self.running_mean.lerp_(mean, self.momentum)
            # Not in place: another tensor takes the buffer's name.
            self.running_var = torch.lerp(self.running_var, var, self.momentum)
            self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        return nn.functional.gelu(
            nn.functional.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)
        )


class WithArguments(nn.BatchNorm2d):
    """Takes arguments of its own, in its constructor and in its forward."""

    def __init__(self, channels, *, scale):
        super().__init__(channels)
        self.scale = scale

    def forward(self, x, shift=0.0):
        return super().forward(x) * self.scale + shift


LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "1d over a sequence": (lambda: nn.BatchNorm1d(6), (5, 6, 7)),
    "2d": (lambda: nn.BatchNorm2d(6), (5, 6, 3, 3)),
    "3d": (lambda: nn.BatchNorm3d(6), (5, 6, 2, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(6), (5, 6, 3, 3)),
    "instance 1d": (lambda: nn.InstanceNorm1d(6, track_running_stats=True), (5, 6, 7)),
    "instance 2d": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (5, 6, 3, 3),
    ),
    "instance 3d": (lambda: nn.InstanceNorm3d(6, track_running_stats=True), (5, 6, 2, 2, 2)),
    "without affine": (lambda: nn.BatchNorm2d(6, affine=False), (5, 6, 3, 3)),
    "without bias": (lambda: nn.BatchNorm2d(6, bias=False), (5, 6, 3, 3)),
    "cumulative average": (lambda: nn.BatchNorm2d(6, momentum=None), (5, 6, 3, 3)),
    "momentum 0": (lambda: nn.BatchNorm2d(6, momentum=0.0), (5, 6, 3, 3)),
    "double": (lambda: nn.BatchNorm2d(6, dtype=torch.float64), (5, 6, 3, 3)),
    "timm's": (lambda: BatchNormAct2d(6), (5, 6, 3, 3)),
    "own forward": (lambda: OwnForward(6), (5, 6, 3, 3)),
    "own arguments": (lambda: WithArguments(6, scale=2.0), (5, 6, 3, 3)),
}


def made(name):
    make, shape = LAYERS[name]
    try:
        layer = make()
    except TypeError:
        pytest.skip("this torch has no BatchNorm2d(bias=False)")
    dtype = torch.float64 if name == "double" else torch.float32
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer, torch.randn(shape, dtype=dtype) * 3 + 1


@pytest.mark.parametrize("name", LAYERS)
def test_eval_freezes_the_statistics_and_gives_eval_modes_output(name):
    layer, x = made(name)
    reference = copy.deepcopy(layer).eval()(x)
    kind = type(layer)
    freeze(layer, "eval+affine")
    before = state(layer)
    assert torch.equal(layer.train()(x), reference)
    assert moved(before, layer) == set()
    unfreeze(layer)
    assert type(layer) is kind
    assert layer.training


@pytest.mark.parametrize("name", LAYERS)
def test_stats_freezes_the_statistics_and_gives_train_modes_output(name):
    layer, x = made(name)
    reference = copy.deepcopy(layer).train()(x)
    buffers = {key: id(value) for key, value in layer.named_buffers()}
    freeze(layer, "stats")
    before = state(layer)
    assert torch.equal(layer.train()(x), reference)
    assert moved(before, layer) == set()
    assert {key: id(value) for key, value in layer.named_buffers()} == buffers


@pytest.mark.parametrize("name", LAYERS)
def test_copies_of_any_kind_stay_frozen_and_can_be_undone(name):
    for policy in ("stats", "eval", "affine"):
        layer, x = made(name)
        kind = type(layer)
        freeze(layer, policy)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin.train()(x), layer.train()(x))
        unfreeze(twin)
        assert type(twin) is kind
        assert type(layer) is not kind


@pytest.mark.parametrize("policy", ["stats", "eval"])
def test_statistics_are_frozen_even_from_a_batch_with_nan(policy):
    layer, x = made("2d")
    freeze(layer, policy)
    before = state(layer)
    layer.train()(x.fill_(float("nan")))
    assert moved(before, layer) == set()


def test_arguments_of_a_layers_own_forward_pass_through():
    layer, x = made("own arguments")
    freeze(layer, "stats")
    assert torch.allclose(layer(x, shift=1.0), layer(x) + 1.0)


def test_an_instance_norm_that_stopped_tracking_is_brought_to_use_its_statistics():
    layer, x = made("instance 2d")
    layer.track_running_stats = False
    before = state(layer)
    layer.eval()(x)
    assert statistics(moved(before, layer)), "torch writes to them even in eval mode"
    assert inspect(layer).layers[0].updates_statistics
    freeze(layer, "eval")
    before = state(layer)
    out = layer.train()(x)
    assert moved(before, layer) == set()
    assert inspect(layer).layers[0].normalizes_with == "running"
    unfreeze(layer)
    assert layer.track_running_stats is False
    layer.track_running_stats = True
    assert torch.equal(out, layer.eval()(x))


@pytest.mark.parametrize("policy", ["stats", "eval"])
def test_a_flag_that_is_toggled_twice_while_frozen_is_what_it_was(policy):
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    freeze(layer, policy)
    for _ in range(2):  # as virtual adversarial training does around a forward pass
        layer.track_running_stats ^= True
    unfreeze(layer)
    assert layer.track_running_stats is True


@pytest.mark.parametrize("policy", ["stats", "eval"])
def test_an_instance_norms_statistics_are_frozen_in_eval_mode_too(policy):
    def made_of(batch):
        torch.manual_seed(batch)
        layer = nn.InstanceNorm2d(64, track_running_stats=True).eval()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        return layer, torch.randn(batch, 64, 3, 3)

    drifts = False
    for batch in (1, 3, 5, 7, 11):
        layer, x = made_of(batch)
        before = state(layer)
        layer(x)
        drifts = drifts or moved(before, layer) != set()
        layer, x = made_of(batch)
        freeze(layer, policy)
        before = state(layer)
        layer.eval()(x)
        assert moved(before, layer) == set()

    class AlwaysEval(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = made_of(3)[0]

        def train(self, mode=True):
            return super().train(False)

    # torch 2.10 rounds them in eval mode; inspect knows whether this torch does.
    assert inspect(AlwaysEval()).layers[0].updates_statistics is drifts


def test_an_instance_norm_without_statistics_is_no_norm_layer():
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    assert inspect(model).layers == ()
    with pytest.raises(PolicyError, match=r"No batch norm here.* LayerNorm.*'weights'"):
        freeze(model, "eval")
    freeze(model, "weights")
    assert not model[2].weight.requires_grad


@pytest.mark.parametrize("policy", ["eval", "eval+affine"])
def test_a_batch_norm_without_statistics_cannot_be_forced_to_eval(policy):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(PolicyError, match=r"1 has no running statistics.*'none'"):
        freeze(model, policy)
    assert type(model[0]) is nn.BatchNorm2d
    freeze(model, {"": policy, "1": "none"})
    assert not model.train()[0].training


def test_the_advice_for_a_root_without_statistics_is_no_rule_that_cannot_match():
    with pytest.raises(PolicyError, match=r"cannot be kept. Leave it out, or build it"):
        freeze(nn.BatchNorm1d(4, track_running_stats=False), "eval")


def test_a_batch_norm_without_statistics_has_none_to_freeze_but_a_weight():
    layer = nn.BatchNorm2d(3, track_running_stats=False)
    (row,) = freeze(layer, "stats+affine").layers
    assert "keeps no running statistics" in row.note
    assert not layer.weight.requires_grad
    assert [f.code for f in inspect(layer).findings] == ["stats-missing"]


def test_a_lazy_layer_must_have_seen_an_input():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    for policy in ("stats", "affine", "eval", "weights"):
        with pytest.raises(PolicyError, match=r"1 is a LazyBatchNorm2d.*run one forward pass"):
            freeze(model, policy)
    assert type(model[0]) is nn.BatchNorm2d
    assert "layer-lazy" in {f.code for f in inspect(model).findings}
    model(torch.randn(2, 3, 4, 4))
    freeze(model, "eval")
    assert not model.train()[1].training


def test_all_that_cannot_be_frozen_is_named_at_once():
    layers = [nn.BatchNorm2d(3, track_running_stats=False) for _ in range(7)]
    with pytest.raises(PolicyError) as caught:
        freeze(nn.Sequential(*layers), "eval")
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["0", "1", "2", "3", "4"]
    assert lines[5] == "… and 2 more layers."


@pytest.mark.parametrize("policy", ["stats", "affine", "eval"])
def test_a_class_that_registers_or_refuses_its_subclasses_does_not_see_ours(policy):
    seen = []

    class Registered(nn.BatchNorm2d):
        def __init_subclass__(cls, **kwargs):
            seen.append(cls)
            raise RuntimeError("no children")

    layer = Registered(3)
    freeze(layer, policy)
    assert seen == []
    assert isinstance(layer, Registered)
    unfreeze(layer)
    assert type(layer) is Registered


def test_a_class_whose_metaclass_refuses_a_subclass_is_a_policy_error():
    class Final(type):
        def __new__(mcs, name, bases, namespace):
            if name.startswith("Eval"):
                raise TypeError("final")
            return super().__new__(mcs, name, bases, namespace)

    class Sealed(nn.BatchNorm2d, metaclass=Final):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), Sealed(3))
    with pytest.raises(PolicyError, match="cannot be subclassed"):
        freeze(model, "eval")
    assert type(model[0]) is nn.BatchNorm2d


def test_a_layer_on_the_meta_device_is_frozen_too():
    layer = nn.BatchNorm2d(3, device="meta")
    freeze(layer, "eval+affine")
    assert not layer.train().training
    assert [one.code for one in inspect(layer).findings] == ["stats-unread"]


# Frozen batch norms of other libraries.


def lookalikes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNormAct2d(4))
    return {
        "torchvision": nn.Sequential(FrozenBatchNorm2d(4)),
        "transformers": nn.Sequential(DetrFrozenBatchNorm2d(4)),
        "timm": timm_freeze(model),
        # detectron2 keeps eps as an attribute and the four tensors as buffers, as torchvision does.
        "detectron2": nn.Sequential(
            type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"__module__": "detectron2.layers"})(4)
        ),
    }


@pytest.mark.parametrize("library", ["torchvision", "transformers", "timm", "detectron2"])
def test_a_frozen_look_alike_is_recognised_and_needs_nothing(library):
    model = lookalikes()[library]
    before = [type(module) for module in model.modules()]
    report = freeze(model, "eval+affine")
    assert report.layers
    for row in report.layers:
        assert row.actions == ()
        assert "frozen already" in row.note
        assert row.policy == "frozen"
    assert [type(module) for module in model.modules()] == before
    for layer in inspect(model).layers:
        assert layer.normalizes_with == "running"
        assert not layer.updates_statistics
        assert not layer.trains_affine
        assert layer.num_features == 4


def test_a_look_alike_whose_weight_is_a_parameter_can_have_it_frozen():
    class MyFrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
            self.register_buffer("running_mean", torch.zeros(2))
            self.register_buffer("running_var", torch.ones(2))

    model = nn.Sequential(MyFrozenBatchNorm2d())
    assert inspect(model).layers[0].trains_affine
    freeze(model, "eval+affine")
    assert not model[0].weight.requires_grad
    unfreeze(model)
    assert model[0].weight.requires_grad


def test_a_name_alone_makes_no_look_alike():
    class FrozenBatchNormConfig(nn.Module):
        pass

    assert inspect(nn.Sequential(FrozenBatchNormConfig())).layers == ()


# What wraps a model.


def test_patterns_match_through_wrappers(model, images):
    compiled = torch.compile(DataParallel(model), backend="eager")
    report = freeze(compiled, {"stem": "eval", "_orig_mod.module.head": "affine"})
    rows = {row.name: row.policy for row in report.layers}
    assert rows["_orig_mod.module.stem.1"] == "eval"
    assert rows["_orig_mod.module.head.2"] == "affine"
    assert rows["_orig_mod.module.backbone.0.1"] == "none"
    before = state(model)
    compiled.train()(images)
    changed = statistics(moved(before, model))
    assert {name.split(".")[0] for name in changed} == {"backbone", "head"}


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_frozen_before_ddp_trains_and_stays_frozen(model, images, one_rank):
    freeze(model, {"backbone": "eval+affine"})
    wrapped = DistributedDataParallel(model)
    before = state(model)
    optimizer = step(wrapped, images)
    step(wrapped, images, optimizer)
    held = {"backbone.0.1", "backbone.1.1"}
    assert not {n for n in moved(before, model) if n.rpartition(".")[0] in held}
    assert "head.1.weight" in moved(before, model)


def test_after_ddp_statistics_can_be_frozen_and_weights_are_refused(model, images, one_rank):
    wrapped = DistributedDataParallel(model)
    with pytest.raises(PolicyError, match="Freeze first, then wrap"):
        freeze(wrapped, "eval+affine")
    assert model.stem[1].weight.requires_grad
    freeze(wrapped, {"backbone": "eval"})
    before = state(model)
    optimizer = step(wrapped, images)
    step(wrapped, images, optimizer)
    assert not {n for n in statistics(moved(before, model)) if n.startswith("backbone")}
    freeze(wrapped, {"backbone": "eval"})
    unfreeze(wrapped)


def test_a_module_inside_ddp_is_refused_as_its_wrapper_is(model, images, one_rank):
    wrapped = DistributedDataParallel(model)
    for part, dry_run in ((wrapped.module, False), (model.backbone, True)):
        with pytest.raises(PolicyError, match="Freeze first, then wrap"):
            freeze(part, "eval+affine", dry_run=dry_run)
    assert model.stem[1].weight.requires_grad
    freeze(model, "eval")  # freezes no parameter, so the wrapper waits for none
    unfreeze(model)
    del wrapped
    freeze(model, "eval+affine")
    wrapped = DistributedDataParallel(model)
    model.requires_grad_(True)
    freeze(model, "eval+affine")  # the wrapper does not wait for what was frozen when it was built
    with pytest.raises(PolicyError, match="would not average"):
        freeze(model, "eval")
    step(wrapped, images)
    unfreeze(model)  # the way to wrap again
    assert model.stem[1].weight.requires_grad


def test_after_ddp_that_finds_unused_parameters_weights_can_be_frozen(model, images, one_rank):
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    freeze(wrapped, "eval+affine")
    before = state(model)
    optimizer = step(wrapped, images)
    step(wrapped, images, optimizer)
    assert "stem.1.weight" not in moved(before, model)
    assert "stem.0.weight" in moved(before, model)


def test_under_ddp_nothing_trains_again_that_it_would_not_average(model, images, one_rank):
    freeze(model, {"backbone": "eval+affine", "head": "eval"})
    wrapped = DistributedDataParallel(model)
    says = r"backbone\.0\.1: its weight and bias cannot train again.*unfreeze\(ddp\.module\)"
    for change in (unfreeze, lambda model: freeze(model, "eval")):
        with pytest.raises(PolicyError, match=says):
            change(wrapped)
        assert not model.backbone[0][1].weight.requires_grad
        assert not model.train().head[2].training
    freeze(wrapped, {"backbone": "stats+affine"})
    unfreeze(wrapped, "head")
    assert model.train().head[2].training
    unfreeze(wrapped.module)
    again = DistributedDataParallel(model, find_unused_parameters=True)
    freeze(again, "fused")
    step(again, images)
    unfreeze(again)  # it has known them from the start
    before = state(model)
    step(again, images)
    assert moved(before, model) == set(before)


@pytest.mark.parametrize("policy", ["stats", "affine", "eval"])
def test_traced_by_fx_the_layer_is_a_leaf_as_before(model, images, policy):
    freeze(model, policy)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"][:3] == [
        "stem.0",
        "stem.1",
        "stem.2",
    ]
    before = statistics(state(model)) if policy != "affine" else set()
    kept = state(model)
    graph.train()(images)
    assert not before & moved(kept, model)


def test_scripted_after_freezing_the_copy_is_in_eval_as_long_as_nobody_asks_otherwise(
    model, images
):
    freeze(model.train(), "eval+affine")
    scripted = torch.jit.script(model)
    before = state(model)
    assert torch.equal(scripted(images), model(images))
    assert moved(before, model) == set()


@pytest.mark.parametrize(
    ("layer", "policy"),
    [
        (nn.InstanceNorm2d(3, track_running_stats=True), "eval"),
        (nn.SyncBatchNorm(3), "stats"),
        (nn.BatchNorm2d(3), "fused"),
    ],
)
def test_a_layer_that_cannot_be_scripted_says_what_to_do_instead(layer, policy):
    model = nn.Sequential(layer)
    freeze(model, policy)
    with pytest.raises(
        PolicyError, match=r"cannot be compiled by torch\.jit\.script\. Use torch\."
    ):
        torch.jit.script(model)
    assert model[0] is layer


def test_under_stats_a_scripted_copy_keeps_the_statistics_too(model, images):
    freeze(model, "stats")
    scripted, before = torch.jit.script(model), state(model)
    assert torch.equal(scripted.train()(images), model.train()(images))
    assert torch.equal(scripted.eval()(images), model.eval()(images))
    assert moved(before, scripted) == moved(before, model) == set()


def test_a_scripted_model_is_refused_and_a_scripted_layer_can_be_left_out(model):
    scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match=r"freeze the original nn\.Module"):
        freeze(scripted)
    mixed = nn.ModuleDict({"a": model.stem, "b": torch.jit.script(copy.deepcopy(model.head))})
    with pytest.raises(PolicyError, match=r"b\.2 is a TorchScript module.*'none'"):
        freeze(mixed)
    freeze(mixed, {"": "eval", "b": "none"})
    assert not mixed["a"].train()[1].training


@pytest.mark.parametrize("policy", ["eval", "fused"])
def test_a_class_changed_by_something_else_is_refused(model, policy):
    freeze(model, policy)
    nn.utils.parametrize.register_parametrization(model.stem[1], "weight", nn.Identity())
    for function in (freeze, unfreeze):
        with pytest.raises(PolicyError, match="something else changed its class"):
            function(model)
    nn.utils.parametrize.remove_parametrizations(model.stem[1], "weight")
    unfreeze(model)
    assert type(model.stem[1]) is nn.BatchNorm2d


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def by_a_parametrization(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def by_pruning(layer):
    prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("compute", [by_a_parametrization, by_pruning])
@pytest.mark.parametrize("policy", ["affine", "eval+affine", "fused", "fused-act"])
def test_a_weight_computed_from_others_is_frozen_with_them_or_not_at_all(
    model, images, compute, policy
):
    compute(model.stem[1])
    with pytest.raises(
        PolicyError, match=r"stem.1: its weight is computed from other param.*\+wei"
    ):
        freeze(model, policy)
    assert model.head[2].training
    freeze(model, f"{policy}+weights")
    before = state(model)
    step(model, images)
    assert not {n for n in moved(before, model) - statistics(before) if n.startswith("stem.1")}
    freeze(model, "eval")
    assert inspect(model).layers[0].trains_affine
    before = state(model)
    step(model, images)
    assert {n for n in moved(before, model) if n.startswith("stem.1.") and "weight" in n}


@pytest.mark.parametrize("compute", [by_a_parametrization, by_pruning])
def test_inspect_sees_that_a_computed_weight_trains(model, compute):
    compute(model.stem[1])
    model.stem[1].bias.requires_grad_(False)
    assert inspect(model).layers[0].trains_affine
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    assert not inspect(model, optimizer=optimizer).layers[0].trains_affine


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "resnet18d"])
def test_timm_models_keep_their_activations(name):
    model = timm.create_model(name, pretrained=False)
    x = torch.randn(2, 3, 64, 64)
    model.train()(x)
    reference = copy.deepcopy(model).eval()(x)
    freeze(model, "eval")
    assert torch.equal(model.eval()(x), reference)


def test_the_feature_extractor_of_torchvision_sees_the_frozen_layers():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision.models.resnet18()
    freeze(model, "eval")
    features = create_feature_extractor(model, {"layer4": "out"})
    before = state(features)
    features.train()(torch.randn(2, 3, 32, 32))
    assert moved(before, features) == set()


@pytest.mark.parametrize("policy", ["stats", "eval+affine", "fused", "weights"])
def test_a_lazy_layer_that_was_loaded_before_its_first_forward(policy):
    def made():
        return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())

    images, saved, model = torch.randn(4, 3, 8, 8), made(), made()
    saved(images)
    model.load_state_dict(saved.state_dict())
    # Its first forward would change its class, and undo the freeze.
    with pytest.raises(PolicyError, match="run one forward pass first, in eval mode"):
        freeze(model, policy)
    model.eval()(images)
    freeze(model, policy)
    assert torch.equal(model[1].running_mean, saved[1].running_mean)
