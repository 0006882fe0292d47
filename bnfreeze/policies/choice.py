"""Which class a norm layer gets, so that it does what its policy says."""

from __future__ import annotations

from torch import nn

from bnfreeze.norm_layers import has_known_forward
from bnfreeze.policies.class_swap import FrozenLayer, make_class
from bnfreeze.policies.eval import ForceEval, ForceEvalInstance, ForceEvalOnCopies
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class
from bnfreeze.policies.stats import BatchOnly, OnCopies
from bnfreeze.torch_private import _BatchNorm, _InstanceNorm

__all__ = ["frozen_class"]


def frozen_class(module: nn.Module, policy: Policy) -> type[nn.Module]:
    """The subclass of a norm layer's class that does what the policy says; always the same one."""
    base = layer_class(module)
    behaviour: type[FrozenLayer] = FrozenLayer
    if policy.forces_eval:
        behaviour = ForceEval if has_known_forward(module, base) else ForceEvalOnCopies
        if issubclass(base, _InstanceNorm):
            behaviour = ForceEvalInstance
    elif policy.freezes_statistics:
        torchs = base.forward is _BatchNorm.forward and has_known_forward(module, base)
        behaviour = BatchOnly if torchs else OnCopies
    return make_class(base, behaviour)
