"""What the policy `fused-act` fuses in each model, and whether it computes what `fused` does.

The quick models run with the tests. The whole table is one command::

    python -m tests.fusion.fusions
    python -m tests.fusion.fusions resnet      # those whose name contains a word
"""

import copy
import sys
from collections import Counter

import timm
import torch
import torchvision
from rich.console import Console
from rich.table import Table

from bnfreeze import freeze
from tests.sweeps import torchvision_models

# Of each model what follows its norm layers in the real data flow: how many are followed by an
# activation that can be fused, by a sum, by a sum and an activation.
FOLLOWED = {
    "resnet18": (9, 0, 11),
    "resnet50": (33, 0, 20),
    "regnet_x_400mf": (45, 0, 26),
    "densenet121": (121, 0, 0),
    "googlenet": (59, 0, 0),
    "inception_v3": (96, 0, 0),
    "vgg11_bn": (8, 0, 0),
    "mobilenet_v2": (35, 10, 0),
    "mobilenet_v3_small": (23, 6, 0),
    "efficientnet_b0": (33, 9, 0),
    "mnasnet1_0": (35, 10, 0),
    "shufflenet_v2_x1_0": (37, 0, 0),
}

MODELS = [
    *FOLLOWED,
    "resnet101",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "regnet_y_400mf",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "r2plus1d_18",
    "timm/resnet18",
    "timm/resnet50",
    "timm/resnet50d",
    "timm/resnext50_32x4d",
    "timm/seresnet50",
    "timm/ecaresnet26t",
    "timm/resnetv2_50",
    "timm/resnet50_gn",
    "timm/efficientnet_b0",
    "timm/mobilenetv3_small_100",
]


def build(name):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    return torchvision_models.build(name)


def batch(name):
    torch.manual_seed(1)
    return (
        (torch.randn(2, 3, 64, 64),) if name.startswith("timm/") else torchvision_models.batch(name)
    )


def lively(model):
    """The model with norm layers that are not those of a new model, which are the identity."""
    for layer in torchvision_models.norm_layers(model).values():
        with torch.no_grad():
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 1.5)
            if layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.3, 0.3)
    return model


def result(model, inputs):
    """The output in train mode, and all gradients of one backward pass."""
    torch.manual_seed(2)
    inputs = copy.deepcopy(inputs)
    model.zero_grad()
    if isinstance(inputs[0], torch.Tensor):
        inputs[0].requires_grad_()
    model.train()
    output = model(*inputs)
    loss = torchvision_models.total(output)
    if loss.requires_grad:
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if isinstance(inputs[0], torch.Tensor):
        gradients["input"] = inputs[0].grad
    return output, gradients


def same_as_fused(model, inputs, traceable=()):
    """Whether outputs and gradients in train mode are those of `fused`, bit for bit.

    What `fused` does not fuse, timm's layers with an activation inside, differentiates in another
    order: there the gradients agree to 1e-5.
    """
    other = copy.deepcopy(model)
    report = freeze(model, "fused")
    freeze(other, "fused-act", traceable=traceable)
    (output, gradients), (output2, gradients2) = result(model, inputs), result(other, inputs)
    assert gradients
    if any(row.policy != "fused" for row in report.layers):
        same = gradients.keys() == gradients2.keys() and all(
            (gradients2[key] - value).norm() <= 1e-5 * value.norm() + 1e-12
            for key, value in gradients.items()
        )
    else:
        same = torchvision_models.equal(gradients, gradients2)
    return same and torchvision_models.equal(flat(output), flat(output2))


def flat(output):
    if isinstance(output, dict):
        return {key: value for key, value in output.items() if value is not None}
    if isinstance(output, tuple):
        return dict(enumerate(output))
    return output


def fused(report):
    """By name of each layer what it fuses."""
    return {row.name: row.fuses for row in report.layers}


def counts(report):
    return Counter(fused(report).values())


def reasons(report):
    """Why layers fuse nothing, or not always, and how many of them."""
    return Counter(row.note for row in report.layers if row.note)


KINDS = ("act", "add", "add+act", "affine+add", "affine+add+act", "fused")


def row(name):
    """One line of the table, and why layers fuse nothing or not always."""
    model = lively(build(name))
    if not any("Norm" in type(m).__name__ and hasattr(m, "running_mean") for m in model.modules()):
        return [name, "0"], Counter()
    report = freeze(copy.deepcopy(model), "fused-act")
    found = Counter()
    for layer, count in counts(report).items():
        words = [
            "act" if w in ("relu", "relu6", "silu", "hardswish") else w for w in layer.split("+")
        ]
        found["+".join(words)] += count
    same = "yes" if same_as_fused(model, batch(name)) else "NO"
    cells = [name, str(len(report.layers)), *(str(found[k] or "") for k in KINDS), str(found[""])]
    return [*cells, same], reasons(report)


def main(words):
    console = Console(width=120)
    table = Table("model", "layers", *KINDS, "nothing", "as fused")
    chosen = [name for name in MODELS if not words or any(word in name for word in words)]
    why, failed = {}, 0
    for name in chosen:
        print(name, file=sys.stderr, flush=True)
        cells, why[name] = row(name)
        table.add_row(*cells)
        failed += cells[-1] == "NO"
    console.print(table)
    console.print("Why layers fuse nothing, or not always:", style="bold")
    for name, found in why.items():
        for note, count in found.items():
            console.print(f"  {name}: {count} × {note}")
    console.print(
        "\nact is relu, relu6, silu or hardswish. As fused: outputs and gradients in train mode "
        "are those of the policy fused, bit for bit. Of timm's layers with an activation inside, "
        "which that policy does not fuse, the outputs are, and the gradients to 1e-5.\n"
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}."
    )
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
