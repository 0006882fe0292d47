"""guard: checked after the steps that were asked for, and on the way out."""

import pickle
import warnings

import pytest
import torch
from torch import nn

import bnfreeze
from bnfreeze.verification import on_device


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.norm(x)).sum()


@pytest.fixture
def model():
    model = Tiny()
    bnfreeze.freeze(model)
    return model


@pytest.fixture
def optimizer(model):
    return torch.optim.SGD(model.head.parameters(), lr=0.1)


def train(model, optimizer, steps, *, drift_at=None):
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).backward()
        if step == drift_at:
            model.norm.running_mean[2] += 1
        optimizer.step()


@pytest.mark.parametrize("trace", [False, True])
def test_a_frozen_model_passes_and_the_guard_can_be_used_again(model, optimizer, trace):
    watch = bnfreeze.guard(model, optimizer=optimizer, trace=trace)
    for _ in range(2):
        with watch:
            train(model, optimizer, 3)
        assert watch.step == 3
        assert watch.report.ok
    train(model, optimizer, 2, drift_at=1)  # nothing is watched any more
    assert watch.step == 3


def test_a_drift_is_raised_by_the_step_after_which_it_was_seen(model, optimizer):
    start = model.head.weight.detach().clone()
    watch = bnfreeze.guard(model, optimizer=optimizer)
    with pytest.raises(bnfreeze.DriftError, match=r"norm.running_mean drifted at step 3") as caught:
        with watch:
            train(model, optimizer, 9, drift_at=3)
    assert watch.step == 3
    assert not torch.equal(start, model.head.weight)  # the step has been taken
    (drift,) = caught.value.report.drifts
    assert (drift.step, drift.since, drift.first_index) == (3, 2, (2,))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.report) == (str(caught.value), caught.value.report)


def test_the_steps_are_named_between_which_it_drifted(model, optimizer):
    with pytest.raises(bnfreeze.DriftError, match=r"drifted between steps 5 and 8:") as caught:
        with bnfreeze.guard(model, optimizer=optimizer, every=4):
            train(model, optimizer, 20, drift_at=6)
    assert caught.value.report.drifts[0].step == 8
    with pytest.raises(bnfreeze.DriftError, match=r"drifted between steps 1 and 3:"):
        with bnfreeze.guard(model, optimizer=optimizer, every=100):
            train(model, optimizer, 3, drift_at=2)
    with pytest.raises(bnfreeze.DriftError, match=r"drifted after step 2:"):
        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer, 2)
            model.norm.running_mean[0] = 1


def test_values_and_flags_on_an_accelerator_are_compared_at_once(model, optimizer, monkeypatch):
    # Tensors on the CPU, compared as those on an accelerator are.
    monkeypatch.setattr(on_device, "_on_cpu", lambda tensor: False)
    with bnfreeze.guard(model, optimizer=optimizer) as watch:
        train(model, optimizer, 5)
    assert (watch.step, watch.report.ok) == (5, True)
    with pytest.raises(bnfreeze.DriftError, match=r"drifted at step 3: 1 of 4") as caught, watch:
        train(model, optimizer, 9, drift_at=3)
    (drift,) = caught.value.report.drifts
    assert (drift.step, drift.since, drift.first_index) == (3, 2, (2,))
    model.norm.running_mean[2] -= 1
    with pytest.raises(bnfreeze.DriftError) as caught, watch:
        bnfreeze.unfreeze(model)
        train(model, optimizer, 2)
    assert watch.step == 1
    assert {"requires-grad", "thawed"} < {drift.kind for drift in caught.value.report.drifts}


class Hiding(Tiny):
    def named_modules(self, *args, **kwargs):
        return iter(())


def become_sparse(model):
    weight = torch.ones(4).to_sparse().requires_grad_(False)
    torch.utils.swap_tensors(model.norm.weight, nn.Parameter(weight, requires_grad=False))


def conjugated(model):
    model.phases.data = model.phases.data.conj()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Hiding, lambda model: setattr(model.norm, "eps", 1.0)),
        (Tiny, lambda model: setattr(model.norm, "eps", 1e-5 * (1 + 5e-7))),
        (Tiny, become_sparse),
        (Tiny, conjugated),
    ],
)
def test_a_quick_look_does_not_miss_what_the_full_comparison_sees(kind, change):
    model = kind()
    model.phases = torch.randn(3, dtype=torch.complex64)
    bnfreeze.freeze(model)
    watch = bnfreeze.guard(model, tensors="all")
    with pytest.raises(bnfreeze.DriftError), watch:
        assert watch.check() is watch.check()
        change(model)


@pytest.mark.parametrize("part", ["scripted", "traced"])
def test_a_scripted_part_beside_the_frozen_one_disturbs_no_check(model, part):
    relu = nn.Sequential(nn.ReLU())
    scripted = part == "scripted"
    model.part = torch.jit.script(relu) if scripted else torch.jit.trace(relu, torch.randn(2))
    with bnfreeze.guard(model) as watch:
        watch.check()
        watch.check()
    assert watch.report.ok


def test_an_eps_that_is_an_integer_makes_no_check_slow():
    model = nn.Sequential(nn.BatchNorm1d(4, eps=1))
    bnfreeze.freeze(model)
    with bnfreeze.guard(model) as watch:
        assert watch.check() is watch.check()


# Optimizers -------------------------------------------------------------------------------------


class Accelerated(torch.optim.Optimizer):
    """As the wrappers of Accelerate and Opacus: their base class was never initialised."""

    def __init__(self, optimizer):
        self.original_optimizer = optimizer

    def zero_grad(self):
        self.original_optimizer.zero_grad()

    def step(self, closure=None):
        self.original_optimizer.step(closure)

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups


def test_the_steps_of_the_optimizers_are_counted(model, optimizer):
    second = torch.optim.AdamW(model.head.parameters())
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    for watched, count in (([optimizer, second], 3), (None, 4), (Accelerated(second), 1)):
        with bnfreeze.guard(model, optimizer=watched) as watch:
            train(model, optimizer, 2)
            train(model, Accelerated(second), 1)
            other.step()
        assert watch.step == count


def test_putting_a_frozen_parameter_into_the_optimizer_is_seen(model, optimizer):
    with pytest.raises(bnfreeze.DriftError, match=r"norm.weight was put into the optimizer"):
        with bnfreeze.guard(model, optimizer=optimizer):
            optimizer.add_param_group({"params": [model.norm.weight]})
            train(model, optimizer, 1)


# The block's own exception ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tamper", "note"),
    [
        (lambda watch, model: model.norm.running_var.fill_(9), "norm.running_var drifted before"),
        (lambda watch, model: setattr(watch, "_model", "no model"), "could not compare"),
        (lambda watch, model: None, None),
    ],
)
def test_the_exception_of_the_block_is_kept_and_the_drift_is_noted(model, tamper, note):
    with warnings.catch_warnings(record=True) as warned, pytest.raises(ZeroDivisionError) as caught:
        warnings.simplefilter("always")
        with bnfreeze.guard(model) as watch:
            tamper(watch, model)
            _ = 1 / 0
    # Before Python 3.11 exceptions have no notes.
    notes = getattr(caught.value, "__notes__", None) or [str(w.message) for w in warned]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_the_exception_of_the_block_is_kept_where_warnings_are_errors(model):
    with pytest.raises(ZeroDivisionError), bnfreeze.guard(model):
        model.norm.running_var[0] = 9
        _ = 1 / 0


def test_it_can_be_asked_in_between_and_says_what_it_watches(model):
    with pytest.raises(bnfreeze.DriftError, match="before the first optimizer step"):
        with bnfreeze.guard(model, every=5, tensors="norm") as watch:
            for part in ("Tiny", "'norm'", "5 tensors", "every 5 steps", "step 0"):
                assert part in repr(watch)
            assert watch.check().ok
            model.norm.bias.data += 1
            watch.check()


def test_what_it_cannot_watch_is_refused(model):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        bnfreeze.guard(model, every=0)
    with pytest.raises(TypeError, match="not Linear"):
        bnfreeze.guard(model, optimizer=model.head)
    with pytest.raises(bnfreeze.PolicyError, match="Nothing in the model is frozen"):
        bnfreeze.guard(Tiny()).__enter__()
    with pytest.raises(RuntimeError, match="not active"):
        bnfreeze.guard(model).check()


# trace ------------------------------------------------------------------------------------------


def test_a_trace_sees_a_change_that_is_undone_and_no_write_of_the_same_bits(model):
    def tamper():
        model.norm.running_mean.add_(1)
        model.norm.running_mean.sub_(1)

    with bnfreeze.guard(model):
        tamper()
    with pytest.raises(bnfreeze.DriftError, match=r"aten.add_.Tensor, called at .*test_guard.py:"):
        with bnfreeze.guard(model, trace=True):
            model.load_state_dict(model.state_dict())
            model.norm.running_mean.copy_(model.norm.running_mean.clone())
            tamper()


def test_a_trace_blames_no_operation_for_a_write_that_it_did_not_see(model):
    with pytest.raises(bnfreeze.DriftError) as caught:
        with bnfreeze.guard(model, trace=True):
            model.norm.running_mean.numpy()[1] = 3
            model(torch.randn(2, 4))
    (drift,) = caught.value.report.drifts
    assert (drift.operation, drift.cause_code) == (None, "undispatched")
    assert "trace=True" not in drift.remedy  # it is on


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda m: m.norm.weight.mul_(2), "norm.weight"),
        (lambda m: m.norm.weight.data.mul_(2), "norm.weight"),
        (lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}), "norm.weight"),
    ],
)
def test_a_trace_that_saw_the_first_write_does_not_ask_for_a_trace(model, write, name):
    with pytest.raises(bnfreeze.DriftError) as caught:
        with bnfreeze.guard(model, trace=True):
            write(model)
    (drift,) = caught.value.report.drifts
    assert (drift.name, drift.cause_code) == (name, "operation")
    assert drift.operation in drift.cause


def test_a_trace_is_raised_though_the_caller_swallows_it(model):
    changed = {"weight": model.norm.weight + 1}
    with pytest.raises(bnfreeze.DriftError, match=r"called at .*test_guard.py:"):
        with bnfreeze.guard(model, trace=True):
            try:
                model.norm.load_state_dict(changed, strict=False)
            except Exception:
                model.norm.weight.data.fill_(1)


def test_a_trace_sees_a_custom_operation_that_hides_its_write(model):
    library = torch.library.Library("bnfreeze_test", "DEF")
    library.define("quiet(Tensor x) -> Tensor")
    library.impl("quiet", lambda x: x.zero_().clone(), "CPU")
    with pytest.raises(bnfreeze.DriftError, match=r"bnfreeze_test.quiet"):
        with bnfreeze.guard(model, trace=True):
            torch.ops.bnfreeze_test.quiet(model.norm.weight)
    library._destroy()


def test_a_trace_sees_a_backward_too(model):
    class Meddling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            model.norm.running_var.mul_(2)
            return grad

    with pytest.raises(bnfreeze.DriftError, match=r"norm.running_var .*aten.mul_.Tensor"):
        with bnfreeze.guard(model, trace=True):
            Meddling.apply(model(torch.randn(2, 4))).backward()


def test_the_step_of_an_optimizer_that_is_whole_counts_and_not_of_one_inside(model):
    class Sharded(torch.optim.SGD):
        """As ZeroRedundancyOptimizer: each rank steps its own part, then the ranks send theirs."""

        def step(self, closure=None):
            self.optim.step()
            self.optim.step()

    optimizer = Sharded(model.head.parameters(), lr=0.1)
    optimizer.optim = torch.optim.SGD([model.head.weight], lr=0.1)
    with bnfreeze.guard(model, optimizer=optimizer) as watched:
        train(model, optimizer, 1)
    assert watched.step == 1


def test_the_steps_of_sam_are_those_of_its_base_optimizer(model):
    class SAM(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})
            self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1)

        def second_step(self):
            self.base_optimizer.step()

    optimizer = SAM(model.head.parameters())
    with bnfreeze.guard(model, optimizer=optimizer) as watched:
        for _ in range(2):
            model(torch.randn(3, 4)).backward()
            optimizer.second_step()
    assert watched.step == 2
