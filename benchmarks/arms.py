"""The arms: every way to freeze, each ready to be put into a model or to stand alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

import bnfreeze
from benchmarks import folding, peers
from benchmarks.facts import BASE

FOLLOWS = ("nothing", "relu", "add+relu")


@dataclass(frozen=True)
class Arm:
    """One way to freeze.

    Attributes:
        name: as it is shown.
        freeze: freezes a model with live norm layers in training mode, in place.
        peer: the library that must be installed.
        frozen: whether the outputs are those of eval mode; only the live arm's are not.
        alone: whether it is a norm layer of its own, without a convolution before it.
        absorbs: whether its layer computes what follows along.
        compiled: whether the model is compiled, and with which of Inductor's options.
        holds_weights: whether it is right only while the convolutions do not train.
    """

    name: str
    freeze: Callable[[nn.Module], object]
    peer: str = ""
    frozen: bool = True
    alone: bool = True
    absorbs: bool = False
    compiled: dict[str, bool] | None = None
    holds_weights: bool = False

    def model(self, live: nn.Module) -> nn.Module:
        """Return a frozen copy of a model, not yet compiled; ``live`` is left as it is."""
        model = copy.deepcopy(live).train()
        self.freeze(model)
        return model

    def layer(self, live: nn.BatchNorm2d, follow: str) -> nn.Module:
        """Return the frozen layer with what follows it, one of `FOLLOWS`."""
        holder = self.model(nn.Sequential(live))
        return (Absorbing if self.absorbs else Following)(holder[0], follow)

    def ready(self, model: nn.Module) -> nn.Module:
        """Compile, if that is what the arm is about; the last thing before it is run."""
        if self.compiled is None:
            return model
        # Arms share their code: what stands for one must not count as another's recompilation,
        # nor make its shapes dynamic. With fullgraph nothing is left uncompiled in silence.
        torch._dynamo.config.recompile_limit = 1000
        return torch.compile(model, fullgraph=True, dynamic=False, options=self.compiled or None)


class Following(nn.Module):
    """A norm layer with what follows it in a ResNet, written as there, in place."""

    def __init__(self, norm: nn.Module, follow: str) -> None:
        super().__init__()
        self.norm, self.follow = norm, follow

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        if self.follow == "add+relu":
            y += residual
        return y if self.follow == "nothing" else y.relu_()


class Absorbing(Following):
    """The same in one call of our layer."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(
            x,
            residual if self.follow == "add+relu" else None,
            None if self.follow == "nothing" else "relu",
        )


def _eval(model: nn.Module, affine: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            if not affine:
                module.requires_grad_(False)


def _held(model: nn.Module) -> None:
    _eval(model, affine=False)


def _held_then(then: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        _held(model)
        then(model)

    return freeze


def _policy(policy: str) -> Callable[[nn.Module], object]:
    return lambda model: bnfreeze.freeze(model, policy)


def _folded(how: type[folding.Folded]) -> Callable[[nn.Module], None]:
    return _held_then(lambda model: folding.fold(model, how))


_PLAIN = (
    Arm("BatchNorm2d, training", lambda model: model.train(), frozen=False),
    Arm("BatchNorm2d.eval(), affine trained", lambda model: _eval(model, affine=True)),
    Arm(BASE, _held),
    Arm("torchvision FrozenBatchNorm2d", peers.torchvision_layers, peer="torchvision"),
    Arm("timm freeze_batch_norm_2d", peers.timm_layers, peer="timm"),
    Arm("Transformers DetrFrozenBatchNorm2d", peers.transformers_layers, peer="transformers"),
    Arm(
        "MMEngine efficient_conv_bn_eval",
        _held_then(peers.mmengine_convolutions),
        peer="mmengine",
        alone=False,
    ),
    Arm("bnfreeze eval+affine", _policy("eval+affine")),
    Arm("bnfreeze fused", _policy("fused")),
    Arm("bnfreeze fused-act", _policy("fused-act"), absorbs=True),
)

_COMPILED = tuple(
    replace(arm, name=f"compile: {arm.name}", compiled={}) for arm in _PLAIN if arm.alone
)

_INDUCTOR = Arm(
    "compile: efficient_conv_bn_eval pass",
    _held,
    alone=False,
    compiled={"efficient_conv_bn_eval_fx_passes": True},
)

_EXPERIMENTS = (
    Arm("experiment: folded", _folded(folding.Folded), alone=False),
    Arm("experiment: folded, epilogue", _folded(folding.FoldedEpilogue), alone=False),
    Arm("experiment: folded once", _folded(folding.FoldedOnce), alone=False, holds_weights=True),
)

ARMS = (*_PLAIN, *_COMPILED, _INDUCTOR, *_EXPERIMENTS)

# Where there is no time to compile each: two formulas, two of ours, and Inductor's own pass.
FEW_COMPILED = tuple(
    f"compile: {name}"
    for name in (
        BASE,
        "torchvision FrozenBatchNorm2d",
        "bnfreeze fused",
        "efficient_conv_bn_eval pass",
    )
)


def choose(patterns: Sequence[str], arms: Sequence[Arm] = ARMS) -> Iterator[Arm]:
    """Yield the installed arms that one of the patterns matches; all of them without patterns."""
    for arm in arms:
        wanted = not patterns or any(
            fnmatchcase(arm.name.lower(), f"*{pattern.lower()}*") for pattern in patterns
        )
        # The base is what the others are told by.
        if (wanted or arm.name == BASE) and not peers.is_absent(arm.peer):
            yield arm
