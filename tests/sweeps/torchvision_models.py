"""Freeze every model of torchvision that has norm layers, train two steps, compare bits, undo.

The quick subset runs with the tests. The whole sweep is one command, which prints a table and the
count of models::

    python -m tests.sweeps.torchvision_models
    python -m tests.sweeps.torchvision_models resnet      # those whose name contains a word
    python -m tests.sweeps.torchvision_models --policies fused,fused-act
"""

import copy
import hashlib
import inspect as python_inspect
import sys

import torch
import torchvision
from rich.console import Console
from rich.progress import track
from torch import nn

from bnfreeze import Policy, PolicyError, freeze, snapshot, unfreeze, verify
from tests.helpers import statistics

POLICIES = [
    *("stats", "affine", "eval", "eval+affine", "eval+affine+weights"),
    *("fused", "fused-act", "folded"),
]
# Those with which train mode, frozen, computes what eval mode does.
SAME_AS_EVAL = {"eval", "fused", "fused-act", "folded", "folded+weights"}

# Those that a test run has time for: one of each family and task.
QUICK = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_x_400mf",
    "densenet121",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "ssdlite320_mobilenet_v3_large",
    "r2plus1d_18",
]


def names():
    """All models of the four kinds; which of them have norm layers is seen once they are built."""
    models = torchvision.models
    modules = (models, models.segmentation, models.detection, models.video)
    return [name for module in modules for name in models.list_models(module)]


def build(name):
    """The model with random weights, without any download."""
    builder = torchvision.models.get_model_builder(name)
    options = {"weights": None}
    accepted = python_inspect.signature(builder).parameters
    if name.startswith(("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos")):
        options |= {"min_size": 64, "max_size": 64}  # or they enlarge what they are given to 800
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    # GoogLeNet and Inception warn unless their initialisation is asked for; the quick one will do.
    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False
    return builder(**options)


def kind(name):
    models = torchvision.models
    for what in ("segmentation", "detection", "video"):
        if name in models.list_models(getattr(models, what)):
            return what
    return "classification"


def prepared(name):
    """The same model each time, with the statistics of one batch, and that batch."""
    torch.manual_seed(0)
    model, inputs = build(name), batch(name)
    with torch.no_grad():
        model.train()(*inputs)
    return model, inputs


def state(model):
    """A digest of each tensor's bytes: the largest models would not fit into memory thrice."""
    return {
        name: hashlib.sha256(
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        ).digest()
        for name, value in model.state_dict().items()
    }


def moved(before, model):
    """The names whose bytes differ from those of `before`."""
    after = state(model)
    return {name for name in before if before[name] != after[name]}


def norm_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
    }


def batch(name):
    """An input as small as the model takes, and what it needs to give a loss."""
    if kind(name) == "detection":
        images = [torch.rand(3, 64, 64) for _ in range(2)]
        one = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
        if name.startswith("mask"):
            one["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
        if name.startswith("keypoint"):
            one["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
        return images, [copy.deepcopy(one) for _ in images]
    if kind(name) == "video":
        size = 224 if name.startswith(("mvit", "swin", "s3d")) else 64
        return (torch.randn(2, 3, 16 if name.startswith(("mvit", "s3d")) else 4, size, size),)
    if name == "inception_v3":
        return (torch.randn(2, 3, 299, 299),)
    if name.startswith("maxvit"):
        return (torch.randn(2, 3, 224, 224),)
    return (torch.randn(2, 3, 64, 64),)


def total(output):
    """One number out of whatever the model returns in train mode."""
    if isinstance(output, torch.Tensor):
        return output.float().square().mean()
    values = output.values() if isinstance(output, dict) else output
    return sum(total(value) for value in values if value is not None)


def description(model):
    return {
        name: (type(m), m.training, getattr(m, "momentum", None), getattr(m, "eps", None))
        for name, m in model.named_modules()
    } | {name: p.requires_grad for name, p in model.named_parameters()}


def two_steps(model, inputs):
    """Two AdamW steps as a hostile loop takes them; the names of what got a gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    received = set()
    for _ in range(2):
        model.train()
        optimizer.zero_grad(set_to_none=False)
        loss = total(model(*inputs))
        if loss.requires_grad:
            loss.backward()
        received |= {n for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return received


def check(model, inputs, policy, head=None):
    """Freeze, train, compare, undo; a line for each broken promise.

    The policy is that of every module, but for those named by the pattern `head`, if any.
    """
    wrong = []
    flags = Policy.parse(policy)
    original, owners = description(model), set(norm_layers(model))
    report = freeze(model, {"**": policy, head: "none"} if head else policy)
    if not owners <= {row.name for row in report.layers}:
        wrong.append("a norm layer is not in the report")
    before = state(model)
    try:
        noted = snapshot(model)
    except PolicyError as error:
        noted = None
        wrong.append(f"snapshot: {error}")
    received = two_steps(model, inputs)
    changed = moved(before, model)
    if noted is not None and not (verified := verify(model, noted)).ok:
        wrong.append(f"verify: {verified.message}")
    mine = {name for name in before if name.rpartition(".")[0] in owners}
    stats = statistics(mine)
    frozen = set()
    frozen |= stats if flags.freezes_statistics else set()
    frozen |= mine - stats if flags.freezes_affine else set()
    frozen |= {n for n, _ in model.named_parameters()} if Policy.WEIGHTS in flags else set()
    frozen -= {name for name in frozen if head and name.startswith(f"{head}.")}
    wrong += [f"{name} is frozen and moved" for name in sorted(frozen & changed)]
    # A parameter whose gradient is exactly 0 has weight decay to move it, unless it is 0 itself.
    still = {n for n in received - frozen - changed if dict(model.named_parameters())[n].any()}
    wrong += [f"{name} should train and did not move" for name in sorted(still)]
    trained = set() if flags.freezes_statistics else {n for n in stats if "batches" in n}
    # A layer that the forward pass leaves out counts nothing (auxiliary heads in some models).
    if trained and not trained & changed:
        wrong.append("statistics should update and none did")
    values = state(model)
    unfreeze(model)
    model.train()
    if description(model) != original:
        wrong.append("unfreeze did not give back what was there")
    if moved(values, model):
        wrong.append("unfreeze changed values")
    return wrong


# What acts otherwise in train mode besides norm layers, so that outputs cannot be compared.
_RANDOM = ("Dropout", "StochasticDepth", "DropPath")


def acts_alike_in_both_modes(name, model):
    if kind(name) == "detection" or name in {"googlenet", "inception_v3"}:
        return False
    return not any(
        type(m).__name__.startswith(_RANDOM) and getattr(m, "p", 0) > 0 for m in model.modules()
    )


def same_function(model, inputs, policies):
    """Whether train mode, frozen, gives the output of a plain copy's eval mode.

    Bit for bit, but for `folded`: there to 1e-4.
    """
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(*inputs)
        for policy in policies:
            freeze(model, policy)
            output = model.train()(*inputs)
            unfreeze(model)
            if not equal(output, expected, 1e-4 if "folded" in policy else 0.0):
                return False
    return True


def equal(left, right, tolerance=0.0):
    """Whether two outputs hold the same numbers in the same places."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            equal(left[key], right[key], tolerance) for key in left
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(
            equal(*pair, tolerance) for pair in zip(left, right, strict=True)
        )
    return torch.equal(left, right) or (
        tolerance > 0 and bool((left - right).norm() <= tolerance * right.norm())
    )


def sweep(name, policies=POLICIES):
    """All that is checked for one model.

    Returns:
        None for a model without norm layers; otherwise the number of these, whether the outputs
        could be compared, and a line for each broken promise.
    """
    count = len(norm_layers(build(name)))
    if not count:
        return None
    wrong = []
    for policy in policies:
        wrong += [f"{policy}: {line}" for line in check(*prepared(name), policy)]
    model, inputs = prepared(name)
    compared = acts_alike_in_both_modes(name, model)
    same = [policy for policy in policies if policy in SAME_AS_EVAL]
    if compared and not same_function(model, inputs, same):
        wrong.append("train mode is another function than eval mode")
    return count, compared, wrong


def asked_policies(words, default):
    """Take ``--policies a,b`` out of the words of a command line; return both."""
    if "--policies" not in words:
        return words, default
    at = words.index("--policies")
    return [*words[:at], *words[at + 2 :]], words[at + 1].split(",")


def main(words):
    """Sweep all models whose name contains one of the words; print a line for each."""
    words, policies = asked_policies(words, POLICIES)
    swept = without = 0
    failed = []
    chosen = [name for name in names() if not words or any(word in name for word in words)]
    print(f"{'model':42} {'norm layers':>11}  {'outputs equal':14}  wrong")
    for name in track(chosen, console=Console(stderr=True), description="sweep", transient=True):
        try:
            result = sweep(name, policies)
        except Exception as error:
            result = 0, False, [f"{type(error).__name__}: {error}"[:200]]
        if result is None:
            without += 1
            continue
        count, compared, wrong = result
        swept += 1
        failed += [name] if wrong else []
        equal = "yes" if compared else "not comparable"
        print(f"{name:42} {count:11}  {equal:14}  {'; '.join(wrong[:3])}".rstrip(), flush=True)
    print(
        f"\n{swept} models with norm layers × {', '.join(policies)}: {len(failed)} failed; "
        f"{without} models have none. torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}."
    )
    return 1 if failed or not swept else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
