"""MMEngine's Runner."""

import pytest

pytest.importorskip("mmengine.hooks")  # it needs OpenCV
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its customary name

import bnfreeze
from bnfreeze import DriftError, PolicyError
from bnfreeze.integrations.mmengine import FreezeBatchNormHook
from tests.helpers import bits, moved, state

from .checks import (
    assert_frozen_as,
    by_policy,
    freeze_by,
    keeps_its_promise,
    resumed_in_a_new_model,
)

# MMEngine's own warnings: no visualizer, torch's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")

CONFIG = """
custom_imports = dict(imports=["bnfreeze.integrations.mmengine"])
custom_hooks = [
    dict(type="EMAHook", ema_type="StochasticWeightAverage", update_buffers=True),
    dict(type="FreezeBatchNormHook", policy={"net.**": POLICY}),
]
"""


class Recogniser(BaseModel):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images, labels, mode="tensor"):
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels)} if mode == "loss" else [logits]


class Nothing(BaseMetric):
    """Measures nothing; a validation needs a metric."""

    def process(self, *_):
        self.results.append(0)

    def compute_metrics(self, results):
        return {}


class Look(Hook):
    """Keeps what validation sees, which is the average."""

    def before_val_iter(self, runner, **batch):
        self.seen = state(runner.model.net)


@pytest.fixture
def runner(tmp_path, loader):
    """Makes a runner of two epochs on the CPU, validated and saved after each."""

    def runner(model, *hooks, **options):
        usual = {"train_cfg": {"by_epoch": True, "max_epochs": 2}}
        return Runner(
            Recogniser(model),
            str(tmp_path),
            train_dataloader=loader,
            val_dataloader=loader,
            val_evaluator=Evaluator(Nothing(prefix="nothing")),
            val_cfg={},
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1}},
            custom_hooks=list(hooks),
            log_level="ERROR",
            experiment_name=str(id(model)),
            **usual | options,
        )

    return runner


@by_policy
def test_a_hook_from_a_config_keeps_the_promise(model, policy, runner, tmp_path):
    config = Config.fromstring(CONFIG.replace("POLICY", repr(policy)), ".py")
    freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        bnfreeze.unfreeze(model)
        look = Look()
        runner(model, *config.custom_hooks, look).train()
    assert_frozen_as(model, policy)

    frozen = set(bnfreeze.snapshot(model).names)
    floats = {name for name, value in model.state_dict().items() if value.is_floating_point()}
    stored = torch.load(tmp_path / "epoch_2.pth", weights_only=False)["state_dict"]
    average = {name: bits(stored[f"net.{name}"]) for name in model.state_dict()}
    for copy in (average, look.seen):
        assert moved(copy, model) & floats == floats - frozen


def test_a_late_start_freezes_what_was_trained(model, runner):
    """Also in the average; and the optimizer keeps no momentum for it."""
    hook, look = FreezeBatchNormHook("eval+affine", start_step=1), Look()
    one = runner(model, EMAHook(update_buffers=True), hook, look)
    fresh = state(model)
    one.train()
    frozen = set(bnfreeze.snapshot(model).names)
    assert frozen <= moved(fresh, model)
    assert not frozen & moved(look.seen, model)
    assert not {model.bn1.weight, model.bn1.bias} & one.optim_wrapper.optimizer.state.keys()
    assert model.fc.weight in one.optim_wrapper.optimizer.state


def test_a_resumed_run_stays_frozen(model, runner, tmp_path, monkeypatch):
    # MMEngine 0.10.7 cannot read its own checkpoints with the default of torch 2.6 and later.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    runner(model, FreezeBatchNormHook()).train()
    with resumed_in_a_new_model(model, "eval+affine") as fresh:
        more = {"train_cfg": {"by_epoch": True, "max_epochs": 3}, "resume": True}
        path = str(tmp_path / "epoch_2.pth")
        runner(fresh, FreezeBatchNormHook(), load_from=path, **more).train()


def test_a_drift_ends_the_training_after_its_step(model, runner):
    class Meddle(Hook):
        def after_train_iter(self, runner, *_, **batch):
            model.bn1.running_mean += 1

    one = runner(model, FreezeBatchNormHook("eval"), Meddle())
    with pytest.raises(DriftError, match=r"bn1\.running_mean.* step 2"):
        one.train()


def test_what_is_impossible_is_an_error_before_the_first_step(model, runner):
    one = runner(model, FreezeBatchNormHook({"backbone": "eval"}, start_epoch=1))
    with pytest.raises(PolicyError, match="backbone"):
        one.train()
    assert one.iter == 0


def test_layers_that_a_hook_replaces_are_an_error(model, runner):
    class Convert(Hook):
        def before_train(self, runner):
            runner.model.net = nn.SyncBatchNorm.convert_sync_batchnorm(runner.model.net)

    with pytest.raises(PolicyError, match="SyncBatchNorm"):
        runner(model, FreezeBatchNormHook(), Convert()).train()
