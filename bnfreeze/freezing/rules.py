"""Which modules a set of rules selects, and with which policy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bnfreeze.errors import PolicyError
from bnfreeze.inspection.unregistered import unregistered
from bnfreeze.norm_layers import NamedModule, foreign_remedy, is_foreign, is_norm, nearest
from bnfreeze.patterns import Pattern
from bnfreeze.policies.policy import Policy

_STATELESS = re.compile(r"(Layer|Group|RMS|Instance)_?Norm")


# A pattern, and the policy of what it matches.
Rule = tuple[Pattern, Policy]


def parse_rules(policy: object) -> tuple[Rule, ...]:
    """Read what `freeze` takes: one policy for the whole model, or a mapping pattern → policy.

    Raises:
        PolicyError: an unknown policy, a malformed pattern, or an empty mapping.
    """
    if not isinstance(policy, Mapping):
        return ((Pattern.parse(""), Policy.parse(policy)),)  # type: ignore[arg-type]
    if not policy:
        raise PolicyError("The mapping of patterns to policies is empty: nothing to freeze.")
    rules = []
    for text, value in policy.items():
        pattern = Pattern.parse(text)
        try:
            rules.append((pattern, Policy.parse(value)))
        except PolicyError as error:
            raise PolicyError(f"Rule {text!r}: {error}") from None
    return tuple(rules)


def policies_for(
    modules: Sequence[NamedModule], rules: Sequence[Rule]
) -> list[tuple[NamedModule, Policy]]:
    """Each module that a rule matches by any of its names, with the policy of the last such rule.

    Raises:
        PolicyError: a rule that selects nothing, with the nearest existing names. A rule ``none``
            needs to match any module at all.
    """
    chosen: dict[int, tuple[NamedModule, Policy]] = {}
    for rule in rules:
        reached = {
            index: (entry, policy)
            for index, entry in enumerate(modules)
            if rule[0].matches(*entry.all_names) and (policy := _policy_of(rule, entry)) is not None
        }
        if not any(not policy or eligible(e.module, policy) for e, policy in reached.values()):
            raise PolicyError(_nothing_found(modules, rule))
        chosen |= reached
    wanted = [pattern.text for pattern, policy in rules if policy]
    if wanted and not any(p and eligible(e.module, p) for e, p in chosen.values()):
        raise PolicyError(
            f"Nothing would be frozen: a later rule 'none' also matches all that "
            f"{' and '.join(map(repr, wanted))} matches. The last rule that matches wins, so put "
            f"the general rules first."
        )
    return [chosen[index] for index in sorted(chosen)]


def _policy_of(rule: Rule, entry: NamedModule) -> Policy | None:
    """The policy that a rule gives to a module that it matches; None if it leaves it as it is.

    A foreign norm layer is frozen only by a rule that means it, and not just the whole model. If
    it has modules inside, it may be a large part of the model: the rule must match it by itself.
    """
    module, (pattern, policy) = entry.module, rule
    if not is_foreign(module) or isinstance(module, torch.jit.ScriptModule):
        return policy
    above = [""] if entry.name else []
    if any(True for _ in module.children()):
        above = [name.rpartition(".")[0] for name in entry.all_names]
    if not pattern.matches(*above):
        return policy
    return Policy.WEIGHTS if Policy.WEIGHTS in policy and module._parameters else None


def eligible(module: nn.Module, policy: Policy) -> bool:
    """Whether the policy freezes something of the module."""
    if is_norm(module):
        return True
    return Policy.WEIGHTS in policy and any(p is not None for p in module._parameters.values())


def _nothing_found(modules: Sequence[NamedModule], rule: Rule) -> str:
    pattern, wanted = rule
    what = "norm layer" + (" and no parameter" if Policy.WEIGHTS in wanted else "")
    reached = [entry for entry in modules if pattern.matches(*entry.all_names)]
    for entry in reached:
        if wanted and is_foreign(entry.module):
            return (
                f"{entry.name or 'The model'} is a {type(entry.module).__name__}, which keeps "
                f"running statistics in a way of its own; there is no other norm layer. "
                + foreign_remedy(entry.module, entry.plain_names[0], str(wanted))
            )
    if wanted and not any(eligible(entry.module, wanted) for entry in modules):
        for path in unregistered(modules):
            return (
                f"The model has no {what} that it has registered; {path} is not. Keep it in "
                f"an nn.ModuleList or nn.ModuleDict, or call freeze on it."
            )
        # By name: of RMSNorm there are many.
        kinds = {type(entry.module) for entry in modules}
        others = sorted(
            {k.__name__ for k in kinds if any(_STATELESS.search(b.__name__) for b in k.__mro__)}
        )
        if others and Policy.WEIGHTS not in wanted:
            return (
                f"No batch norm here: the model normalises with {' and '.join(others)}, and these "
                f"keep no running statistics. To freeze weights, use the policy 'weights'."
            )
        return f"The model has no {what}: policy {str(wanted)!r} would freeze nothing."
    problem = "matches no module."
    if reached:
        more = f" and {len(reached) - 1} more modules" if len(reached) > 1 else ""
        problem = f"matches {reached[0].name!r}{more}, but no {what}."
    if set("[]{}()|") & set(pattern.text):
        problem += " Only *, ? and ** are special in a pattern."
    near = nearest(pattern.text, [entry for entry in modules if eligible(entry.module, wanted)])
    return f"Pattern {pattern.text!r} {problem}{near}"
