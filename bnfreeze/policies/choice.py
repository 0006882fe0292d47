"""Which class a norm layer gets, so that it does what its policy says."""

from __future__ import annotations

from torch import nn

from bnfreeze.policies.class_swap import FrozenLayer, make_class
from bnfreeze.policies.eval import ForceEval, ForceEvalInstance
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.stats import BatchOnly, KeepStatistics
from bnfreeze.torch_private import _BatchNorm, _InstanceNorm

__all__ = ["frozen_class"]


def frozen_class(base: type[nn.Module], policy: Policy) -> type[nn.Module]:
    """The subclass of a norm layer's class that does what the policy says; always the same one."""
    behaviour: type[FrozenLayer] = FrozenLayer
    if policy.forces_eval:
        behaviour = ForceEvalInstance if issubclass(base, _InstanceNorm) else ForceEval
    elif policy.freezes_statistics:
        behaviour = BatchOnly if base.forward is _BatchNorm.forward else KeepStatistics
    return make_class(base, behaviour)
