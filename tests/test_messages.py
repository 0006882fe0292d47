"""The exact text of the messages that users meet most.

All other tests look at codes, names and numbers, so that wording can be improved here alone.
"""

import pytest
import torch
from torch import nn

import bnfreeze


def small():
    """A convolution and a norm layer with statistics that are not those of a new layer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].running_mean.fill_(0.5)
        model[1].num_batches_tracked += 1
    return model


def said(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the text is what is tested
        call()
    return str(caught.value)


def test_a_policy_that_does_not_exist():
    assert said(lambda: bnfreeze.freeze(small(), "evl")) == (
        "There is no policy 'evl'. Did you mean 'eval'? There are: none, stats, eval, fused, "
        "fused-act, folded, affine, weights; join several with '+'."
    )


def test_a_pattern_that_matches_nothing():
    model = nn.ModuleDict({"layer4": small()})
    assert said(lambda: bnfreeze.freeze(model, {"layr4": "eval"})) == (
        "Pattern 'layr4' matches no module. Did you mean 'layer4'?"
    )


def test_a_model_without_batch_norm():
    assert said(lambda: bnfreeze.freeze(nn.Sequential(nn.LayerNorm(4)))) == (
        "No batch norm here: the model normalises with LayerNorm, and these keep no running "
        "statistics. To freeze weights, use the policy 'weights'."
    )


def test_a_layer_without_running_statistics():
    model = nn.ModuleDict({"bn": nn.BatchNorm2d(4, track_running_stats=False)})
    assert said(lambda: bnfreeze.freeze(model, "eval")) == (
        "bn has no running statistics to normalise with (track_running_stats=False, or they were "
        "set to None), so policy 'eval' cannot be kept. Leave it out with the rule {'bn': 'none'}, "
        "or build it with track_running_stats=True."
    )


def test_a_path_in_place_of_a_model():
    assert said(lambda: bnfreeze.freeze("resnet.pth")) == (
        "Expected an nn.Module, not str. It looks like a path: build the model and load the file "
        "into it first."
    )


def test_the_recipe_of_a_single_eval():
    model = small()
    model[1].eval()
    before = bnfreeze.snapshot(model, tensors="1.running_mean")
    model.train()(torch.ones(2, 3, 5, 5) * torch.tensor([0.0, 1.0])[:, None, None, None])
    lines = said(lambda: bnfreeze.verify(model, before).raise_if_drifted()).splitlines()
    assert lines[0].startswith("1.running_mean drifted: 4 of 4 elements differ, first at [0] (0.5 ")
    assert lines[1] == (
        "The layer is a plain BatchNorm2d in training mode: model.train() was called after an "
        'eval() that does not last. Use freeze(model, "eval").'
    )


def test_nothing_drifted():
    model = small()
    bnfreeze.freeze(model)
    report = bnfreeze.verify(model, bnfreeze.snapshot(model))
    assert " ".join(str(report).split()) == (
        "5 tensors unchanged, bit for bit. A change that was undone between the two moments is "
        "seen by guard(trace=True) only."
    )


def test_the_verdict_of_freeze():
    assert bnfreeze.freeze(small(), "eval+weights").sheet().verdict == (
        "Statistics frozen: 1 of 1 norm layer. Weight and bias frozen: 1. "
        "Weights of other modules frozen: 1."
    )


def test_an_input_of_another_rank_or_with_other_channels():
    layer = bnfreeze.FrozenBatchNorm2d(4)
    assert said(lambda: layer(torch.zeros(8, 4))) == (
        "FrozenBatchNorm2d takes a 4D input with 4 channels; this one is 2D, of the shape (8, 4)."
    )
    assert said(lambda: layer(torch.zeros(1, 3, 2, 2))) == (
        "The input has the shape (1, 3, 2, 2); it must be (N, C, *) with C = 4 channels, as the "
        "running statistics have."
    )


def test_a_checkpoint_that_is_not_there(tmp_path):
    path = tmp_path / "nope.pth"
    assert said(lambda: bnfreeze.inspect(path)) == (
        f"{path}: Cannot be opened: No such file or directory."
    )


def test_a_new_layer_is_frozen():
    (finding,) = bnfreeze.inspect(nn.BatchNorm2d(2).eval()).findings[-1:]
    assert finding.code == "never-trained"
    assert finding.message == (
        "every mean is 0, every variance 1, and no batch was counted: these are the values of a "
        "new layer, which normalises nothing."
    )


def test_a_command_that_does_not_exist(capsys):
    from bnfreeze.cli import main

    with pytest.raises(SystemExit):
        main(["inspct", "a.pt"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bnfreeze: error: there is no command 'inspct'; did you mean 'inspect'?"
    )


def test_what_is_not_frozen_and_does_not_change():
    model = small().requires_grad_(False)
    sheet = bnfreeze.inspect(model).sheet()
    assert sheet.rows[0][5:7] == ("update", "fixed")
    assert sheet.legend == "fixed: does not change, but nothing keeps it so"
    assert bnfreeze.freeze(model, "eval").sheet().legend == sheet.legend
    bnfreeze.unfreeze(model)
    assert bnfreeze.freeze(model).sheet().legend == ""


def test_a_state_dict_beside_a_file_of_several_models():
    state = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    several = {"model": state, "ema": {name: tensor.clone() for name, tensor in state.items()}}
    assert said(lambda: bnfreeze.diff(state, several)).endswith(
        "has one without a key; state_dict has 'model', 'ema'. Choose with --key-b "
        "(in Python, for example: key=(None, 'model'))."
    )


def test_a_batch_that_the_model_does_not_take():
    with pytest.raises(RuntimeError) as caught:
        bnfreeze.probe(small(), [(torch.zeros(2, 3, 5, 5, dtype=torch.uint8), 0)])
    # Before Python 3.11 it is a warning.
    assert getattr(caught.value, "__notes__", []) in (
        [],
        [
            "bnfreeze called the model with the first item of the batch, a tensor of torch.uint8 "
            "with the shape (2, 3, 5, 5). If the model takes something else, pass "
            "forward=lambda model, batch: model(...)."
        ],
    )
