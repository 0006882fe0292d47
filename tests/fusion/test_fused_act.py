"""The policy `fused-act`: what is absorbed, what is not and why, and that nothing else changes."""

import copy
import enum
import gc
import math
import operator
import pickle
import random
import re
import weakref

import pytest
import timm
import torch
import torch.utils.checkpoint
import torch.utils.dlpack
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torchvision.ops import StochasticDepth

from bnfreeze import PolicyError, freeze, guard, unfreeze
from bnfreeze.nn import functional, modules
from tests.fusion.fusions import lively, same_as_fused
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
    """A block with this forward; a class of its own, so that it can be found and pickled."""
    kind = type("Own", (Block,), {"forward": forward, "__module__": __name__})
    model = lively(kind(act))
    model.__dict__.update(attributes)
    return model


@pytest.fixture
def x():
    return torch.randn(2, C, 5, 5)


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


def absorbed(report):
    return {row.name: row.absorbs for row in report.layers if row.absorbs}


def notes(report):
    return {row.name: row.note for row in report.layers}


ACTIVATIONS = {
    "nn.ReLU": (nn.ReLU(), lambda self, z: self.act(z), "relu"),
    "nn.ReLU in place": (nn.ReLU(inplace=True), lambda self, z: self.act(z), "relu"),
    "nn.ReLU6": (nn.ReLU6(), lambda self, z: self.act(z), "relu6"),
    "nn.SiLU": (nn.SiLU(inplace=True), lambda self, z: self.act(z), "silu"),
    "nn.Hardswish": (nn.Hardswish(), lambda self, z: self.act(z), "hardswish"),
    "F.relu": (None, lambda self, z: F.relu(z), "relu"),
    "F.relu in place": (None, lambda self, z: F.relu(z, inplace=True), "relu"),
    "F.relu positional": (None, lambda self, z: F.relu(z, True), "relu"),
    "torch.relu": (None, lambda self, z: torch.relu(z), "relu"),
    "torch.relu_": (None, lambda self, z: torch.relu_(z), "relu"),
    "the method": (None, lambda self, z: z.relu(), "relu"),
    "the method in place": (None, lambda self, z: z.relu_(), "relu"),
    "F.relu6": (None, lambda self, z: F.relu6(z), "relu6"),
    "F.silu": (None, lambda self, z: F.silu(z, inplace=True), "silu"),
    "F.hardswish": (None, lambda self, z: F.hardswish(z), "hardswish"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_form_of_an_activation_is_absorbed(name, x, calls):
    act, apply, absorbs = ACTIVATIONS[name]
    model = block(lambda self, x: self.conv2(apply(self, self.bn1(self.conv1(x)))), act)
    assert same_as_fused(copy.deepcopy(model), (x,))
    del calls[:]
    report = freeze(model, "fused-act")
    assert absorbed(report) == {"bn1": absorbs}
    model(x)
    assert calls == [absorbs]


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
def test_every_form_of_a_sum_is_absorbed_with_what_follows_it(name, activation, x, calls):
    act = getattr(F, activation) if activation else lambda z: z
    total = SUMS[name]
    model = block(lambda self, x: self.conv2(act(total(x, self.bn1(self.conv1(x))))))
    assert same_as_fused(copy.deepcopy(model), (x,))
    del calls[:]
    report = freeze(model, "fused-act")
    assert absorbed(report) == {"bn1": "add" + (f"+{activation}" if activation else "")}
    model(x)
    assert calls == ["+" + activation]


def residual(self, x):
    out = self.act(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += self.branch(x)
    return self.act(out)


def test_a_branch_that_ends_in_a_norm_layer_meets_the_other_in_one_kernel(x, calls):
    model = block(residual)
    assert same_as_fused(copy.deepcopy(model), (x,))
    del calls[:]
    report = freeze(model, "fused-act")
    # The one activation module is used twice.
    assert absorbed(report) == {
        "bn1": "relu",
        "bn2": "affine+add+relu",
        "branch.1": "absorbed",
    }
    model(x)
    assert calls == ["relu", "*relu"]


def test_what_follows_is_found_across_modules_that_hold_the_norm_layer(x, calls):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            inner = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Identity())
            self.body = nn.Sequential(nn.Conv2d(C, C, 1), inner)

        def forward(self, x):
            return F.relu6(x + self.body(x), inplace=True)

    model = nn.Sequential(lively(Outer()))
    assert same_as_fused(copy.deepcopy(model), (x,))
    del calls[:]
    report = freeze(model, "fused-act")
    assert absorbed(report) == {"0.body.1.1": "add+relu6"}
    model(x)
    assert calls == ["+relu6"]
    assert type(model) is nn.Sequential  # only the block around the sum is changed
    assert type(model[0]).__name__ == "FusedOuter"
    assert type(model[0].body) is nn.Sequential


def test_several_sums_in_a_row_are_absorbed_each_by_its_own_layer(x, calls):
    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.branch(x) + self.bn2(self.conv2(x))

    model = block(forward)
    assert same_as_fused(copy.deepcopy(model), (x,))
    del calls[:]
    report = freeze(model, "fused-act")
    assert absorbed(report) == {"bn1": "affine+add", "branch.1": "absorbed", "bn2": "add"}
    model(x)
    assert calls == ["*", "+"]


@pytest.mark.parametrize("drop", [StochasticDepth(0.5, "row"), timm.layers.DropPath(0.5)])
def test_a_sum_behind_a_module_that_drops_is_absorbed_in_eval_mode_only(drop, x, calls):
    model = block(lambda self, x: F.relu(self.act(self.bn1(self.conv1(x))) + x), drop)
    assert same_as_fused(copy.deepcopy(model), (x,))
    del calls[:]
    report = freeze(model, "fused-act")
    assert absorbed(report) == {"bn1": "add+relu"}
    assert "in train mode" in notes(report)["bn1"]
    model.train()(x)
    model.eval()(x)
    assert calls == ["", "+relu"]


class Listens:
    """A hook that a module may carry along when it is copied."""

    def __call__(self, module, *args):
        return None


def hooked(name, register="register_forward_hook"):
    def make():
        model = block(residual)
        getattr(model.get_submodule(name), register)(Listens())
        return model

    return make


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
    self.__dict__.setdefault("seen", [])
    z = F.relu(self.bn1(x))
    self.seen.append(1)
    return z


def appends(self, x):
    self.seen.append(1)
    return F.relu(self.bn1(x))


def many(self, *xs):
    return F.relu(self.bn1(xs[0]))


REFUSED = {
    "another activation": (
        lambda: block(lambda self, x: F.gelu(self.bn1(x))),
        "gelu follows",
    ),
    "another activation module": (
        lambda: block(lambda self, x: self.act(self.bn1(x)), nn.LeakyReLU(0.1)),
        "LeakyReLU follows",
    ),
    "a subclass of an activation": (
        lambda: block(lambda self, x: self.act(self.bn1(x)), type("Mine", (nn.ReLU,), {})()),
        "Mine follows",
    ),
    "something drops before the activation": (
        lambda: block(lambda self, x: F.relu(self.act(self.bn1(x))), nn.Dropout(0.5)),
        "Dropout follows",
    ),
    "the intermediate is used elsewhere": (
        lambda: block(lambda self, x: (z := self.bn1(x)) * F.relu(z)),
        "its output is used elsewhere too",
    ),
    "the intermediate is returned": (
        lambda: block(lambda self, x: [z := self.bn1(x), F.relu(z)][1] + z),
        "its output is used elsewhere too",
    ),
    "it is added to itself": (
        lambda: block(lambda self, x: [z := self.bn1(x), z + z][1]),
        "it is added to itself",
    ),
    "a scaled sum": (
        lambda: block(lambda self, x: torch.add(self.bn1(x), x, alpha=2)),
        "no tensor, or is scaled",
    ),
    "a number is added": (
        lambda: block(lambda self, x: self.bn1(x) + 1),
        "no tensor, or is scaled",
    ),
    "in place onto another tensor": (
        lambda: block(lambda self, x: (x * 2).add_(self.bn1(x))),
        "in place onto another",
    ),
    "its input changes meanwhile": (lambda: block(changed_meanwhile), "may be changed"),
    "train mode does something else": (
        lambda: block(lambda self, x: F.relu(self.bn1(x)) if self.training else self.bn1(x)),
        "cannot be traced: what it does depends on self.training",
    ),
    "values decide": (
        lambda: block(lambda self, x: F.relu(self.bn1(x)) if x.sum() > 0 else x),
        "depends on the values or shapes",
    ),
    "shapes decide": (
        lambda: block(lambda self, x: F.relu(self.bn1(x)) if x.shape[0] > 1 else x),
        "depends on the values or shapes",
    ),
    "a loop over a tensor": (
        lambda: block(lambda self, x: F.relu(self.bn1(torch.stack(list(x))))),
        "it loops over a value of which nothing is known",
    ),
    "an intermediate's type is asked for": (
        lambda: block(
            lambda self, x: F.relu(z if isinstance(z := self.bn1(x), torch.Tensor) else z[0])
        ),
        "asks for the type of an intermediate",
    ),
    "silu's input may change before backward": (
        lambda: block(lambda self, x: F.silu(self.bn1(x))),
        "its input, from which silu goes backward, may be changed",
    ),
    "relu6's output may change before backward": (
        lambda: block(lambda self, x: F.relu6(self.bn1(x))),
        "the output of relu6, from which it goes backward, may be changed",
    ),
    "an autograd mode of its own": (lambda: block(no_grad), "it uses torch.no_grad"),
    "it sets an attribute": (lambda: block(counts), "it sets the attribute calls"),
    "it changes a list": (lambda: block(collects), "it looks at __dict__"),
    "it draws": (
        lambda: block(lambda self, x: F.relu(self.bn1(x + torch.rand(1)))),
        "it uses torch.rand, which no trace sees",
    ),
    "an autograd mode of its decorator's": (
        lambda: block(torch.no_grad()(lambda self, x: F.relu(self.bn1(x)))),
        "its decorator enters a context",
    ),
    "it changes a list of its own": (lambda: block(appends, seen=[0]), "it changes self.seen"),
    "an empty list, which a hook may fill": (
        lambda: block(appends, seen=[]),
        "it uses self.seen, which is empty",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_be_absorbed_is_only_fused_and_the_report_says_why(name, x, calls):
    make, why = REFUSED[name]
    model = make()
    model.requires_grad_(False)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    torch.manual_seed(0)
    expected = twin(x.clone())
    del calls[:]
    report = freeze(model, "fused-act")
    (row,) = (row for row in report.layers if row.name == "bn1")
    assert (row.policy, row.absorbs) == ("fused-act", "")
    assert row.note.startswith("absorbs nothing: ")
    assert why in row.note
    torch.manual_seed(0)
    assert torch.equal(model(x.clone()), expected)
    assert set(calls) <= {""}


HOOKED = {
    "the activation": ("act", {"bn1": "", "bn2": "affine+add", "branch.1": "absorbed"}),
    "a norm layer": ("bn1", {"bn1": "", "bn2": "affine+add+relu", "branch.1": "absorbed"}),
    "the module around the branch": (
        "branch",
        {"bn1": "relu", "bn2": "add+relu", "branch.1": ""},
    ),
    "the branch's norm layer": (
        "branch.1",
        {"bn1": "relu", "bn2": "add+relu", "branch.1": ""},
    ),
    "a convolution, which is called as before": (
        "conv1",
        {"bn1": "relu", "bn2": "affine+add+relu", "branch.1": "absorbed"},
    ),
}


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
@pytest.mark.parametrize("name", HOOKED)
def test_a_module_with_a_hook_is_not_passed_by(name, register, x):
    where, expected = HOOKED[name]
    model = hooked(where, register)()
    model.act.inplace = False  # a backward hook forbids it
    report = freeze(model, "fused-act")
    assert {row.name: row.absorbs for row in report.layers} == expected
    assert all(row.absorbs or "a hook stands on" in row.note for row in report.layers)


@pytest.mark.parametrize("where", ["act", "bn1", "bn2", "branch", "branch.1", "branch.0", ""])
def test_a_hook_that_is_put_on_later_runs_and_sees_what_it_always_saw(where, x):
    model = block(residual)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    freeze(model, "fused-act")
    seen, expected = [], []
    for each, into in ((model, seen), (twin, expected)):
        hook = lambda m, args, out, into=into: into.append((args[0].clone(), out.clone()))  # noqa: E731
        handle = each.get_submodule(where).register_forward_hook(hook)
        each(x)
        handle.remove()
    assert len(seen) == len(expected) > 0
    for mine, theirs in zip(seen, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("first", [True, False])
def test_a_forward_that_is_set_on_an_instance_is_run(first, x):
    model = block(residual)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    for each in (model, twin):
        if not first:
            freeze(model, "fused-act")
        each.act.forward = torch.tanh
    report = freeze(model, "fused-act") if first else None
    assert torch.equal(model(x), twin(x))
    assert report is None or absorbed(report)["bn2"] == "affine+add"


def test_a_global_hook_sees_every_module(x):
    model = block(residual)
    freeze(model, "fused-act")
    seen = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, out: seen.append(module))
    model(x)
    handle.remove()
    assert seen.count(model.act) == 2


def test_what_is_changed_later_takes_effect(x, calls):
    model = block(residual)
    freeze(model, "fused-act")
    model.act = nn.Tanh()
    model(x)
    assert calls == ["", "", ""]
    freeze(model, "fused-act")
    assert freeze(model, "fused-act").layers[0].note == "absorbs nothing: Tanh follows"


def test_an_attribute_that_decides_is_read_anew(x, calls):
    class Optional(Block):
        scale, options = 1.0, None

        def forward(self, x):
            z = F.relu(self.bn1(x)) if self.wants else self.bn1(x)
            return z * self.options["scale"]

    model = lively(Optional())
    model.wants, model.options = True, {"scale": 2.0}
    freeze(model, "fused-act")
    once = model(x)
    assert calls == ["relu"]
    model.options["scale"] = 4.0
    assert torch.equal(model(x), once * 2)
    model.options["scale"] = 2.0
    assert torch.equal(model(x), once)
    assert calls == ["relu", "", "relu"]
    model.wants = False
    assert model(x).min() < 0


def test_the_mode_is_no_part_of_the_generated_forward(x, calls):
    model = block(lambda self, x: F.dropout(F.relu(self.bn1(x)), 0.5, self.training))
    assert same_as_fused(copy.deepcopy(model), (x,))
    freeze(model, "fused-act")
    del calls[:]
    assert torch.equal(model.eval()(x), model.eval()(x))
    assert (model.train()(x) == 0).sum() > (model.eval()(x) == 0).sum()
    assert set(calls) == {"relu"}


def test_a_summand_that_must_be_broadcast_or_promoted_is_added_as_before(x, calls):
    class Two(Block):
        def forward(self, x, other):
            return F.relu(self.bn1(x) + other)

    model = lively(Two())
    twin = copy.deepcopy(model)
    freeze(model, "fused-act")
    freeze(twin, "fused")
    for other in (torch.randn(1, C, 1, 1), x.double(), torch.tensor(2.0), 3, x):
        expected, out = twin(x, other), model(x, other)
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)
    assert [call for call in calls if call] == ["+relu"]


def test_other_arguments_than_it_was_made_for_take_the_blocks_own_forward(x, calls):
    class Optional(Block):
        def forward(self, x, skip=None):
            x = x if isinstance(x, torch.Tensor) else torch.cat(x)
            z = F.relu(self.bn1(x))
            return z if skip is None else z + skip

    model = lively(Optional())
    twin = copy.deepcopy(model)
    freeze(model, "fused-act")
    freeze(twin, "fused")
    for args, kwargs in [((x,), {}), ([[x, x]], {}), ((x, x), {}), ((x,), {"skip": x})]:
        assert torch.equal(model(*args, **kwargs), twin(*args, **kwargs))
    assert torch.equal(model((x, x)), twin((x, x)))
    assert [call for call in calls if call] == ["relu", "relu"]


def test_writing_to_the_input_is_still_writing_to_it(x):
    def forward(self, x):
        kept = x
        kept += 1
        count = x.shape[0]
        more = count
        more += 1
        return F.relu(self.bn1(kept)) * count / more

    model = block(forward)
    freeze(model, "fused-act")
    twin = copy.deepcopy(model)
    unfreeze(twin)
    mine, theirs = x.clone(), x.clone()
    out = model.eval()(mine)
    assert torch.equal(out, twin.eval()(theirs))
    assert torch.equal(mine, x + 1)


# In place, by identity.


class Residual(Block):
    forward = residual


@pytest.fixture
def model():
    return lively(nn.Sequential(Residual(), nn.BatchNorm2d(C), nn.ReLU(), Residual()))


def description(model):
    return [
        (name, type(m), m.training, {k for k in vars(m) if k.startswith("_bnfreeze")})
        for name, m in model.named_modules()
    ] + [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]


def test_blocks_stay_the_very_objects_and_unfreeze_gives_them_back_exactly(model, x):
    before, modules = description(model), list(model.modules())
    values, keys = state(model), list(model.state_dict())
    expected = copy.deepcopy(model).eval()(x)
    freeze(model, "fused-act")
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], Residual)
    assert isinstance(model, nn.Sequential)
    assert torch.equal(model.train()(x), expected)
    unfreeze(model)
    assert description(model) == before
    assert moved(values, model) == set()


def test_freezing_twice_changes_nothing(model):
    first = freeze(model, "fused-act")
    before = description(model)
    again = freeze(model, "fused-act")
    assert description(model) == before
    assert absorbed(again) == absorbed(first)
    assert {row.actions for row in again.layers} == {()}


@pytest.mark.parametrize("policy", ["eval", "fused", "stats", "fused-act+weights"])
def test_from_one_policy_to_another_and_back(model, x, policy):
    before = description(model)
    freeze(model, policy)
    other = description(model)
    first = freeze(copy.deepcopy(model), "fused-act")
    assert absorbed(freeze(model, "fused-act")) == absorbed(first)
    freeze(model, policy)
    assert description(model) == other
    unfreeze(model)
    assert description(model) == before


def test_with_weights_all_parameters_are_held_too(model, x, calls):
    freeze(model, "fused-act+weights")
    assert not any(p.requires_grad for p in model.parameters())
    model(x)
    assert calls == ["relu", "*relu", "relu", "relu", "*relu"]


def test_only_what_is_selected_is_changed_or_absorbs(model, x, calls):
    rules = {"0": "fused-act", "0.branch": "none", "3": "fused-act", "3.bn2": "eval"}
    report = freeze(model, rules)
    assert absorbed(report) == {"0.bn1": "relu", "0.bn2": "add+relu", "3.bn1": "relu"}
    assert "in place onto another" in notes(report)["3.branch.1"]
    assert type(model) is nn.Sequential
    assert type(model[1]) is type(model[0].branch[1]) is nn.BatchNorm2d
    before = state(model)
    model.train()(x)
    assert {n for n in moved(before, model) if "num" in n} == {
        "0.branch.1.num_batches_tracked",
        "1.num_batches_tracked",
    }


def test_giving_one_layer_back_leaves_the_others_what_they_can_absorb(model, x):
    freeze(model, "fused-act")
    rows = absorbed(unfreeze(model, "0.bn2"))
    assert rows["0.bn1"] == "relu"
    assert rows["3.bn2"] == "affine+add+relu"
    assert not {"0.bn2", "0.branch.1"} & rows.keys()
    assert type(model[0].bn2) is nn.BatchNorm2d


def test_a_layer_given_back_behind_the_blocks_back_is_computed_as_it_is(model, x):
    freeze(model, "fused-act")
    unfreeze(model[0].bn2)
    twin = copy.deepcopy(model)
    unfreeze(twin)
    assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_absorbs_too_and_belongs_to_itself(model, x, how, calls):
    before = [type(module) for module in model.modules()]
    freeze(model, "fused-act")
    expected = model(x)
    twin = copied(model, how)
    del calls[:]
    assert torch.equal(twin(x), expected)
    assert calls == ["relu", "*relu", "relu", "relu", "*relu"]
    with torch.no_grad():
        twin[0].bn1.weight.zero_()
    assert torch.equal(model(x), expected)
    unfreeze(model)
    del calls[:]
    twin(x)
    assert "*relu" in calls
    unfreeze(twin)
    assert [type(module) for module in twin.modules()] == before


def test_a_shallow_copy_absorbs_too(model, x, calls):
    freeze(model, "fused-act")
    twin = copy.copy(model[0])
    assert torch.equal(twin(x), model[0](x))
    assert calls == ["relu", "*relu"] * 2
    twin.__dict__["_modules"] = dict(twin._modules)
    twin.act = nn.Tanh()
    del calls[:]
    assert not torch.equal(twin(x), model[0](x))
    assert calls == ["", "", "", "relu", "*relu"]


def test_a_frozen_model_is_freed_as_soon_as_nobody_has_it(x):
    model = nn.Sequential(Residual(), nn.BatchNorm2d(C), nn.ReLU())
    assert absorbed(freeze(model, "fused-act"))
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

    freeze(model, "fused")
    before = description(model)

    def fail(base, behaviour):
        raise RuntimeError("half-way")

    monkeypatch.setattr(blocks, "make_class", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        freeze(model, "fused-act")
    assert description(model) == before
    monkeypatch.undo()
    freeze(model, "fused-act")
    absorbing = description(model)
    with pytest.raises(PolicyError):
        freeze(model, {"0": "eval", "nothing": "eval"})
    assert description(model) == absorbing


@pytest.mark.parametrize("how", ["compile", "export", "trace", "fx", "functional_call", "vmap"])
def test_blocks_go_where_blocks_go(model, x, how, calls):
    freeze(model, "fused-act")
    expected = model.train()(x)
    del calls[:]
    if how == "compile":
        other = torch.compile(model, backend="eager", fullgraph=True)
    elif how == "export":
        other = torch.export.export(model, (x,)).module()
    elif how == "trace":
        other = torch.jit.trace(model, x)
    elif how == "fx":
        other = torch.fx.symbolic_trace(model)
        assert any("act" in str(node.target) for node in other.graph.nodes)
    elif how == "functional_call":
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        other = lambda x: torch.func.functional_call(model, values, (x,))  # noqa: E731
    else:
        other = lambda x: torch.vmap(model)(x[None])[0]  # noqa: E731
    assert torch.allclose(other(x), expected, atol=1e-5)
    if how in ("export", "fx"):
        assert "*relu" not in calls


def test_a_tensor_that_is_changed_in_place_later_does_not_break_the_backward_pass(x):
    def forward(self, x):
        x = self.conv1(x)
        y = F.relu6(self.bn1(x)) + F.silu(self.bn2(x))
        z = F.relu6(self.branch(y))
        z *= 2
        x += z
        return x

    assert same_as_fused(block(forward), (x,))


@pytest.mark.parametrize("forward", [residual, lambda self, x: F.silu(self.bn1(self.conv1(x)))])
def test_in_half_precision_it_rounds_no_more_than_fused(forward, x):
    model = block(forward)
    exact = copy.deepcopy(model).eval()(x.bfloat16().float())
    errors = []
    for policy in ("fused", "fused-act"):
        twin = copy.deepcopy(model)
        freeze(twin, policy)
        for convolution in (twin.conv1, twin.conv2, twin.branch[0]):
            convolution.bfloat16()
        out = twin(x.bfloat16())
        assert out.dtype == torch.bfloat16
        errors.append((out - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0]


def test_the_proof_holds_for_fused_blocks(model, x):
    freeze(model, "fused-act")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with guard(model, optimizer=optimizer):
        for _ in range(2):
            model.train()(x).sum().backward()
            optimizer.step()


def test_hooks_on_the_block_itself_run_as_before(x, calls):
    model = block(residual)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out))
    freeze(model, "fused-act")
    out = model(x)
    assert seen == [out]
    assert calls == ["relu", "*relu"]


# timm's layer with an activation inside.


def timms(act, drop=None, **options):
    return lively(
        nn.Sequential(
            nn.Conv2d(C, C, 1),
            timm.layers.BatchNormAct2d(C, act_layer=act, drop_layer=drop, **options),
        )
    )


@pytest.mark.parametrize(
    ("act", "absorbs"),
    [(nn.ReLU, "relu"), (nn.ReLU6, "relu6"), (nn.SiLU, "silu"), (nn.Hardswish, "hardswish")],
)
def test_timms_layer_becomes_one_layer_with_its_activation(act, absorbs, x, calls):
    model = timms(act)
    kind, expected = type(model[1]), copy.deepcopy(model).eval()(x)
    (row,) = freeze(model, "fused-act").layers
    assert (row.policy, row.absorbs, row.note) == ("fused-act", absorbs, "")
    assert torch.equal(model.train()(x), expected)
    assert calls == [absorbs]
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    handle = model[1].act.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(model(x), expected + 1)
    handle.remove()
    unfreeze(model)
    assert type(model[1]) is kind
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: timms(nn.GELU), "its activation GELU is none of those"),
        (lambda: timms(nn.ReLU, nn.Dropout2d), "it drops"),
    ],
)
def test_timms_layer_keeps_its_own_forward_where_it_does_more(make, says, x):
    model = make()
    (row,) = freeze(model, "fused-act").layers
    assert (row.policy, row.absorbs) == ("eval+affine", "")
    assert says in row.note


def test_timms_layer_without_an_activation_absorbs_what_follows(x, calls):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timms(nn.ReLU, apply_act=False)

        def forward(self, x):
            return F.silu(self.body(x) + x)

    model = lively(Around())
    expected = copy.deepcopy(model).eval()(x)
    assert absorbed(freeze(model, "fused-act")) == {"body.1": "add+silu"}
    assert torch.equal(model(x), expected)
    assert calls == ["+silu"]


# What a trace cannot see is refused, or watched.

SEEN, CHANCE, FACTOR = [], random.Random(0), 2.0


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def swallows(self, x):
    out = self.bn1(x)
    try:
        if out.sum() > 0:
            out = out * 2
    except Exception:
        return F.relu(out)
    return F.relu(out)


def deaf(self, x):
    out = self.conv1(x)
    if out is not None:
        out = self.bn1(out)
    return F.relu(out)


def imports(self, x):
    import math

    return F.relu(self.bn1(x)) * math.pi


def grows(self, x):
    self.layers.append(self.act)
    return F.relu(self.bn1(x))


def hooks(self, x):
    self.act.register_forward_hook(SEEN)
    return F.relu(self.bn1(x))


def helped(self, x):
    return guess(self.bn1(x))


def guess(z):
    return F.relu(z) if torch.is_grad_enabled() else z


def memo(z, seen):
    seen.append(1)
    return z


memo.seen = []


def of_a_dtype(self, x):
    dtype = x.dtype
    return F.relu(self.bn1(x)) * (2 if dtype is torch.float32 else 3)


class Forgets(nn.Module):
    def forward(self, x):
        return None


class Remembers(nn.Module):
    seen = 0

    def forward(self, x):
        self.seen = 1
        return x


NOTHING = None


class Mode(str, enum.Enum):
    POST, PRE = "post", "pre"


class Wild(enum.Enum):
    ON = 1

    def __bool__(self):
        return CHANCE.random() < 0.5


UNSEEN = {
    "an autograd function": (
        lambda self, x: F.relu(self.bn1(Twice.apply(x))),
        "it uses Twice",
    ),
    "a checkpoint": (
        lambda self, x: F.relu(
            self.bn1(torch.utils.checkpoint.checkpoint(self.conv1, x, use_reentrant=True))
        ),
        "it ",
    ),
    "C code": (
        lambda self, x: F.relu(self.bn1(x)) if torch.utils.dlpack.to_dlpack(x) else x,
        "it uses torch.utils.dlpack.to_dlpack, which no trace sees",
    ),
    "the autograd mode": (
        lambda self, x: F.relu(self.bn1(x)) * (1 + torch.is_grad_enabled()),
        "it uses torch.is_grad_enabled, which no trace sees",
    ),
    "chance": (
        lambda self, x: F.relu(self.bn1(x)) * (1 + (CHANCE.random() < 0.5)),
        "it uses CHANCE, of the type Random",
    ),
    "an effect": (
        lambda self, x: [F.relu(self.bn1(x)), SEEN.append(1)][0],
        "it uses SEEN, of the type list",
    ),
    "an exception": (swallows, "it catches exceptions"),
    "the very type": (
        lambda self, x: F.relu(self.bn1(x[0] if type(x) is tuple else x)),
        "it uses type, a class that may do anything",
    ),
    "whether it is None": (deaf, "it asks whether an intermediate value is None"),
    "the very dtype": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if x.dtype is torch.float32 else 3),
        "it asks whether an intermediate value is None",
    ),
    "the very dtype, of an intermediate": (of_a_dtype, "it asks whether an intermediate value"),
    "a dtype in a set": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if x.dtype in {torch.float32} else 3),
        "it looks a value up",
    ),
    "a device in a set": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if x.device.type in {"cpu"} else 3),
        "it looks a value up",
    ),
    "a size in a dict": (
        lambda self, x: F.relu(self.bn1(x)) * {C: 2.0}.get(x.shape[1], 3.0),
        "it looks a value up",
    ),
    "a size in a string": (
        lambda self, x: F.relu(self.bn1(x)) * {f"[{C}]": 2.0}.get(f"{[x.shape[1]]}", 3.0),
        "it makes a string of a value",
    ),
    "the autograd graph": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if x.grad_fn is None else 3),
        "it asks whether an intermediate value is None",
    ),
    "the autograd graph, by another way": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if getattr(x, "grad_fn", 1) else 3),
        "it looks for the attribute grad_fn",
    ),
    "None by another name": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if self.maybe(x) is NOTHING else 3),
        "it asks whether an intermediate value is None",
    ),
    "None by a function": (
        lambda self, x: F.relu(self.bn1(x)) * (2 if operator.is_(self.maybe(x), None) else 3),
        "it uses operator.is_",
    ),
    "a flag of its parameters": (
        lambda self, x: [self.conv2.requires_grad_(False), F.relu(self.bn1(x))][1],
        "it looks at requires_grad_",
    ),
    "its dict": (
        lambda self, x: F.relu(self.bn1(x)) * getattr(self, "__dict__").get("more", 2.0),  # noqa: B009
        "it looks at __dict__",
    ),
    "a class by another name": (
        lambda self, x: [kind := Remembers, F.relu(self.bn1(x)) * kind.seen][1],
        "it uses Remembers, a class that may do anything",
    ),
    "a module that it makes": (
        lambda self, x: Remembers()(F.relu(self.bn1(x))),
        "it uses Remembers, a class that may do anything",
    ),
    "what a child sets meanwhile": (
        lambda self, x: F.relu(self.bn1(self.child(x))) * (2 + self.child.seen),
        "it reads seen of a Remembers that it has called",
    ),
    "a memo": (
        lambda self, x: F.relu(memo(self.bn1(x), memo.seen)),
        "it uses an attribute of a function",
    ),
    "a context that changes nothing now": (
        torch.autocast("cpu", enabled=False)(lambda self, x: F.relu(self.bn1(self.conv1(x)))),
        "its decorator enters a context",
    ),
    "an import": (imports, "it imports math"),
    "a submodule registered": (grows, "it looks at add_module"),
    "a hook registered": (hooks, "it uses SEEN"),
    "a function of its own that does so": (helped, "it uses torch.is_grad_enabled"),
    "an enumeration with methods": (
        lambda self, x: F.relu(self.bn1(x)) if Wild.ON else x,
        "it uses Wild.ON, of the type Wild",
    ),
    "a print": (lambda self, x: (print(), F.relu(self.bn1(x)))[1], "it uses print"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_trace_cannot_see_is_refused(name, x):
    forward, why = UNSEEN[name]
    model = block(forward)
    model.layers, model.maybe, model.child = nn.ModuleList(), Forgets(), Remembers()
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    count, state = len(SEEN), CHANCE.getstate()
    report = freeze(model, "fused-act")
    assert (len(SEEN), CHANCE.getstate()) == (count, state)
    assert not absorbed(report)
    assert f"Own cannot be traced: {why}" in notes(report)["bn1"]
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            CHANCE.setstate(state)
            expected = twin(x.clone().requires_grad_())
            CHANCE.setstate(state)
            assert torch.equal(model(x.clone().requires_grad_()), expected)


class Reads(Block):
    scale, kept = 1.0, ({"by": [1.0]},)

    def __init__(self):
        super().__init__()
        self.register_parameter("gamma", None)
        self.delta = nn.Parameter(torch.full((1,), 2.0))
        self.nested = ([1.0],)

    def post(self, z):
        return z * self.scale * self.nested[0][0]

    def forward(self, x):
        z = F.relu(self.bn1(x)) * getattr(self, "more", 1.0)
        z = z if self.gamma is None else z * self.gamma
        z = z if self.delta is None else z * self.delta
        return self.post(z) * (2.0 if self.act.inplace else 1.0) * (3.0 if self.act.on else 1.0)


class Switch(nn.ReLU):
    on = False


CHANGES = {
    "nothing": lambda m: None,
    "an absent attribute": lambda m: setattr(m, "more", 3.0),
    "a class's default": lambda m: setattr(m, "scale", 3.0),
    "a method": lambda m: setattr(m, "post", lambda z: z * 3),
    "a child's class's default": lambda m: setattr(m.act, "on", True),
    "a parameter that was None": lambda m: setattr(m, "gamma", nn.Parameter(torch.ones(1) * 3)),
    "a parameter that becomes None": lambda m: setattr(m, "delta", None),
    "a list in a tuple": lambda m: m.nested[0].__setitem__(0, 3.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_all_that_was_looked_at_is_watched(name, x, calls):
    model = Reads()
    model.act = Switch()
    lively(model)
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    assert absorbed(freeze(model, "fused-act"))["bn1"] == "relu"
    CHANGES[name](model)
    CHANGES[name](twin)
    expected = twin(x)
    del calls[:]
    assert torch.equal(model(x), expected)
    assert calls == ["relu" if name == "nothing" else ""]


class Base(Block):
    def post(self, z):
        return F.relu(z)

    @property
    def wide(self):
        return self.width > 1

    @staticmethod
    def twice(z):
        return z * 2

    def forward(self, x):
        return self.post(self.bn1(self.conv1(x)))


class Head(nn.Conv2d):
    pass


class Derived(Base):
    """Ordinary code, in the forms that it comes in."""

    mode = Mode.POST

    def __init__(self):
        super().__init__()
        self.width, self.names, self.fn = 2, ("conv2", "bn2"), F.relu
        self.layers = nn.ModuleList([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()])

    def forward(self, x, scale=2.0):
        out = super(Derived, self).forward(x)  # noqa: UP008
        for layer in self.layers:
            if isinstance(layer, (Head, nn.Module)) and not isinstance(layer, Head):
                out = layer(out)
        for name in self.names:
            out = getattr(self, f"{name}")(out)
        if self.wide and self.mode is Mode.POST and not hasattr(self, "missing"):
            out = self.fn(out)
        return self.twice(out) * scale * sum([i * i for i in range(3)])


def test_ordinary_code_is_traced(x, calls):
    model = lively(Derived())
    assert same_as_fused(copy.deepcopy(model), (x,))
    report = freeze(model, "fused-act")
    assert absorbed(report) == {"bn1": "relu", "layers.1": "relu", "bn2": "relu"}
    twin = copy.deepcopy(model)
    freeze(twin, "fused")
    del calls[:]
    assert torch.equal(model(x), twin(x))
    assert calls == ["relu"] * 3 + [""] * 3
    model.layers.append(nn.Tanh())
    twin.layers.append(nn.Tanh())
    assert torch.equal(model(x), twin(x))


def test_a_class_that_is_changed_is_noticed(x, monkeypatch):
    model = Reads()
    model.act = Switch()
    freeze(lively(model), "fused-act")
    once = model(x)
    monkeypatch.setattr(Reads, "scale", 3.0)
    assert torch.equal(model(x), once * 3)
    monkeypatch.setattr(Switch, "on", True)
    assert torch.equal(model(x), once * 3 * 3)
    monkeypatch.setattr(Reads, "post", lambda self, z: z)
    assert torch.equal(model(x), once / 1 * 3)


def test_a_global_name_that_is_changed_is_noticed(x, calls, monkeypatch):
    model = block(lambda self, x: F.relu(self.bn1(x)) * FACTOR)
    assert absorbed(freeze(model, "fused-act")) == {"bn1": "relu"}
    once = model(x)
    monkeypatch.setitem(globals(), "FACTOR", 4.0)
    assert torch.equal(model(x), once * 2)
    assert calls == ["relu", ""]


def test_arguments_of_another_kind_take_the_blocks_own_forward(x):
    model = block(lambda self, x, y: F.relu(self.bn1(x)) + y[0])
    freeze(model, "fused-act")
    assert torch.equal(model(x, (x,)), model(x, [x]))


def test_random_numbers_are_drawn_in_the_same_order(x):
    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        return F.relu(out + self.other(self.conv2(x)))

    model = block(forward, nn.Dropout(0.5))
    model.other = nn.Dropout(0.5)
    assert same_as_fused(model, (x,))


def test_a_class_that_keeps_a_list_of_its_subclasses_sees_none_but_its_own(x):
    listed = []

    class Base(Block):
        def __init_subclass__(cls, **kwargs):
            listed.append(cls)

        def forward(self, x):
            return F.relu(self.bn1(x))

    model = lively(Base())
    assert absorbed(freeze(model, "fused-act")) == {"bn1": "relu"}
    model(x)
    assert not listed


def test_what_cannot_be_written_in_code_is_refused(x):
    model = block(lambda self, x: {Mode.POST: F.relu(self.parts["global"](x))})
    model.parts = lively(nn.ModuleDict({"global": nn.BatchNorm2d(C), 'a"\\n': nn.BatchNorm2d(C)}))
    twin = copy.deepcopy(model)
    report = freeze(model, "fused-act")
    assert "it makes a dict whose keys are neither" in notes(report)["parts.global"]
    for name in model.parts:
        forward = lambda self, x, name=name: F.relu(self.parts[name](x))  # noqa: E731
        type(twin).forward = forward
        other = copy.deepcopy(twin)
        assert "a name that cannot be written" in notes(freeze(other, "fused-act"))[f"parts.{name}"]
        assert torch.equal(other(x), twin.eval()(x))


def test_a_value_is_unpacked_as_it_would_be(x):
    def forward(self, x):
        n, c, h, w = x.shape
        left, right = F.relu(self.bn1(self.conv1(x))).chunk(2, dim=1)
        first, second = self.conv2(x)
        return torch.cat([left, right], 1).view(n, c, h * w).mean() + first + second

    model = block(forward)
    assert same_as_fused(copy.deepcopy(model), (x,))
    assert absorbed(freeze(model, "fused-act"))["bn1"] == "relu"
    for wrong in (x[0], torch.cat([x, x])):
        with pytest.raises(ValueError, match="values to unpack"):
            model(wrong)


def test_whatever_is_written_in_place_is_written(x):
    def forward(self, x, mask):
        mask &= x > 0
        x[:, :2] += 1
        view = x.data
        view *= 2
        return F.relu(self.bn1(self.conv1(x))) * mask

    model = block(forward)
    twin = copy.deepcopy(model)
    assert absorbed(freeze(model, "fused-act")) == {"bn1": "relu"}
    freeze(twin, "fused")
    mine, theirs = ((x.clone(), torch.ones(x.shape, dtype=torch.bool)) for _ in range(2))
    assert torch.equal(model(*mine), twin(*theirs))
    assert all(map(torch.equal, mine, theirs))
    assert not mine[1].all()


def test_a_shape_is_that_of_the_moment_when_it_is_asked_for(x):
    def forward(self, x):
        shape = x.shape
        x.unsqueeze_(0)
        return F.relu(self.bn1(self.conv1(x.view(shape))))

    model = block(forward)
    freeze(model, "fused-act")
    assert model(x.clone()).shape == x.shape


def doubled(z):
    return z * 2


@pytest.mark.parametrize("change", ["forward", "its code", "a helper's code"])
def test_a_forward_that_is_changed_later_is_the_one_that_runs(change, x, monkeypatch):
    def forward(self, x):
        return doubled(F.relu(self.bn1(self.conv1(x))))

    def other(self, x):
        return torch.tanh(self.bn1(self.conv1(x)))

    model = block(forward)
    twin = copy.deepcopy(model)
    assert absorbed(freeze(model, "fused-act")) == {"bn1": "relu"}
    freeze(twin, "fused")
    assert torch.equal(model(x), twin(x))
    if change == "forward":
        type(twin).forward = other
    elif change == "its code":  # which is what IPython's autoreload does
        forward.__code__ = other.__code__
    else:
        monkeypatch.setattr(doubled, "__code__", (lambda z: z * 3).__code__)
    assert torch.equal(model(x), twin(x))
    later = lively(type(twin)())
    expected = copy.deepcopy(later).eval()(x)
    freeze(later, "fused-act")
    assert torch.equal(later(x), expected)


class Aliases(nn.Module):
    """A block whose parts have two names each."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU6()])
        self.heads = nn.ModuleDict({"one": nn.Tanh(), "two": nn.Sigmoid()})
        self.conv, self.bn, self.act = self.parts
        self.out = nn.Conv2d(C, C, 1)

    def forward(self, x):
        x = self.out(self.act(self.bn(self.conv(x)))) * 9
        for head in self.heads.values():
            x = head(x)
        return x


LATER = {
    "an order": lambda m: m.heads.update({"one": m.heads.pop("one")}),
    "what a name leads through": lambda m: m.parts.__setitem__(0, nn.Tanh()),
    "what an activation is": lambda m: setattr(m.act, "max_val", 0.1),
}


@pytest.mark.parametrize("name", LATER)
def test_names_orders_and_bounds_are_watched(name, x):
    model = lively(Aliases())
    twin = copy.deepcopy(model)
    assert "relu6" in absorbed(freeze(model, "fused-act")).values()
    freeze(twin, "fused")
    once = twin(x)
    assert torch.equal(model(x), once)
    LATER[name](model)
    LATER[name](twin)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(twin(x), once) == (name == "what a name leads through")


def test_a_tensor_that_is_registered_twice_may_become_two(x):
    model = block(lambda self, x: F.relu(self.bn1(self.conv1(x))) * self.one + self.two)
    model.one = model.two = nn.Parameter(torch.ones(1))
    freeze(model, "fused-act")
    twin = copy.deepcopy(model)
    twin.two = nn.Parameter(torch.zeros(1))
    assert torch.equal(model(x), twin(x) + 1)


def test_a_convolution_of_ones_own_may_pass_its_input_on(x):
    class Skips(nn.Conv2d):
        def forward(self, x):
            return x

    def forward(self, x):
        z, y = self.bn1(self.act(x)), F.relu_(x)
        return z + y

    model = block(forward, Skips(C, C, 1))
    twin = copy.deepcopy(model)
    freeze(model, "fused-act")
    freeze(twin, "fused")
    assert torch.equal(model(x.clone()), twin(x.clone()))


def test_a_method_of_a_class_is_not_traced(x):
    class Counts(Block):
        calls = 0

        @classmethod
        def count(cls, z):
            cls.calls += 1
            return z

        def forward(self, x):
            return self.count(F.relu(self.bn1(x)))

    model = lively(Counts())
    assert not absorbed(freeze(model, "fused-act"))
    assert Counts.calls == 0


def test_functions_of_math_are_what_they_were_while_torch_fx_replaces_them(x, calls):
    class Scales(Block):
        def scaled(self, z):
            return z / math.sqrt(z.shape[1]) * math.sqrt(2)

        def forward(self, x):
            return self.scaled(F.relu(self.bn1(x)))

    model = lively(Scales())
    assert same_as_fused(copy.deepcopy(model), (x,))
    freeze(model, "fused-act")
    del calls[:]
    model(x)
    assert calls == ["relu"]


def test_a_graph_module_writes_to_its_class_and_is_left_alone(x):
    model = nn.Sequential(torch.fx.symbolic_trace(block(residual)))
    twin = copy.deepcopy(model)
    report = freeze(model, "fused-act")
    freeze(twin, "fused")
    assert "it is a GraphModule" in notes(report)["0.bn1"]
    for each in (model, twin):
        each[0].recompile()
    assert torch.equal(model(x), twin(x))


class Left(torch.Tensor):
    def __add__(self, other):
        return super().__add__(other) * 2


class Odd:
    def __init__(self, x):
        self.x = x

    def __add__(self, other):
        return self.x - other


@pytest.mark.parametrize("kind", [Left, Odd, lambda x: x[:, :2], lambda x: [x]])
def test_what_is_added_is_added_in_its_own_way_and_on_its_side(kind, x):
    class Makes(nn.Module):
        def forward(self, x):
            return x.as_subclass(kind) if kind is Left else kind(x)

    model = block(lambda self, x: self.act(x) + self.bn1(self.conv1(x)), Makes())
    twin = copy.deepcopy(model)
    assert absorbed(freeze(model, "fused-act")) == {"bn1": "add"}
    freeze(twin, "fused")
    try:
        expected = twin(x)
    except (RuntimeError, TypeError) as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            model(x)
    else:
        assert torch.equal(model(x), expected)


def test_a_shortcut_that_is_an_empty_sequential_is_added(x, calls):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out += self.shortcut(x)
        return F.relu(out)

    model = block(forward)
    model.shortcut = nn.Sequential()
    assert same_as_fused(copy.deepcopy(model), (x,))
    assert absorbed(freeze(model, "fused-act")) == {"bn1": "add+relu"}


def test_a_layer_whose_own_tensors_change_before_the_sum_is_computed_in_its_place(x):
    def forward(self, x):
        z = self.bn1(self.conv1(x))
        self.bn1.running_mean.add_(1)
        return z + x

    model = block(forward)
    twin = copy.deepcopy(model)
    assert "its own tensors are used besides" in notes(freeze(model, "fused-act"))["bn1"]
    freeze(twin, "fused")
    assert torch.equal(model(x), twin(x))


CONVOLUTIONS = {
    "a hook": lambda c: c.register_forward_hook(lambda module, args, out: args[0]),
    "a forward": lambda c: setattr(c, "forward", torch.ops.aten.alias.default),
    "a class": lambda c: setattr(c, "__class__", nn.Identity),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_that_comes_to_pass_its_input_on_is_noticed(name, first, x):
    def forward(self, x):
        z, y = self.bn1(self.conv1(x)), F.relu_(x)
        return z + y

    model = block(forward)
    twin = copy.deepcopy(model)
    for each, policy in ((model, "fused-act"), (twin, "fused")):
        if first:
            CONVOLUTIONS[name](each.conv1)
        report = freeze(each, policy)
        if not first:
            CONVOLUTIONS[name](each.conv1)
            assert ("bn1" in absorbed(report)) == (policy == "fused-act")
    assert torch.equal(model(x.clone()), twin(x.clone()))
