"""Freeze each of timm's models that has norm layers, train two steps, compare bits, verify, undo.

A few families run with the tests. The whole takes hours, so it goes on where it stopped: each model
adds a line to a file, and those that stand in it are passed over::

    python -m tests.sweeps.timm_models docs/timm_models.txt
    python -m tests.sweeps.timm_models some.txt resnet      # those whose name contains a word
    python -m tests.sweeps.timm_models some.txt --policies fused-act
"""

import copy
import functools
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import timm
import torch

from bnfreeze import freeze
from tests.sweeps import torchvision_models

POLICIES = ["eval+affine", "fused", "fused-act", "folded"]
LARGEST = 30e6  # parameters; larger ones are made of the same blocks
SIDES = (64, 96, 128, 160, 192, 224, 256)

# One model of each kind of norm layer and block that a test run has time for.
QUICK = [
    "resnet10t",
    "test_byobnet",
    "test_efficientnet",
    "mobilenetv4_conv_small_035",
    "repghostnet_050",
    "levit_conv_128s",
]


def families():
    """All architectures: one of each family (a module of timm), then another of each, and so on."""
    several = [timm.list_models(module=module) for module in timm.list_modules()]
    return [name for one in zip_longest(*several) for name in one if name is not None]


@functools.cache
def size(name):
    """How many parameters the model has, and how many norm layers; found without any memory."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(p.numel() for p in model.parameters()), len(torchvision_models.norm_layers(model))


def prepared(name):
    """The model, with the statistics of one batch, and that batch: as small as the model takes."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    channels, *_, default = model.default_cfg["input_size"]
    sides = [default] if model.default_cfg.get("fixed_input_size") else [*SIDES, default]
    for side in sides:
        torch.manual_seed(0)
        images = torch.randn(2, channels, side, side)
        try:
            with torch.no_grad():
                # In both modes: a branch may be there in one of them only.
                model.eval()(images)
                model.train()(images)
        except Exception as error:
            failure = error
        else:
            return model, (images,)
    raise failure


def acts_alike_in_both_modes(model, inputs):
    """Whether nothing but its norm layers makes train mode another function than eval mode."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = model(*inputs)
        model.train()
        for layer in torchvision_models.norm_layers(model).values():
            layer.eval()
        output = model(*inputs)
    return type(output) is type(expected) and torchvision_models.equal(output, expected)


def counts(model, policy):
    """By policy, how many norm layers it freezes then; and how many fuse something."""
    report = freeze(copy.deepcopy(model), policy)
    rows = [row for row in report.layers if row.name in report.facts]
    return Counter(row.policy for row in rows), sum(bool(row.fuses) for row in rows)


def line(name, policies=POLICIES):
    """What is checked for one model, in one line; None for a model that is passed over."""
    parameters, layers = size(name)
    if not layers or parameters > LARGEST:
        return None
    try:
        model, inputs = prepared(name)
    except Exception as error:
        return f"{name:42} {layers:6}  does not run by itself: {words_of(error)}"
    wrong = []
    for policy in policies:
        try:
            found = torchvision_models.check(copy.deepcopy(model), inputs, policy)
        except Exception as error:
            found = [words_of(error)]
        wrong += [f"{policy}: {line}" for line in found]
    alike = acts_alike_in_both_modes(model, inputs)
    layers_fused = fusing = 0
    try:
        layers_fused = counts(model, "fused")[0]["fused"]
        fusing = counts(model, "fused-act")[1]
        if alike and not torchvision_models.same_function(copy.deepcopy(model), inputs, policies):
            wrong.append("train mode is another function than eval mode")
    except Exception as error:
        wrong.append(words_of(error))
    return (
        f"{name:42} {layers:6} {layers_fused:6} {fusing:9} {inputs[0].shape[-1]:5}  "
        f"{'yes' if alike else '-':7} {'; '.join(wrong[:3]) or 'ok'}"
    )


def words_of(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def done(path):
    """By model, the lines that stand in the file."""
    known = set(timm.list_models())
    lines = path.read_text().splitlines() if path.exists() else []
    return {words[0]: line for line in lines if (words := line.split()) and words[0] in known}


def finish(path, policies=POLICIES):
    """Sort the file, and say at its end how much of timm it covers; how many models failed."""
    lines = done(path)
    sizes = {name: size(name) for name in timm.list_models()}
    fitting = {name for name, (n, layers) in sizes.items() if layers and n <= LARGEST}
    larger = sum(layers > 0 and n > LARGEST for n, layers in sizes.values())
    broken = [name for name in lines if "does not run by itself" in lines[name]]
    failed = [name for name in lines if not lines[name].endswith(" ok") and name not in broken]
    text = [
        f"{'model':42} {'layers':>6} {'fused':>6} {'fusing':>9} {'side':>5}  {'alike':7} result",
        *(lines[name] for name in sorted(lines)),
        "",
        f"{len(lines) - len(broken)} models × {', '.join(policies)}: {len(failed)} failed.",
        f"Of timm's {len(sizes)} architectures {len(fitting) + larger} have norm layers. Of these",
        f"{larger} have more than {LARGEST / 1e6:.0f} million parameters and were passed over, "
        f"{len(fitting - lines.keys())} were not",
        f"reached, and {len(broken)} do not run unfrozen either.",
        "",
        "layers: norm layers. fused: those that the policy fused makes frozen layers; others are",
        "frozen by eval+affine. fusing: those that fuse what follows them by fused-act.",
        "side: of the square images. alike: whether train mode, frozen, was compared bit for bit",
        "with eval mode; not where other parts of the model act by the mode.",
        f"torch {torch.__version__}, timm {timm.__version__}.",
    ]
    path.write_text("\n".join(text) + "\n")
    return len(failed)


def main(words):
    """Sweep what the file does not have yet."""
    (path, *words), policies = torchvision_models.asked_policies(words, POLICIES)
    path = Path(path)
    known = done(path)
    for name in families():
        if name in known or (words and not any(word in name for word in words)):
            continue
        found = line(name, policies)
        if found is not None:
            with path.open("a") as file:
                print(found.rstrip(), file=file)
    return 1 if finish(path, policies) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
