"""Mixed precision, activation checkpointing, weight averages, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from bnfreeze import Policy, PolicyError, freeze, unfreeze
from tests.helpers import moved, state, statistics

from .checks import assert_frozen_as, by_policy, freeze_by, keeps_its_promise, train


@by_policy
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast_and_a_scaler(model, images, policy, dtype):
    freeze_by(model, policy)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with keeps_its_promise(model, policy):
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            with torch.autocast("cpu", getattr(torch, dtype)):
                loss = model(images).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_frozen_as(model, policy)


@by_policy
@pytest.mark.parametrize("cast", ["bfloat16", "double"])
def test_a_cast_model_trains(model, images, policy, cast):
    freeze_by(model, policy)
    getattr(model, cast)()
    images = images.to(model.fc.weight.dtype)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@by_policy
def test_channels_last(model, images, policy):
    freeze_by(model, policy)
    expected = copy.deepcopy(model).train()(images)
    model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    seen = []
    model.layer1.register_forward_hook(lambda _module, _args, out: seen.append(out))
    assert_close(copy.deepcopy(model).train()(images), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@by_policy
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_runs_twice_counts_once(model, images, policy, reentrant):
    freeze_by(model, policy)

    def forward(x):
        x = model.relu(model.bn1(model.conv1(x)))
        x = checkpoint(
            model.layer1, x.requires_grad_() if not x.requires_grad else x, use_reentrant=reentrant
        )
        x = checkpoint(model.layer2, x, use_reentrant=reentrant)
        return model.fc(x.mean((2, 3)))

    plain = copy.deepcopy(model).train()
    plain(images).square().mean().backward()
    model.train()
    forward(images).square().mean().backward()
    assert_close(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in plain.named_parameters() if p.grad is not None},
    )
    with keeps_its_promise(model, policy):
        train(model, images, forward=forward)
    assert_frozen_as(model, policy)


@by_policy
def test_gradients_accumulate(model, images, policy):
    freeze_by(model, policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with keeps_its_promise(model, policy):
        for _ in range(3):
            model.train()
            optimizer.zero_grad(set_to_none=False)
            for part in images.split(2):
                (model(part).square().mean() / 2).backward()
            optimizer.step()
    assert_frozen_as(model, policy)


@by_policy
@pytest.mark.parametrize("how", ["(SWA)", "(EMA)"])
def test_a_weight_average_is_frozen_too(model, images, policy, how):
    freeze_by(model, policy)
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if how == "(EMA)" else {}
    averaged = AveragedModel(model, use_buffers=True, **options)
    assert_frozen_as(averaged, policy)
    with keeps_its_promise(averaged.module, policy):
        for _ in range(3):
            train(model, images, steps=1)
            averaged.update_parameters(model)
    assert {row.actions for row in freeze(averaged, {"layer1": policy}).layers} == {()}
    assert_frozen_as(averaged, policy)


@by_policy
def test_update_bn_leaves_frozen_statistics_alone(model, images, policy):
    freeze_by(model, policy)
    averaged = AveragedModel(model)
    before = state(averaged.module)
    update_bn([images, images + 1], averaged)
    expected = set() if Policy.parse(policy).freezes_statistics else statistics(before)
    assert moved(before, averaged.module) == expected
    assert_frozen_as(averaged, policy)


@by_policy
def test_weight_norm_on_the_convolutions(model, images, policy):
    parametrizations.weight_norm(model.layer1.conv1)
    freeze_by(model, policy)
    parametrizations.weight_norm(model.layer2.conv1)
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)


@by_policy
def test_spectral_norm_on_the_convolutions(model, images, policy):
    parametrizations.spectral_norm(model.layer1.conv1)
    freeze_by(model, policy)
    with keeps_its_promise(model, policy, apart=("_u", "_v")):
        train(model, images)
    assert_frozen_as(model, policy)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@by_policy
def test_a_parametrized_layer_is_frozen(model, images, policy):
    parametrize.register_parametrization(model.bn1, "weight", Doubled())
    if Policy.parse(policy).freezes_affine and "weights" not in policy:
        with pytest.raises(PolicyError, match=r"bn1.*weight"):
            freeze_by(model, policy)
        policy = "none"
    else:
        freeze_by(model, policy)
    with keeps_its_promise(model, policy):
        train(model, images)
    unfreeze(model)
    parametrize.remove_parametrizations(model.bn1, "weight")
    assert type(model.bn1) is nn.BatchNorm2d
    assert all(parameter.requires_grad for parameter in model.parameters())


@by_policy
def test_a_frozen_layer_is_parametrized(model, images, policy):
    freeze_by(model, policy)
    parametrize.register_parametrization(model.bn1, "weight", Doubled())
    with keeps_its_promise(model, policy):
        train(model, images)
    assert_frozen_as(model, policy)
    with pytest.raises(PolicyError, match="bn1"):
        unfreeze(model)
    parametrize.remove_parametrizations(model.bn1, "weight")
    unfreeze(model)
    assert type(model.bn1) is nn.BatchNorm2d
    assert all(parameter.requires_grad for parameter in model.parameters())
