"""The arms: every way to freeze, applied to a model or to a single layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

import bnfreeze
from benchmarks import peers
from benchmarks.facts import BASE

FOLLOWS = ("nothing", "relu", "add+relu")


@dataclass(frozen=True)
class Arm:
    """One way to freeze.

    Attributes:
        name: as it is shown.
        freeze: freezes, in place, a model in training mode that has plain batch norm layers.
        peer: the library that must be installed.
        frozen: whether the outputs are those of eval mode; false for the first arm only.
        alone: whether it works for a norm layer without a convolution before it.
        fuses: whether the layer also computes the residual add and the activation.
        compiled: Inductor's options; None if the model is not compiled.
        needs_frozen_weights: whether the result is right only if the convolutions do not train.
    """

    name: str
    freeze: Callable[[nn.Module], object]
    peer: str = ""
    frozen: bool = True
    alone: bool = True
    fuses: bool = False
    compiled: dict[str, bool] | None = None
    needs_frozen_weights: bool = False

    def model(self, live: nn.Module) -> nn.Module:
        """Return a frozen copy of a model, not compiled. ``live`` does not change."""
        model = copy.deepcopy(live).train()
        self.freeze(model)
        return model

    def layer(self, live: nn.BatchNorm2d, follow: str) -> nn.Module:
        """Return the frozen layer with the operations after it, one of `FOLLOWS`."""
        holder = self.model(nn.Sequential(live))
        return (Fusing if self.fuses else Following)(holder[0], follow)

    def ready(self, model: nn.Module) -> nn.Module:
        """Compile, if the arm is a compiled one. Call it last, before the first run."""
        if self.compiled is None:
            return model
        # Arms share code: compiling one must not count as a recompilation of another, nor make
        # its shapes dynamic. With fullgraph, a part that cannot be compiled is an error.
        torch._dynamo.config.recompile_limit = 1000
        return torch.compile(model, fullgraph=True, dynamic=False, options=self.compiled or None)


class Following(nn.Module):
    """A norm layer and the operations after it, in place, as in a ResNet."""

    def __init__(self, norm: nn.Module, follow: str) -> None:
        super().__init__()
        self.norm, self.follow = norm, follow

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.norm(x)
        if self.follow == "add+relu":
            y += residual
        return y if self.follow == "nothing" else y.relu_()


class Fusing(Following):
    """The same in one call of bnfreeze's layer."""

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


def _frozen(model: nn.Module) -> None:
    _eval(model, affine=False)


def _frozen_then(then: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        _frozen(model)
        then(model)

    return freeze


def _policy(policy: str) -> Callable[[nn.Module], object]:
    return lambda model: bnfreeze.freeze(model, policy)


_PLAIN = (
    Arm("BatchNorm2d, training", lambda model: model.train(), frozen=False),
    Arm("BatchNorm2d.eval(), affine trained", lambda model: _eval(model, affine=True)),
    Arm(BASE, _frozen),
    Arm("torchvision FrozenBatchNorm2d", peers.torchvision_layers, peer="torchvision"),
    Arm("timm freeze_batch_norm_2d", peers.timm_layers, peer="timm"),
    Arm("Transformers DetrFrozenBatchNorm2d", peers.transformers_layers, peer="transformers"),
    Arm(
        "MMEngine efficient_conv_bn_eval",
        _frozen_then(peers.mmengine_convolutions),
        peer="mmengine",
        alone=False,
    ),
    Arm("bnfreeze eval+affine", _policy("eval+affine")),
    Arm("bnfreeze fused", _policy("fused")),
    Arm("bnfreeze fused-act", _policy("fused-act"), fuses=True),
    Arm("bnfreeze folded", _policy("folded"), alone=False),
    Arm(
        "bnfreeze folded+weights",
        _policy("folded+weights"),
        alone=False,
        needs_frozen_weights=True,
    ),
)

_COMPILED = tuple(
    replace(arm, name=f"compile: {arm.name}", compiled={}) for arm in _PLAIN if arm.alone
)

_INDUCTOR = Arm(
    "compile: efficient_conv_bn_eval pass",
    _frozen,
    alone=False,
    compiled={"efficient_conv_bn_eval_fx_passes": True},
)

ARMS = (*_PLAIN, *_COMPILED, _INDUCTOR)

# If there is no time to compile all of them.
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
        # All others are ratios to the base.
        if (wanted or arm.name == BASE) and not peers.is_absent(arm.peer):
            yield arm
