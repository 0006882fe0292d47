"""The policy `fused-act`: what is fused, what is not and why, and that nothing else changes."""

import copy
import gc
import operator
import pickle
import weakref

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from bnfreeze import PolicyError, freeze, unfreeze
from bnfreeze.nn import functional, modules
from tests.fusion.fusions import fused, lively, same_as_fused
from tests.helpers import copied, moved, state

C = 4


class Block(nn.Module):
    """A block to be given a forward: two convolutions, their norm layers, and a branch."""

    def __init__(self, act=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.act = act or nn.ReLU(inplace=True)
        self.branch = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))


def block(forward, act=None, **attributes):
    """A block with this forward, in a class of its own."""
    kind = type("Own", (Block,), {"forward": forward, "__module__": __name__})
    model = lively(kind(act))
    model.__dict__.update(attributes)
    return model


def residual(self, x):
    out = self.act(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += self.branch(x)
    return self.act(out)


class Residual(Block):
    forward = residual


def fuse(model, policy="fused-act"):
    """What is fused where the classes of this file may be traced."""
    return {name: fuses for name, fuses in fused(freeze_here(model, policy)).items() if fuses}


def freeze_here(model, policy="fused-act"):
    return freeze(model, policy, traceable=[__name__])


def alike(model, x):
    """Whether the policy changes nothing against `fused`: output, gradients."""
    return same_as_fused(copy.deepcopy(model), (x,), [__name__])


def note(model, name="bn1"):
    """Why a layer fuses nothing."""
    report = freeze_here(model)
    (row,) = (row for row in report.layers if row.name == name)
    assert (row.policy, fused(report)[name]) == ("fused-act", "")
    return row.note


@pytest.fixture
def x():
    return torch.randn(2, C, 5, 5)


@pytest.fixture
def model():
    return lively(nn.Sequential(Residual(), nn.BatchNorm2d(C), nn.ReLU(), Residual()))


# What the frozen layers of `model` compute, as `calls` writes it.
ALL = ["relu", "*relu", "relu", "relu", "*relu"]


@pytest.fixture
def calls(monkeypatch):
    """What the frozen layers compute, a line each: "+" for a residual, "*" for a branch."""
    seen, real = [], functional._apply

    def spy(x, norm, residual, branch, activation):
        sign = "" if residual is None else "+" if branch is None else "*"
        seen.append(sign + (activation or ""))
        return real(x, norm, residual, branch, activation)

    monkeypatch.setattr(functional, "_apply", spy)
    monkeypatch.setattr(modules, "_apply", spy)
    return seen


# What is fused.

ACTIVATIONS = {
    "nn.ReLU in place": (nn.ReLU(inplace=True), lambda self, z: self.act(z), "relu"),
    "nn.ReLU6": (nn.ReLU6(), lambda self, z: self.act(z), "relu6"),
    "nn.SiLU": (nn.SiLU(inplace=True), lambda self, z: self.act(z), "silu"),
    "nn.Hardswish": (nn.Hardswish(), lambda self, z: self.act(z), "hardswish"),
    "F.relu in place": (None, lambda self, z: F.relu(z, inplace=True), "relu"),
    "F.relu positional": (None, lambda self, z: F.relu(z, True), "relu"),
    "torch.relu_": (None, lambda self, z: torch.relu_(z), "relu"),
    "the method": (None, lambda self, z: z.relu(), "relu"),
    "F.relu6": (None, lambda self, z: F.relu6(z), "relu6"),
    "F.silu": (None, lambda self, z: F.silu(z, inplace=True), "silu"),
    "F.hardswish": (None, lambda self, z: F.hardswish(z), "hardswish"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_form_of_an_activation_is_fused(name, x, calls):
    act, apply, fuses = ACTIVATIONS[name]
    model = block(lambda self, x: self.conv2(apply(self, self.bn1(self.conv1(x)))), act)
    assert alike(model, x)
    del calls[:]
    assert fuse(model) == {"bn1": fuses}
    model(x)
    assert calls == [fuses]


SUMS = {
    "norm + x": lambda x, z: z + x,
    "x + norm": lambda x, z: x + z,
    "norm += x": lambda x, z: operator.iadd(z, x),
    "torch.add": lambda x, z: torch.add(x, z),
    "add": lambda x, z: z.add(x),
    "add_": lambda x, z: z.add_(x),
}


@pytest.mark.parametrize("activation", ["", "relu", "silu"])
@pytest.mark.parametrize("name", SUMS)
def test_every_form_of_a_sum_is_fused_with_the_activation_after_it(name, activation, x, calls):
    act = getattr(F, activation) if activation else lambda z: z
    model = block(lambda self, x: self.conv2(act(SUMS[name](x, self.bn1(self.conv1(x))))))
    assert alike(model, x)
    del calls[:]
    assert fuse(model) == {"bn1": "add" + (f"+{activation}" if activation else "")}
    model(x)
    assert calls == ["+" + activation]


def test_a_branch_that_ends_in_a_norm_layer_runs_in_the_same_kernel(x, calls):
    model = block(residual)
    assert alike(model, x)
    del calls[:]
    # The one activation module is used twice.
    assert fuse(model) == {"bn1": "relu", "bn2": "affine+add+relu", "branch.1": "fused"}
    model(x)
    assert calls == ["relu", "*relu"]


def test_what_follows_is_found_outside_of_the_modules_that_contain_the_norm_layer(x, calls):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Identity())
            self.body = nn.Sequential(nn.Conv2d(C, C, 1), inner)

        def forward(self, x):
            return F.relu6(x + self.body(x), inplace=True)

    model = nn.Sequential(lively(Outer()))
    assert alike(model, x)
    del calls[:]
    assert fuse(model) == {"0.body.1.1": "add+relu6"}
    model(x)
    assert calls == ["+relu6"]
    # The block around the sum is changed, and what is around that.
    assert type(model).__name__ == "Sequential"
    assert type(model[0]).__name__ == "Outer"
    assert type(model[0].body) is nn.Sequential


@pytest.mark.parametrize("drop", [StochasticDepth(0.5, "row"), timm.layers.DropPath(0.5)])
def test_a_sum_behind_a_module_that_drops_is_fused_in_eval_mode_only(drop, x, calls):
    model = block(lambda self, x: F.relu(self.act(self.bn1(self.conv1(x))) + x), drop)
    assert alike(model, x)
    del calls[:]
    report = freeze_here(model)
    assert fused(report)["bn1"] == "add+relu"
    assert "not in train mode" in report.layers[0].note
    model.train()(x)
    model.eval()(x)
    model.act.train()(x)
    model(x)
    assert calls == ["", "+relu", ""]


def test_each_mode_has_its_own_forward(x, calls):
    def forward(self, x):
        z = self.bn1(self.conv1(x))
        return F.relu(z) if self.training else torch.tanh(z)

    model = block(forward)
    report = freeze_here(model)
    assert fused(report)["bn1"] == "relu"
    assert report.layers[0].note == "not in eval mode: tanh follows"
    model.train()(x)
    model.eval()(x)
    assert calls == ["relu", ""]
    assert alike(block(lambda self, x: F.dropout(F.relu(self.bn1(x)), 0.5, self.training)), x)


# Whose forward is traced.


def test_a_forward_of_ones_own_is_traced_only_if_its_class_is_named(model, x, calls):
    report = freeze(model, "fused-act")
    notes = {row.name: row.note for row in report.layers}
    assert {name for name, fuses in fused(report).items() if fuses} == {"1"}
    assert notes["0.bn1"].endswith("traceable=(Residual,)")
    model(x)
    assert calls == ["", "", "", "relu", "", "", ""]
    for named in (Residual, [Residual], __name__, "tests"):
        assert fused(freeze(model, "fused-act", traceable=named))["0.bn2"] == "affine+add+relu"
    for other in (Block, "test", "tests.fusion.other"):
        assert not fused(freeze(model, "fused-act", traceable=[other]))["0.bn2"]
    before = state(model)
    with pytest.raises(TypeError, match="3 is neither"):
        freeze(model, "eval", traceable=[3])
    assert not moved(before, model)


def test_a_subclass_with_the_forward_of_a_known_library_is_traced(x):
    class Mine(nn.Sequential):
        pass

    assert fused(freeze(Mine(nn.BatchNorm2d(C), nn.ReLU()), "fused-act")) == {"0": "relu"}
    graph = torch.fx.symbolic_trace(Mine(nn.BatchNorm2d(C), nn.ReLU()))
    assert fused(freeze(graph, "fused-act")) == {"0": ""}


def test_what_may_be_traced_is_remembered_by_copies_and_after_a_partial_unfreeze(model, x, calls):
    freeze_here(model)
    rows = fused(unfreeze(pickle.loads(pickle.dumps(copy.deepcopy(model))), "0.bn2"))
    assert (rows["0.bn1"], rows["0.bn2"], rows["3.bn2"]) == ("relu", "", "affine+add+relu")
    assert fused(freeze(model, {"1": "fused-act"}))["3.bn2"] == "affine+add+relu"


# What is not fused, and why.


def no_grad(self, x):
    with torch.no_grad():
        out = self.bn1(self.conv1(x))
    return F.relu(out)


def changed_meanwhile(self, x):
    kept = F.relu(x)
    z = self.bn1(kept)
    kept.mul_(2)
    return z + kept


def counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return F.relu(self.bn1(x))


def collects(self, x):
    self.seen.append(1)
    return F.relu(self.bn1(x))


Mine = type("Mine", (nn.ReLU,), {})
REFUSED = {
    "another activation": (lambda self, x: F.gelu(self.bn1(x)), "gelu follows"),
    "a subclass of an activation": (lambda self, x: self.act(self.bn1(x)), "Mine follows"),
    "the output is used elsewhere": (
        lambda self, x: (z := self.bn1(x)) * F.relu(z),
        "its output is used elsewhere too",
    ),
    "added to itself": (lambda self, x: [z := self.bn1(x), z + z][1], "added to itself"),
    "a scaled sum": (lambda self, x: torch.add(self.bn1(x), x, alpha=2), "no tensor, or is scaled"),
    "a number is added": (lambda self, x: self.bn1(x) + 1, "no tensor, or is scaled"),
    "in place onto another": (lambda self, x: (x * 2).add_(self.bn1(x)), "in place onto another"),
    "its input changes meanwhile": (changed_meanwhile, "may be changed"),
    "shapes decide": (
        lambda self, x: F.relu(self.bn1(x)) if x.shape[0] > 1 else x,
        "depends on the values or shapes",
    ),
    "a loop over a tensor": (
        lambda self, x: F.relu(self.bn1(torch.stack(list(x)))),
        "loops over a value",
    ),
    "an intermediate's type": (
        lambda self, x: F.relu(z if isinstance(z := self.bn1(x), torch.Tensor) else z[0]),
        "asks for the type of an intermediate",
    ),
    "silu's input may change before backward": (
        lambda self, x: F.silu(self.bn1(x)),
        "its input, from which silu goes backward, may be changed",
    ),
    "relu6's output may change before backward": (
        lambda self, x: F.relu6(self.bn1(x)),
        "the output of relu6, kept for backward, may be changed",
    ),
    "an autograd mode": (no_grad, "an autograd or autocast mode of its own"),
    "random numbers": (lambda self, x: F.relu(self.bn1(x + torch.rand(1))), "computes tensors"),
    "a tensor of its own": (lambda self, x: F.relu(self.bn1(x)) + self.kept[0], "not regi"),
    "activation checkpointing": (
        lambda self, x: checkpoint(lambda z: F.relu(self.bn1(z)), x, use_reentrant=False),
        "cannot be traced",
    ),
    "it sets an attribute": (counts, "changes its own attributes"),
    "it fills a list": (collects, "changes its own attributes"),
    "its output is no plain container": (
        lambda self, x: torch.return_types.max([F.relu(self.bn1(x)), x]),
        "it returns a max",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_be_fused_runs_as_before_and_the_report_says_why(name, x, calls):
    forward, why = REFUSED[name]
    model = block(forward, Mine(), seen=[], kept=[torch.ones(1)])
    model.requires_grad_(False)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    count = len(model.seen)
    assert why in note(model)
    assert len(model.seen) == count
    assert "calls" not in vars(model)
    results = []
    for each in (model, twin):
        torch.manual_seed(0)
        results.append(each(x.clone()))
    assert all(map(torch.equal, *([r] if torch.is_tensor(r) else r for r in results)))
    assert set(calls) <= {""}


def test_a_module_with_a_hook_is_called_as_before(x):
    expected = {
        "act": {"bn2": "affine+add", "branch.1": "fused"},
        "bn1": {"bn2": "affine+add+relu", "branch.1": "fused"},
        "branch": {"bn1": "relu", "bn2": "add+relu"},
        "branch.1": {"bn1": "relu", "bn2": "add+relu"},
        "conv1": {"bn1": "relu", "bn2": "affine+add+relu", "branch.1": "fused"},
    }
    for name, fuses in expected.items():
        for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
            model = block(residual)
            getattr(model.get_submodule(name), f"register_{register}")(lambda *_: None)
            assert fuse(model) == fuses
    model = block(residual)
    model.act.forward = torch.tanh
    assert fuse(model) == {"bn2": "affine+add", "branch.1": "fused"}


# When the block's own forward runs: the same happens as with `fused`, and nothing is fused.


def hook(module):
    module.register_forward_hook(lambda module, args, out: out + 1)


LATER = {
    "a hook on a norm layer": lambda m: hook(m.bn2),
    "a hook on an activation": lambda m: hook(m.act),
    "a hook on the branch": lambda m: hook(m.branch),
    "a hook inside the branch": lambda m: hook(m.branch[1]),
    "a convolution is not one any more": lambda m: m.branch[0].__setattr__(
        "__class__", nn.Identity
    ),
    "a forward on an instance": lambda m: m.act.__dict__.update(forward=torch.tanh),
    "another activation": lambda m: setattr(m, "act", nn.Tanh()),
    "another child of the branch": lambda m: m.branch.__setitem__(1, nn.Identity()),
    "one more child of the branch": lambda m: m.branch.append(nn.Tanh()),
    "a flag": lambda m: setattr(m, "wide", True),
    "a number": lambda m: setattr(m, "scale", 3.0),
    "the bounds of a ReLU6": lambda m: setattr(m.act6, "max_val", 0.1),
    "the rate of a module that is not called": lambda m: setattr(m.drop, "p", 1.0),
    "the class's forward": lambda m: setattr(type(m), "forward", lambda self, x: self.bn1(x)),
    "another mode inside": lambda m: m.branch.eval(),
}


def reads(self, x):
    out = self.act(self.bn2(self.conv2(x)) + self.branch(x))
    out = self.act6(self.bn1(self.conv1(out))) * self.scale
    return F.dropout(torch.tanh(out) if self.wide else out, self.drop.p, self.training)


@pytest.mark.parametrize("name", LATER)
def test_a_later_change_takes_effect(name, x, calls):
    model = block(reads, nn.ReLU6(inplace=True), wide=False, scale=1.0)
    model.act6, model.drop = nn.ReLU6(inplace=True), nn.Dropout(0.0)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    assert fuse(model) == {"bn1": "relu6", "bn2": "affine+add+relu6", "branch.1": "fused"}
    assert torch.equal(model(x), twin(x))
    assert calls[:2] == ["*relu6", "relu6"]
    del calls[:]
    for each in (twin,) if "class" in name else (model, twin):
        LATER[name](each)
    assert torch.equal(model(x), twin(x))
    assert set(calls) == {""}


def test_where_a_blocks_forward_may_not_run_those_of_the_blocks_inside_do(model, x, calls):
    fuse(model)
    model(x)
    assert calls == ALL == ["relu", "*relu", "relu", "relu", "*relu"]
    del calls[:]
    model[2].register_forward_hook(lambda *_: None)
    model(x)
    assert calls == ["relu", "*relu", "", "relu", "*relu"]


def test_a_hook_that_is_put_on_later_sees_what_it_always_saw(x):
    model = block(residual)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    fuse(model)
    for where in ("act", "bn1", "branch", "branch.0", ""):
        seen = {model: [], twin: []}
        for each, into in seen.items():
            handle = each.get_submodule(where).register_forward_hook(
                lambda m, args, out, into=into: into.append((args[0].clone(), out.clone()))
            )
            each(x)
            handle.remove()
        assert len(seen[model]) == len(seen[twin]) > 0
        for mine, theirs in zip(*seen.values(), strict=True):
            assert all(map(torch.equal, mine, theirs))


def test_a_hook_on_the_block_itself_or_on_all_modules_runs(x, calls):
    model, seen = block(residual), []
    model.register_forward_hook(lambda module, args, out: seen.append(module))
    fuse(model)
    model(x)
    assert (seen, calls) == ([model], ["relu", "*relu"])
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, out: seen.append(module))
    model(x)
    handle.remove()
    assert seen.count(model.act) == 2


def test_other_arguments_than_those_that_were_traced_take_the_blocks_own_forward(x, calls):
    class Optional(Block):
        def forward(self, x, skip=None):
            x = x if isinstance(x, torch.Tensor) else torch.cat(x)
            z = F.relu(self.bn1(x))
            return z if skip is None else z + skip

    model = lively(Optional())
    twin = copy.deepcopy(model)
    fuse(model)
    freeze(twin, "fused")
    for args, kwargs, fuses in [
        ((x,), {}, "relu"),
        (([x, x],), {}, ""),
        (((x, x),), {}, ""),
        ((x, x), {}, ""),
        ((x,), {"skip": x}, ""),
        ((nn.Parameter(x),), {}, ""),
    ]:
        expected = twin(*args, **kwargs)
        del calls[:]
        assert torch.equal(model(*args, **kwargs), expected)
        assert calls == [fuses]


def test_a_summand_that_must_be_broadcast_or_promoted_is_added_as_before(x, calls):
    class Two(Block):
        def forward(self, x, other):
            other = other[0]
            return F.relu(self.bn1(x) + other)

    model = lively(Two())
    twin = copy.deepcopy(model)
    fuse(model)
    freeze(twin, "fused")
    for other in (torch.randn(1, C, 1, 1), x.double(), torch.tensor(2.0), 3, x):
        expected, out = twin(x, [other]), model(x, [other])
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)
    assert [call for call in calls if call] == ["+relu"]


# Values and gradients.


def test_writing_in_place_is_still_writing_in_place(x):
    def forward(self, x, mask):
        kept = x
        kept += 1
        mask &= x > 0
        x[:, :2] += 1
        count = x.shape[0]
        more = count
        more += 1
        left, right = F.relu(self.bn1(kept)).chunk(2, dim=1)
        return torch.cat([left, right], 1) * mask * count / more

    model = block(forward)
    twin = copy.deepcopy(model).eval()
    assert fuse(model) == {"bn1": "relu"}
    mine, theirs = ((x.clone(), torch.ones(x.shape, dtype=torch.bool)) for _ in range(2))
    assert torch.equal(model.eval()(*mine), twin(*theirs))
    assert all(map(torch.equal, mine, theirs))
    assert not torch.equal(mine[0], x)


def test_a_tensor_that_is_changed_in_place_later_does_not_break_the_backward_pass(x):
    def forward(self, x):
        x = self.conv1(x)
        y = F.relu6(self.bn1(x)) + F.silu(self.bn2(x))
        z = F.relu6(self.branch(y))
        z *= 2
        x += z
        return x

    assert alike(block(forward), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_in_half_precision_the_add_is_not_fused(dtype, x, calls):
    model = block(residual).to(dtype)
    assert alike(model, x.to(dtype))
    del calls[:]
    fuse(model)
    model(x.to(dtype))
    assert calls == ["relu", "", ""]


# In place, by identity.


def description(model):
    return [
        (name, type(m), m.training, {k for k in vars(m) if k.startswith("_bnfreeze")})
        for name, m in model.named_modules()
    ] + [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]


def test_blocks_stay_the_same_objects_and_unfreeze_restores_them_exactly(model, x):
    before, objects = description(model), list(model.modules())
    values, keys = state(model), list(model.state_dict())
    expected = copy.deepcopy(model).eval()(x)
    first = fuse(model)
    frozen = description(model)
    assert list(map(id, model.modules())) == list(map(id, objects))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], Residual)
    assert torch.equal(model.train()(x), expected)
    assert fuse(model) == first
    assert description(model) == frozen
    unfreeze(model)
    assert description(model) == before
    assert moved(values, model) == set()


@pytest.mark.parametrize("policy", ["eval", "fused", "stats", "fused-act+weights"])
def test_from_one_policy_to_another_and_back(model, policy):
    before = description(model)
    first = fuse(copy.deepcopy(model))
    freeze(model, policy)
    other = description(model)
    assert fuse(model) == first
    freeze(model, policy)
    assert description(model) == other
    unfreeze(model)
    assert description(model) == before


def test_only_what_is_selected_is_changed_or_fuses(model, x):
    rules = {"0": "fused-act", "0.branch": "none", "3": "fused-act", "3.bn2": "eval"}
    assert fuse(model, rules) == {"0.bn1": "relu", "0.bn2": "add+relu", "3.bn1": "relu"}
    assert type(model[1]) is type(model[0].branch[1]) is nn.BatchNorm2d
    before = state(model)
    model.train()(x)
    assert {n for n in moved(before, model) if "num" in n} == {
        "0.branch.1.num_batches_tracked",
        "1.num_batches_tracked",
    }


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_fuses_too_and_is_independent(model, x, how, calls):
    before = [type(module) for module in model.modules()]
    fuse(model)
    expected = model(x)
    twin = copied(model, how)
    del calls[:]
    assert torch.equal(twin(x), expected)
    assert calls == ALL
    with torch.no_grad():
        twin[0].bn1.weight.zero_()
    assert torch.equal(model(x), expected)
    unfreeze(model)
    del calls[:]
    twin(x)
    assert calls == ALL
    unfreeze(twin)
    assert [type(module) for module in twin.modules()] == before


def test_a_frozen_model_is_freed_as_soon_as_nobody_has_it(x):
    model = nn.Sequential(Residual(), nn.BatchNorm2d(C), nn.ReLU())
    fuse(model)
    model(x)
    kept = [weakref.ref(module) for module in model.modules()]
    gc.collect()  # of what the trace has left
    gc.disable()
    try:
        del model
        assert not any(each() for each in kept)
    finally:
        gc.enable()


def test_an_error_leaves_nothing_half_changed(model, monkeypatch):
    from bnfreeze.fusion import blocks

    def fail(base, behaviour):
        raise RuntimeError("half-way")

    freeze(model, "fused")
    before = description(model)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "make_class", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            freeze_here(model)
    assert description(model) == before
    fuse(model)
    fusing = description(model)
    with pytest.raises(PolicyError):
        freeze(model, {"0": "eval", "nothing": "eval"})
    assert description(model) == fusing


def test_a_class_that_lists_its_subclasses_sees_none_of_ours(x):
    listed = []

    class Base(Block):
        def __init_subclass__(cls, **kwargs):
            listed.append(cls)

        def forward(self, x):
            return F.relu(self.bn1(x))

    model = lively(Base())
    assert fuse(model) == {"bn1": "relu"}
    model(x)
    assert not listed


# timm's layer with an activation inside.


def timms(act, drop=None, **options):
    norm = timm.layers.BatchNormAct2d(C, act_layer=act, drop_layer=drop, **options)
    return lively(nn.Sequential(nn.Conv2d(C, C, 1), norm))


@pytest.mark.parametrize(
    ("act", "fuses"),
    [(nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.SiLU, "silu"), (nn.Hardswish, "hardswish")],
)
def test_timms_layer_becomes_one_layer_with_its_activation(act, fuses, x, calls):
    model = timms(act)
    kind, expected = type(model[1]), copy.deepcopy(model).eval()(x)
    report = freeze(model, "fused-act")
    assert fused(report) == {"1": fuses}
    assert torch.equal(model.train()(x), expected)
    assert calls == [fuses]
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    handle = model[1].act.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(model(x), expected + 1)
    handle.remove()
    unfreeze(model)
    assert type(model[1]) is kind
    assert torch.equal(model.eval()(x), expected)


def test_timms_layer_keeps_its_own_forward_where_it_does_more():
    for model in (timms(nn.GELU), timms(nn.ReLU, nn.Dropout2d)):
        report = freeze(model, "fused-act")
        assert (report.layers[0].policy, fused(report)) == ("eval+affine", {"1": ""})


def test_timms_layer_without_an_activation_fuses_what_follows(x, calls):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timms(nn.ReLU, apply_act=False)

        def forward(self, x):
            return F.silu(self.body(x) + x)

    model = lively(Around())
    expected = copy.deepcopy(model).eval()(x)
    assert fuse(model) == {"body.1": "add+silu"}
    assert torch.equal(model(x), expected)
    assert calls == ["+silu"]
    model.body[1].act = nn.ReLU()
    assert not torch.equal(model(x), expected)
    assert calls == ["+silu", "relu"]


class Halves(nn.Module):
    """Reads its own flag and its mode; has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.scale, self.double = nn.Parameter(torch.ones(1)), False

    def forward(self, x):
        x = F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training) * self.scale
        return x * 2 if self.double else x


@pytest.mark.parametrize("policy", ["fused-act", "fused-act+weights", "folded+weights"])
def test_flags_and_modes_below_a_module_with_frozen_weights_count(policy, x):
    model = lively(nn.Sequential(Halves(), nn.Flatten())).eval()
    freeze_here(model, policy)
    expected = model(x)
    model[0].double = True
    torch.testing.assert_close(model(x), 2 * expected)
    model[0].double = False
    model.train()
    model[0].eval()
    torch.testing.assert_close(model(x), expected)


class Fixing(Block):
    def forward(self, x):
        with torch.no_grad():
            fixed = self.branch(x)
        return F.relu(self.bn1(self.conv1(x)) + fixed)


def test_a_loaded_model_waits_for_hooks_to_go_and_traces_as_in_training(x):
    model = lively(Fixing())
    freeze_here(model)
    with torch.no_grad():
        loaded = pickle.loads(pickle.dumps(model))
        hook = loaded.conv1.register_forward_hook(lambda *_: None)
        loaded(x)
        hook.remove()
        loaded(x)
    for each in (model, loaded):
        each(x).sum().backward()
        assert each.conv1.weight.grad is not None
        assert each.branch[0].weight.grad is None


@pytest.mark.parametrize("policy", ["fused-act", "folded"])
def test_the_left_side_of_a_sum_decides_on_its_layout(policy, x):
    models = [
        block(lambda self, x: x.transpose(2, 3) + self.bn1(self.conv1(x))),
        block(lambda self, x: self.bn1(self.conv1(x)) + x.transpose(2, 3)),
    ]
    layouts = []
    for model in models:
        expected = model.eval()(x)
        freeze_here(model, policy)
        torch.testing.assert_close(model(x), expected)
        assert model(x).stride() == expected.stride()
        layouts.append(expected.stride())
    assert layouts[0] != layouts[1]
