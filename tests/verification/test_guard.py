"""guard: checked after the steps that were asked for, and on the way out."""

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


def test_a_frozen_model_passes(model, optimizer):
    with bnfreeze.guard(model, optimizer=optimizer) as watch:
        train(model, optimizer, 5)
    assert watch.step == 5
    assert watch.report.ok


def test_a_drift_is_raised_by_the_step_after_which_it_was_seen(model, optimizer):
    watch = bnfreeze.guard(model, optimizer=optimizer)
    with pytest.raises(bnfreeze.DriftError, match=r"norm.running_mean drifted at step 3") as caught:
        with watch:
            train(model, optimizer, 9, drift_at=3)
    assert watch.step == 3
    (drift,) = caught.value.report.drifts
    assert (drift.name, drift.step, drift.since, drift.first_index) == (
        "norm.running_mean",
        3,
        2,
        (2,),
    )


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors on the CPU, compared as those on an accelerator are."""
    monkeypatch.setattr(on_device, "_on_cpu", lambda tensor: False)


def test_an_accelerators_verdict_comes_one_check_pending_and_names_its_own_step(
    model, optimizer, elsewhere
):
    watch = bnfreeze.guard(model, optimizer=optimizer)
    with pytest.raises(
        bnfreeze.DriftError, match=r"running_mean drifted at step 3: 1 of 4"
    ) as caught:
        with watch:
            train(model, optimizer, 9, drift_at=3)
    assert watch.step == 4
    (drift,) = caught.value.report.drifts
    assert (drift.step, drift.since, drift.first_index) == (3, 2, (2,))


def test_an_accelerators_verdict_on_the_last_step_is_read_on_exit(model, optimizer, elsewhere):
    with pytest.raises(bnfreeze.DriftError, match=r"running_mean drifted at step 5"):
        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer, 5, drift_at=5)
    with pytest.raises(bnfreeze.DriftError, match=r"drifted after step 2"):
        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer, 2)
            model.norm.running_mean[0] += 1


def test_a_drift_undone_before_the_verdict_is_read_is_a_drift_all_the_same(
    model, optimizer, elsewhere
):
    with (
        pytest.raises(bnfreeze.DriftError) as caught,
        bnfreeze.guard(model, optimizer=optimizer) as watch,
    ):
        train(model, optimizer, 2)
        model.norm.running_mean[2] += 1
        watch._pending.launch(
            [(watch.before.state.values["norm.running_mean"].tensor, model.norm.running_mean)]
        )
        # What was asked is computed in the order of the stream; here, as soon as it is asked.
        asked = watch._pending.differed()
        watch._pending._read = lambda: asked
        model.norm.running_mean.copy_(watch.before.state.values["norm.running_mean"].tensor)
        train(model, optimizer, 1)
    (drift,) = caught.value.report.drifts
    assert (drift.kind, drift.cause_code, drift.step) == ("value", "restored", 2)


def test_flags_are_compared_at_once_on_an_accelerator_too(model, optimizer, elsewhere):
    with pytest.raises(bnfreeze.DriftError) as caught:
        with bnfreeze.guard(model, optimizer=optimizer) as watch:
            bnfreeze.unfreeze(model)
            train(model, optimizer, 2)
    assert watch.step == 1
    assert {"requires-grad", "thawed"} < {drift.kind for drift in caught.value.report.drifts}


def test_a_frozen_model_on_an_accelerator_passes(model, optimizer, elsewhere):
    with bnfreeze.guard(model, optimizer=optimizer) as watch:
        train(model, optimizer, 5)
    assert (watch.step, watch.report.ok) == (5, True)


def test_with_every_the_steps_are_named_between_which_it_drifted(model, optimizer):
    with pytest.raises(bnfreeze.DriftError, match=r"drifted between steps 5 and 8:") as caught:
        with bnfreeze.guard(model, optimizer=optimizer, every=4):
            train(model, optimizer, 20, drift_at=6)
    assert caught.value.report.drifts[0].step == 8


def test_a_drift_after_the_last_step_is_seen_on_exit(model, optimizer):
    with pytest.raises(bnfreeze.DriftError, match=r"drifted after step 2:"):
        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer, 2)
            model.norm.running_mean[0] = 1


def test_a_drift_in_steps_not_yet_checked_is_seen_on_exit(model, optimizer):
    with pytest.raises(bnfreeze.DriftError, match=r"drifted between steps 1 and 3:"):
        with bnfreeze.guard(model, optimizer=optimizer, every=100):
            train(model, optimizer, 3, drift_at=2)


def test_without_an_optimizer_the_steps_of_all_count(model, optimizer):
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with bnfreeze.guard(model) as watch:
        train(model, optimizer, 2)
        other.step()
    assert watch.step == 3


def test_with_optimizers_only_theirs_count(model, optimizer):
    second = torch.optim.AdamW(model.head.parameters())
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with bnfreeze.guard(model, optimizer=[optimizer, second]) as watch:
        train(model, optimizer, 2)
        train(model, second, 1)
        other.step()
    assert watch.step == 3


def test_nothing_is_watched_once_the_block_is_left(model, optimizer):
    with bnfreeze.guard(model, optimizer=optimizer) as watch, bnfreeze.guard(model):
        train(model, optimizer, 1)
    train(model, optimizer, 2, drift_at=1)
    assert watch.step == 1


def test_the_exception_of_the_block_is_kept_and_the_drift_is_noted(model, optimizer):
    with warnings.catch_warnings(record=True) as warned, pytest.raises(ZeroDivisionError) as caught:
        warnings.simplefilter("always")
        with bnfreeze.guard(model, optimizer=optimizer):
            model.norm.running_var[0] = 9
            _ = 1 / 0
    # Before Python 3.11 exceptions have no notes.
    notes = getattr(caught.value, "__notes__", None) or [str(w.message) for w in warned]
    assert len(notes) == 1
    assert "norm.running_var drifted after step 0" in notes[0]


def test_the_exception_of_the_block_is_kept_where_warnings_are_errors(model):
    with pytest.raises(ZeroDivisionError), bnfreeze.guard(model):
        model.norm.running_var[0] = 9
        _ = 1 / 0


def test_the_exception_of_the_block_gets_no_note_where_nothing_drifted(model):
    with pytest.raises(ZeroDivisionError) as caught:
        with bnfreeze.guard(model):
            _ = 1 / 0
    assert not getattr(caught.value, "__notes__", [])


def test_a_failure_to_compare_does_not_hide_the_exception_of_the_block(model):
    with warnings.catch_warnings(record=True) as warned, pytest.raises(ZeroDivisionError) as caught:
        warnings.simplefilter("always")
        with bnfreeze.guard(model) as watch:
            watch._model = "no model any more"
            _ = 1 / 0
    notes = getattr(caught.value, "__notes__", None) or [str(w.message) for w in warned]
    assert "could not compare" in notes[0]


def test_the_step_itself_has_been_taken_when_the_drift_is_raised(model, optimizer):
    before = model.head.weight.detach().clone()
    with pytest.raises(bnfreeze.DriftError):
        with bnfreeze.guard(model, optimizer=optimizer):
            train(model, optimizer, 1, drift_at=1)
    assert not torch.equal(before, model.head.weight)


def test_putting_a_frozen_parameter_into_the_optimizer_is_seen(model, optimizer):
    with pytest.raises(bnfreeze.DriftError, match=r"norm.weight was put into the optimizer"):
        with bnfreeze.guard(model, optimizer=optimizer):
            optimizer.add_param_group({"params": [model.norm.weight]})
            train(model, optimizer, 1)


def test_it_can_be_asked_in_between(model):
    with pytest.raises(bnfreeze.DriftError, match="after step 0"):
        with bnfreeze.guard(model) as watch:
            assert watch.check().ok
            model.norm.bias.data += 1
            watch.check()


def test_it_can_be_used_again(model, optimizer):
    watch = bnfreeze.guard(model, optimizer=optimizer)
    for _ in range(2):
        with watch:
            train(model, optimizer, 2)
        assert watch.step == 2


def test_what_it_cannot_watch_is_refused(model, optimizer):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        bnfreeze.guard(model, every=0)
    with pytest.raises(TypeError, match="not Linear"):
        bnfreeze.guard(model, optimizer=model.head)
    with pytest.raises(bnfreeze.PolicyError, match="Nothing in the model is frozen"):
        bnfreeze.guard(Tiny()).__enter__()
    with pytest.raises(RuntimeError, match="not active"):
        bnfreeze.guard(model).check()


def test_its_repr_says_what_it_watches(model):
    with bnfreeze.guard(model, every=5, tensors="norm") as watch:
        text = repr(watch)
    for part in ("Tiny", "'norm'", "5 tensors", "every 5 steps", "step 0"):
        assert part in text


def test_a_drift_error_pickles_with_its_report(model):
    import pickle

    with pytest.raises(bnfreeze.DriftError) as caught, bnfreeze.guard(model):
        model.norm.running_mean[0] = 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.report == caught.value.report


# trace ------------------------------------------------------------------------------------------


def test_a_trace_leaves_a_frozen_model_alone(model, optimizer):
    with bnfreeze.guard(model, optimizer=optimizer, trace=True) as watch:
        train(model, optimizer, 3)
    assert watch.step == 3


def test_a_trace_sees_a_change_that_is_undone(model, optimizer):
    def tamper():
        model.norm.running_mean.add_(1)
        model.norm.running_mean.sub_(1)

    with bnfreeze.guard(model):
        tamper()
    with pytest.raises(bnfreeze.DriftError, match=r"aten.add_.Tensor, called at .*test_guard.py:"):
        with bnfreeze.guard(model, trace=True):
            tamper()


def test_a_write_of_the_same_bits_is_none(model):
    with bnfreeze.guard(model, trace=True):
        model.load_state_dict(model.state_dict())
        model.norm.running_mean.copy_(model.norm.running_mean.clone())


def test_a_trace_blames_no_operation_for_a_write_that_it_did_not_see(model):
    with pytest.raises(bnfreeze.DriftError) as caught:
        with bnfreeze.guard(model, trace=True):
            model.norm.running_mean.numpy()[1] = 3
            model(torch.randn(2, 4))
    (drift,) = caught.value.report.drifts
    assert drift.operation is None
    assert drift.cause_code == "undispatched"


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
    model.norm.weight.requires_grad_(False)
    with pytest.raises(bnfreeze.DriftError, match=r"bnfreeze_test.quiet"):
        with bnfreeze.guard(model, trace=True):
            torch.ops.bnfreeze_test.quiet(model.norm.weight)
    library._destroy()


def test_a_backward_is_seen_too(model):
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


class Accelerated(torch.optim.Optimizer):
    """As Accelerate's AcceleratedOptimizer: its base class was never initialised."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step(closure)

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_of_an_optimizer_in_a_wrapper_the_steps_are_counted(model, optimizer):
    wrapped = Accelerated(optimizer)
    with bnfreeze.guard(model, optimizer=wrapped) as watch:
        train(model, wrapped, 3)
    assert watch.step == 3
