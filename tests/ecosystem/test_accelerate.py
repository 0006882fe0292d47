"""Accelerate."""

import pytest

pytest.importorskip("accelerate")
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import bnfreeze
from tests.helpers import moved, state

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise

pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")


@pytest.fixture(autouse=True)
def afresh():
    """Accelerate keeps the settings of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(accelerator, model, loader):
    """The loop of Accelerate's guide, inside a guard."""
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=0.01, weight_decay=0.1)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with bnfreeze.guard(prepared, optimizer=optimizer) as watch:
        for _ in range(2):
            prepared.train()
            for images, labels in loader:
                with accelerator.accumulate(prepared):
                    optimizer.zero_grad()
                    loss = torch.nn.functional.cross_entropy(prepared(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
    return watch.step


@by_policy
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_keeps_the_promise(model, policy, precision, loader):
    freeze_by(model, policy)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    with keeps_its_promise(model, policy):
        assert train(accelerator, model, loader) == 4
    assert_frozen_as(model, policy)


@by_policy
def test_only_real_steps_are_counted(model, policy, loader):
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        assert train(Accelerator(cpu=True, gradient_accumulation_steps=2), model, loader) == 2
    assert_frozen_as(model, policy)


@by_policy
def test_a_saved_state_is_loaded_into_a_new_frozen_model(model, policy, loader, tmp_path):
    freeze_by(model, policy)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    fresh = type(model)()
    freeze_by(fresh, policy)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(fresh)
    accelerator.load_state(tmp_path / "state")
    assert moved(state(model), fresh) == set()
    assert accelerator.unwrap_model(prepared) is fresh
    assert_frozen_as(fresh, policy)


def test_bf16_models_that_are_unwrapped_can_be_unfrozen(model, loader):
    original = bnfreeze.inspect(model).layers
    bnfreeze.freeze(model, "fused-act")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    train(accelerator, model, loader)
    bnfreeze.unfreeze(accelerator.unwrap_model(model))
    assert bnfreeze.inspect(model).layers == original


def test_a_model_whose_weights_are_offloaded_is_recalibrated():
    from accelerate import cpu_offload

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta
    data = [torch.randn(16, 3, 4, 4) + 3 for _ in range(2)]
    assert not bnfreeze.probe(model, data)
    bnfreeze.recalibrate(model, data)
    assert "shifted" not in {layer.verdict for layer in bnfreeze.probe(model, data).layers}
    assert model[1].num_batches_tracked == 2
