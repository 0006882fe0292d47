"""Which class a norm layer gets, so that it does what its policy says."""

from __future__ import annotations

from torch import nn

from bnfreeze.norm_layers import has_known_forward
from bnfreeze.policies.class_swap import FrozenLayer, make_class
from bnfreeze.policies.eval import ForceEval, ForceEvalInstance, ForceEvalOnCopies
from bnfreeze.policies.fused import fused_class
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, was_lookalike
from bnfreeze.policies.stats import BatchOnly, OnCopies
from bnfreeze.torch_private import _BatchNorm, _InstanceNorm

__all__ = ["frozen_class"]


def frozen_class(module: nn.Module, policy: Policy) -> tuple[type[nn.Module], Policy, str]:
    """The class that a norm layer gets, the policy that it then follows, and a note."""
    base, note = layer_class(module), ""
    if Policy.FUSED in policy:
        kind, why = fused_class(module, activations=Policy.FUSED_ACT in policy)
        if kind is not None:
            return kind, policy, ""
        if not was_lookalike(module):
            # The strongest policy that does not change what the layer computes.
            policy = policy & Policy.WEIGHTS | Policy.EVAL | Policy.AFFINE
            note = f"not fused: {why}"
    if was_lookalike(module):
        return base, policy, "frozen already, by its own class"
    known = has_known_forward(module, base) and base.train is nn.Module.train
    behaviour: type[FrozenLayer] = FrozenLayer
    if policy.forces_eval and issubclass(base, _InstanceNorm):
        behaviour = ForceEvalInstance
    elif policy.forces_eval:
        behaviour = ForceEval if known else ForceEvalOnCopies
    elif policy.freezes_statistics:
        behaviour = BatchOnly if known and base.forward is _BatchNorm.forward else OnCopies
    return make_class(base, behaviour), policy, note
