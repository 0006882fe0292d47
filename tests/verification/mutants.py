"""The catalogue of mutants: each changes one thing in a frozen ResNet-18, or in a plain one.

To add one, add a line to `MUTANTS`: what it is called, the change as a lambda, and what a report
must then name, as "kind name" joined by "; ", where "~" stands for "layer1.0.bn1".

    world     the `World` in which it happens
    prepare   what is done before the snapshot
    tensors   which tensors the snapshot is of
    writes    for a change that torch dispatches: LINE where the lambda itself writes, or the text
              of the one line in this file that does; None where torch dispatches nothing
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import bnfreeze

LINE = "lambda"
BN = "layer1.0.bn1"
SOURCE = Path(__file__).read_text(encoding="utf-8").splitlines()

_templates: dict[bool, nn.Module] = {}


def _template(frozen: bool) -> nn.Module:
    if frozen not in _templates:
        torch.manual_seed(0)
        model = resnet18(num_classes=4)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, std=0.1)
                nn.init.uniform_(layer.running_var, 0.5, 2)
                layer.num_batches_tracked.fill_(100)
        if frozen:
            bnfreeze.freeze(model)
        _templates[frozen] = model
    return _templates[frozen]


@dataclass
class World:
    """A model in training and what is around it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)

    @property
    def block(self):
        # The model is inside where it is averaged.
        return getattr(self.model, "module", self.model).layer1[0]

    @property
    def bn(self):
        return self.block.bn1

    @property
    def other(self):
        return self.block.bn2

    @property
    def x(self):
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def forward(self):
        self.model.train()
        return self.model(self.x).sum()

    def use(self, kind, *parameters, **options):
        self.optimizer = kind(parameters or self.model.parameters(), **options)

    def step(self):
        self.optimizer.step()


def frozen():
    """All norm layers are frozen by "eval+affine"; the optimizer has the rest."""
    return World(copy.deepcopy(_template(True)))


def plain():
    """Nothing is frozen, and the model is in train mode."""
    return World(copy.deepcopy(_template(False)).train())


def plain_eval():
    """Nothing is frozen, and the model is in eval mode."""
    return World(copy.deepcopy(_template(False)).eval())


@dataclass
class Mutant:
    title: str
    change: Callable[[World], object]
    expected: str
    world: Callable[[], World] = frozen
    prepare: Callable[[World], object] = lambda w: None
    tensors: str = "frozen"
    writes: str | None = None

    @property
    def drifts(self) -> set[tuple[str, str]]:
        parts = [part.replace("~", BN).split(" ", 1) for part in self.expected.split("; ")]
        return {(kind, name) for kind, name in parts}

    @property
    def line(self) -> int:
        """The line in this file that writes."""
        if self.writes == LINE:
            return self.change.__code__.co_firstlineno
        (found,) = [n for n, text in enumerate(SOURCE, 1) if text.strip() == self.writes]
        return found


STATS = "value ~.running_mean; value ~.running_var; value ~.num_batches_tracked"
AFFINE = "value ~.weight; value ~.bias"
FORWARD = "return self.model(self.x).sum()"
STEP = "self.optimizer.step()"


def _nan(tensor, bits):
    tensor.view(torch.int32)[0] = bits


def _unused_zero(w):
    w.bn.running_mean[0] = 0.0


def _equal_sum(w):
    w.bn.running_mean[:2] = torch.tensor([0.25, 0.75])


def _tie(w):
    w.other.bias = w.bn.bias


def _extra(w):
    w.use(torch.optim.SGD, w.model.fc.weight, lr=0.01)
    w.optimizer.add_param_group({"params": [w.bn.weight]})


def _stale_momentum(w):
    w.use(torch.optim.SGD, w.bn.weight, lr=0.1, momentum=0.9)
    w.bn.weight.grad = torch.ones(64)
    w.optimizer.step()
    w.optimizer.zero_grad(set_to_none=False)


def _zeros(w, kind, **options):
    w.use(kind, w.bn.weight, lr=0.1, weight_decay=0.1, **options)
    w.bn.weight.grad = torch.zeros(64)


def _rerun(w):
    hidden = w.model.maxpool(w.model.conv1(w.x)).requires_grad_()
    checkpoint(w.model.layer1, hidden, use_reentrant=False).sum().backward()


def _average(w):
    w.model = AveragedModel(w.model)


def _as_buffer(w):
    bias = w.bn.bias.detach()
    del w.bn.bias
    w.bn.register_buffer("bias", bias)


def _donor():
    donor = copy.deepcopy(_template(False))
    with torch.no_grad():
        for tensor in [*donor.parameters(), *donor.buffers()]:
            tensor.add_(1)
    return donor


def _shifted(**tensors):
    return {name: value + 1 for name, value in tensors.items()}


S, V, M = BN, "value ~.running_mean", Mutant
# fmt: off
MUTANTS = [
    # Bits of an element.
    M("one bit of a float", lambda w: w.bn.running_mean.view(torch.int32)[3:4].bitwise_xor_(1), V, writes=LINE),
    M("the sign bit of a float", lambda w: w.bn.running_var[7].neg_(), "value ~.running_var", writes=LINE),
    M("one high bit of the count", lambda w: w.bn.num_batches_tracked.bitwise_xor_(1 << 40), "value ~.num_batches_tracked", writes=LINE),
    M("zero becomes minus zero", lambda w: w.bn.running_mean[0].neg_(), V, prepare=_unused_zero, writes=LINE),
    M("another NaN payload", lambda w: _nan(w.bn.running_mean, 0x7FC00001), V, prepare=lambda w: _nan(w.bn.running_mean, 0x7FC00000), writes="tensor.view(torch.int32)[0] = bits"),
    M("a number becomes NaN", lambda w: w.bn.running_mean[9].fill_(float("nan")), V, writes=LINE),
    M("two elements of equal sum swapped", lambda w: w.bn.running_mean[:2].copy_(torch.tensor([0.75, 0.25])), V, prepare=_equal_sum, writes=LINE),
    # Ways to write.
    M("fill_ through a view", lambda w: w.bn.running_mean[2:4].fill_(9), V, writes=LINE),
    M("copy_", lambda w: w.bn.running_mean.copy_(torch.ones(64)), V, writes=LINE),
    M("an EMA's lerp_", lambda w: w.bn.running_var.lerp_(torch.zeros(64), 0.001), "value ~.running_var", writes=LINE),
    M("out=", lambda w: torch.add(w.bn.running_mean, 1, out=w.bn.running_mean), V, writes=LINE),
    M("set_", lambda w: w.bn.running_mean.set_(torch.zeros(64)), V, writes=LINE),
    M("foreach", lambda w: torch._foreach_add_([w.bn.running_mean, w.bn.running_var], 1), "value ~.running_mean; value ~.running_var", writes=LINE),
    M("nn.init", lambda w: nn.init.zeros_(w.bn.weight), "value ~.weight", writes=LINE),
    M(".data written", lambda w: w.bn.weight.data.add_(1), "value ~.weight", writes=LINE),
    M(".data replaced", lambda w: setattr(w.bn.weight, "data", w.bn.weight.data + 1), "value ~.weight"),
    M("a numpy view", lambda w: w.bn.running_var.numpy().fill(7), "value ~.running_var"),
    M("a dlpack view", lambda w: torch.from_dlpack(w.bn.running_var).zero_(), "value ~.running_var", writes=LINE),
    M("assigned to the attribute", lambda w: setattr(w.bn, "running_mean", torch.zeros(64)), V),
    # Loading and averaging.
    M("load_state_dict", lambda w: w.model.load_state_dict(_donor().state_dict()), f"{STATS}; {AFFINE}", tensors=S, writes=LINE),
    M("load_state_dict of one tensor", lambda w: w.bn.load_state_dict(_shifted(bias=w.bn.bias), strict=False), "value ~.bias", writes=LINE),
    M("load_state_dict assigns equal values", lambda w: w.bn.load_state_dict(copy.deepcopy(w.bn.state_dict()), assign=True), "replaced ~.weight; replaced ~.bias"),
    M("load_state_dict assigns other values", lambda w: w.bn.load_state_dict(_shifted(running_mean=w.bn.running_mean), strict=False, assign=True), V),
    M("AveragedModel", lambda w: w.model.update_parameters(_donor()), f"{STATS}; {AFFINE}", prepare=_average, tensors=S, writes=LINE),
    # Dtype, shape, device.
    M("one buffer in half", lambda w: setattr(w.bn, "running_mean", w.bn.running_mean.half()), "dtype ~.running_mean"),
    M("the layer in bfloat16", lambda w: w.bn.bfloat16(), "dtype ~.weight; dtype ~.bias; dtype ~.running_mean; dtype ~.running_var"),
    M("the model in double", lambda w: w.model.double(), "dtype ~.running_mean", tensors=f"{S}.running_mean"),
    M("resized", lambda w: w.bn.running_mean.resize_(32), "shape ~.running_mean", writes=LINE),
    M("reshaped", lambda w: setattr(w.bn, "running_mean", w.bn.running_mean[None]), "shape ~.running_mean"),
    M("moved to meta", lambda w: setattr(w.bn, "running_mean", w.bn.running_mean.to("meta")), "device ~.running_mean; unverified ~.running_mean"),
    M("made sparse", lambda w: setattr(w.bn, "running_mean", w.bn.running_mean.to_sparse()), "unverified ~.running_mean"),
    # What is registered.
    M("a buffer removed", lambda w: delattr(w.bn, "num_batches_tracked"), "removed ~.num_batches_tracked"),
    M("a buffer set to None", lambda w: setattr(w.bn, "running_var", None), "removed ~.running_var"),
    M("a buffer added", lambda w: w.bn.register_buffer("extra", torch.ones(1)), "added ~.extra", tensors=S),
    M("a buffer added, not persistent", lambda w: w.bn.register_buffer("extra", torch.ones(1), persistent=False), "added ~.extra", tensors=S),
    M("a plain attribute added", lambda w: setattr(w.bn, "mask", torch.ones(1)), "added ~.mask", tensors=S),
    M("a buffer no longer persistent", lambda w: w.bn._non_persistent_buffers_set.add("running_mean"), "replaced ~.running_mean"),
    M("a parameter becomes a buffer", _as_buffer, "replaced ~.bias"),
    M("an equal parameter instead", lambda w: setattr(w.bn, "bias", nn.Parameter(w.bn.bias.detach().clone(), False)), "replaced ~.bias"),
    M("a non-persistent buffer moves", lambda w: w.bn.extra.add_(1), "value ~.extra", prepare=lambda w: w.bn.register_buffer("extra", torch.ones(1), persistent=False), tensors=S, writes=LINE),
    # Aliases.
    M("two parameters tied", lambda w: setattr(w.other, "bias", w.bn.bias), "replaced layer1.0.bn2.bias; aliasing ~.bias"),
    M("tied parameters split", lambda w: setattr(w.other, "bias", nn.Parameter(w.bn.bias.detach().clone(), False)), "replaced layer1.0.bn2.bias; aliasing ~.bias", prepare=_tie),
    M("two storages merged", lambda w: setattr(w.other.bias, "data", w.bn.bias.data), "aliasing ~.bias"),
    M("a tied parameter written under its other name", lambda w: w.other.bias.data.add_(1), "value ~.bias", prepare=_tie, writes=LINE),
    # The layer.
    M("unfrozen", lambda w: bnfreeze.unfreeze(w.model, BN), "thawed ~; requires-grad ~.weight; requires-grad ~.bias"),
    M("frozen otherwise", lambda w: bnfreeze.freeze(w.model, {BN: "stats+affine"}), "thawed ~"),
    M("its class given back", lambda w: setattr(w.bn, "__class__", nn.BatchNorm2d), "thawed ~"),
    M("another layer in its place", lambda w: setattr(w.block, "bn1", copy.deepcopy(w.bn)), "replaced ~.weight; replaced ~.bias"),
    M("parametrized", lambda w: nn.utils.parametrize.register_parametrization(w.bn, "weight", nn.Identity()), "thawed ~; removed ~.weight; added ~.parametrizations.weight.original"),
    M("convert_sync_batchnorm", lambda w: nn.SyncBatchNorm.convert_sync_batchnorm(w.model), "thawed ~", tensors=S),
    M("replace_all_batch_norm_modules_", lambda w: torch.func.replace_all_batch_norm_modules_(w.model), "removed ~.running_mean; removed ~.running_var; removed ~.num_batches_tracked", tensors=S),
    M("train() after eval()", lambda w: w.model.train(), "mode ~", plain_eval, tensors=S),
    M("train() of one layer", lambda w: w.bn.train(), "mode ~", plain_eval, tensors="norm"),
    M("requires_grad", lambda w: w.bn.weight.requires_grad_(), "requires-grad ~.weight"),
    M("requires_grad of a buffer", lambda w: w.bn.running_var.requires_grad_(), "requires-grad ~.running_var"),
    # The optimizer.
    M("put into the optimizer", lambda w: w.optimizer.add_param_group({"params": [w.bn.weight]}), "optimizer ~.weight"),
    M("taken out of the optimizer", lambda w: w.optimizer.param_groups.pop(), "optimizer ~.weight", prepare=_extra),
    M("a .grad left", lambda w: setattr(w.bn.weight, "grad", torch.ones(64)), "grad ~.weight"),
    M("a stale .grad and a step", World.step, "value ~.weight", prepare=lambda w: (w.use(torch.optim.SGD, lr=0.1), setattr(w.bn.weight, "grad", torch.ones(64))), writes=STEP),
    M("a step with momentum on a zero .grad", World.step, "value ~.weight", prepare=_stale_momentum, writes=STEP),
    M("AdamW decays a zero .grad", World.step, "value ~.weight", prepare=lambda w: _zeros(w, torch.optim.AdamW, foreach=False), writes=STEP),
    M("a foreach optimizer", World.step, "value ~.weight", prepare=lambda w: _zeros(w, torch.optim.AdamW, foreach=True), writes=STEP),
    M("a fused optimizer", World.step, "value ~.weight", prepare=lambda w: _zeros(w, torch.optim.AdamW, fused=True), writes=STEP),
    # The recipes that people copy, and what else runs a live layer.
    M("recipe: requires_grad=False on the buffers", World.forward, STATS, plain, prepare=lambda w: [b.requires_grad_(False) for b in w.model.buffers()], tensors=S, writes=FORWARD),
    M("recipe: momentum=0", World.forward, "value ~.num_batches_tracked", plain, prepare=lambda w: (setattr(w.bn, "momentum", 0.0), w.bn.requires_grad_(False)), tensors=S, writes=FORWARD),
    M("recipe: eval() once", World.forward, f"mode ~; {STATS}", plain_eval, tensors=S, writes=FORWARD),
    M("recipe: left out of the optimizer", World.forward, STATS, plain, prepare=lambda w: w.use(torch.optim.SGD, w.model.fc.weight), tensors=S, writes=FORWARD),
    M("no_grad in train mode", torch.no_grad()(World.forward), STATS, plain, tensors=S, writes=FORWARD),
    M("inference_mode in train mode", torch.inference_mode()(World.forward), STATS, plain, tensors=S, writes=FORWARD),
    M("recomputed under checkpointing", _rerun, STATS, plain, tensors=S, writes="checkpoint(w.model.layer1, hidden, use_reentrant=False).sum().backward()"),
    M("update_bn", lambda w: update_bn([w.x], w.model), STATS, plain, tensors=S, writes=LINE),
    M("update_bn on a layer in eval", lambda w: update_bn([w.x], w.model), STATS, plain_eval, tensors=S, writes=LINE),
    M("reset_running_stats", lambda w: w.bn.reset_running_stats(), STATS, plain, tensors=S, writes=LINE),
]
# fmt: on
