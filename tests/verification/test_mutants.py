"""Every mutant of the catalogue is real, and is named exactly."""

import gc
import re

import pytest
import torch

import bnfreeze
from tests.verification.mutants import MUTANTS, World, frozen

every_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.title)
dispatched = pytest.mark.parametrize(
    "mutant", [m for m in MUTANTS if m.writes is not None], ids=lambda mutant: mutant.title
)


def look(world: World) -> dict:
    """What the block is in which every mutant shows, found out without bnfreeze."""
    seen = {}
    members = {id(p) for group in world.optimizer.param_groups for p in group["params"]}
    for path, module in world.block.named_modules(remove_duplicate=False):
        seen[path] = (type(module), module.training, repr(module.__dict__.get("_bnfreeze")))
        seen[path, "kept"] = set(module._non_persistent_buffers_set)
        tensors = {**module._parameters, **module._buffers}
        tensors.update({k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)})
        for key, tensor in tensors.items():
            if tensor is None:
                continue
            dense = not (tensor.is_meta or tensor.is_sparse or tensor.dtype is torch.bfloat16)
            seen[path, key] = (
                id(tensor),
                type(tensor),
                tensor.dtype,
                tensor.shape,
                tensor.device,
                tensor.requires_grad,
                tensor.grad is None,
                id(tensor) in members,
                dense and tensor.data_ptr(),
                dense and tensor.detach().numpy().tobytes(),
            )
    return seen


@every_mutant
def test_a_mutant_is_real_and_named_exactly_by_its_values_and_by_its_digest(mutant):
    world = mutant.world()
    mutant.prepare(world)
    options = {"tensors": mutant.tensors, "optimizer": world.optimizer}
    snapshots = [bnfreeze.snapshot(world.model, digest=d, **options) for d in (False, True)]
    assert all(bnfreeze.verify(world.model, before).ok for before in snapshots)
    start = look(world)
    assert look(world) == start
    mutant.change(world)
    assert look(world) != start
    for before in snapshots:
        report = bnfreeze.verify(world.model, before)
        assert not report.ok
        assert {(drift.kind, drift.name) for drift in report.drifts} == mutant.drifts
        assert len(report.drifts) == len(mutant.drifts)
        assert all(drift.cause and drift.remedy for drift in report.drifts)
    with pytest.raises(bnfreeze.DriftError, match=re.escape(report.drifts[0].name)):
        bnfreeze.assert_frozen(world.model, snapshots[0])


@dispatched
def test_tracing_names_the_very_line(mutant):
    world = mutant.world()
    mutant.prepare(world)
    watch = bnfreeze.guard(world.model, tensors=mutant.tensors, trace=True)
    with pytest.raises(bnfreeze.DriftError) as caught, watch:
        mutant.change(world)
    drift = caught.value.report.drifts[0]
    file, _, line = drift.where.rpartition(":")
    assert (file.rpartition("/")[2], int(line)) == ("mutants.py", mutant.line)
    assert drift.operation
    assert (drift.kind, drift.name) in mutant.drifts
    assert f"{drift.where}" in str(caught.value)
    if "checkpoint(" in mutant.writes:
        # An exception out of a checkpointed forward leaves torch's saved-tensor hooks in place
        # until its traceback is collected, and then they meet the next test's tensors.
        del caught, drift, watch
        gc.collect()


@pytest.mark.parametrize(
    "mutant", [m for m in MUTANTS if m.writes is None], ids=lambda mutant: mutant.title
)
def test_what_torch_does_not_dispatch_is_found_at_the_end_of_a_traced_block(mutant):
    world = mutant.world()
    mutant.prepare(world)
    watch = bnfreeze.guard(
        world.model, tensors=mutant.tensors, trace=True, optimizer=world.optimizer
    )
    with pytest.raises(bnfreeze.DriftError) as caught, watch:
        mutant.change(world)
    assert {(drift.kind, drift.name) for drift in caught.value.report.drifts} == mutant.drifts


@every_mutant
def test_a_guard_that_has_found_nothing_before_finds_it(mutant):
    world = mutant.world()
    mutant.prepare(world)
    watch = bnfreeze.guard(world.model, tensors=mutant.tensors, optimizer=world.optimizer)
    with pytest.raises(bnfreeze.DriftError) as caught, watch:
        # From the second check on, it first takes a quick look.
        assert watch.check() is watch.check() or not watch._unchanged
        mutant.change(world)
    assert {(drift.kind, drift.name) for drift in caught.value.report.drifts} == mutant.drifts


def test_a_change_that_is_none_goes_unnoticed():
    world = frozen()
    before, start = bnfreeze.snapshot(world.model), look(world)
    world.bn.running_mean.add_(0.0)
    assert look(world) == start
    assert bnfreeze.verify(world.model, before).ok


def test_a_titled_mutant_stands_once():
    assert len({mutant.title for mutant in MUTANTS}) == len(MUTANTS) >= 70
