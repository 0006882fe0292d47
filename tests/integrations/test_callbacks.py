"""What the trainers' callbacks share, without any trainer; theirs are in tests/ecosystem."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

import bnfreeze
import bnfreeze.integrations
from bnfreeze import BnfreezeWarning, DriftError, PolicyError
from bnfreeze.integrations.callback import FreezeCallback
from tests.helpers import step


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_parameters_are_checked_by_all_ranks_together(model, images, group):
    callback = FreezeCallback("eval+affine")
    callback.freeze(model)
    fully_shard(model, mesh=group)
    callback.watch(model)
    optimizer = step(model, images)
    model.stem[1].running_mean += 1
    with pytest.raises(DriftError, match=r"stem.1.running_mean drifted at step 2"):
        step(model, images, optimizer)
    callback.close(DriftError())


def test_an_unknown_policy_is_an_error_at_once():
    for policy in ("eval+afine", {"backbone": "evil"}):
        with pytest.raises(PolicyError, match="policy"):
            FreezeCallback(policy)


def test_what_was_thawed_is_frozen_again(model):
    callback = FreezeCallback("eval+affine")
    callback.freeze(model)
    first = callback.report
    assert not callback.freeze(model)
    assert callback.report is first
    model.requires_grad_(True)
    callback.freeze(model)
    assert not any(layer.trains_affine for layer in bnfreeze.inspect(model).layers)
    bnfreeze.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_new_guard_replaces_the_old_one_and_a_closed_one_is_over(model, images):
    callback = FreezeCallback("eval")
    callback.freeze(model)
    callback.watch(model)
    model.stem[1].running_mean += 1
    callback.watch(model)
    optimizer = step(model, images)
    callback.close()
    callback.close()
    model.stem[1].running_mean += 1
    step(model, images, optimizer)


def test_statistics_are_recalibrated_once_before_freezing(model, images):
    data = [images + 3, images - 1]
    callback = FreezeCallback("eval+affine", recalibrate=data)
    before = model.stem[1].running_mean.clone()
    callback.freeze(model)
    after = model.stem[1].running_mean.clone()
    assert "stem.1" in callback.recalibrated.recalibrated
    assert not torch.equal(before, after)
    callback.freeze(model)
    assert torch.equal(model.stem[1].running_mean, after)
    assert pickle.loads(pickle.dumps(callback)).recalibrated is None


def test_a_probe_warns_if_the_statistics_do_not_fit(model, images):
    callback = FreezeCallback("eval", probe=True)
    callback.freeze(model)
    model.stem[1].running_mean += 10
    with pytest.warns(BnfreezeWarning, match="do not fit"):
        callback.begin(model, [(images, None)] * 3)
    assert callback.probed.layers[0].verdict == "shifted"
    other = FreezeCallback("eval", probe=[images, images])
    with pytest.warns(BnfreezeWarning):
        other.begin(model)
    assert other.probed.batches == 2
    with pytest.raises(PolicyError, match="probe=loader"):
        callback.begin(model)
    quiet = FreezeCallback("eval")
    quiet.begin(model, [images])
    assert quiet.probed is None


def test_a_late_start_tries_the_policy_at_once(model):
    late = FreezeCallback({"stem": "eval", "nowhere": "eval"}, start_epoch=1)
    with pytest.raises(PolicyError, match="nowhere"):
        late.prepare(model)
    assert {layer.policy for layer in bnfreeze.inspect(model).layers} == {"none"}


def test_a_late_start_waits_for_epoch_and_step(model, images):
    late = FreezeCallback("eval+affine", start_epoch=1, start_step=3)
    assert not late.prepare(model)
    optimizer = step(model, images)
    frozen = []
    for epoch, steps in [(0, 0), (0, 5), (1, 2), (1, 3)]:
        late.at_batch(model, [optimizer], epoch, steps)
        frozen.append(late.started)
    assert frozen == [False, False, False, True]
    assert model.stem[1].weight not in optimizer.state
    step(model, images, optimizer)
    late.close()
    assert not late.started


def test_nothing_imports_a_trainer_but_who_asks_for_it():
    folder = Path(bnfreeze.integrations.__file__).parent
    modules = sorted({path.stem for path in folder.glob("*.py")} - {"__init__", "callback"})
    trainers = [*modules, "pytorch_lightning"]
    code = (
        "import sys, importlib, bnfreeze, bnfreeze.cli, bnfreeze.integrations; bnfreeze.freeze\n"
        f"trainers = {trainers}\n"
        "print([name for name in trainers if name in sys.modules])\n"
        "sys.modules.update(dict.fromkeys(trainers))\n"
        f"for name in {modules}:\n"
        "    try: importlib.import_module(f'bnfreeze.integrations.{name}')\n"
        "    except ImportError as error: print(error.name.partition('.')[0])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # What is missing where a trainer is not installed is named by the usual ImportError.
    missing = [{"lightning": "pytorch_lightning"}.get(name, name) for name in modules]
    assert ran.stdout.split("\n")[:-1] == ["[]", *missing]


@pytest.mark.slow
def test_pytorch_lightning_will_do():
    pytest.importorskip("pytorch_lightning")
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['lightning.pytorch'] = None\n"
        "from bnfreeze.integrations.lightning import FreezeBatchNorm\n"
        "import pytorch_lightning; print(isinstance(FreezeBatchNorm(), pytorch_lightning.Callback))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "True", ran.stderr
