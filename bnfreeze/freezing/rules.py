"""Which modules a set of rules selects, and with which policy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bnfreeze.errors import PolicyError
from bnfreeze.norm_layers import NamedModule, is_norm
from bnfreeze.patterns import Pattern, nearest
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import record_of

__all__ = ["Rule", "Selected", "matching", "parse_rules", "selected_by"]


_STATELESS = re.compile(r"(Layer|Group|RMS|Instance)_?Norm")


@dataclass(frozen=True)
class Rule:
    """One entry of the mapping that `freeze` takes."""

    pattern: Pattern
    policy: Policy


def parse_rules(policy: object) -> tuple[Rule, ...]:
    """Read what `freeze` takes: one policy for the whole model, or a mapping pattern → policy.

    Raises:
        PolicyError: an unknown policy, a malformed pattern, or an empty mapping.
    """
    if not isinstance(policy, Mapping):
        return (Rule(Pattern.parse(""), Policy.parse(policy)),)  # type: ignore[arg-type]
    if not policy:
        raise PolicyError("The mapping of patterns to policies is empty: nothing to freeze.")
    rules = []
    for text, value in policy.items():
        pattern = Pattern.parse(text)
        try:
            rules.append(Rule(pattern, Policy.parse(value)))
        except PolicyError as error:
            raise PolicyError(f"Rule {text!r}: {error}") from None
    return tuple(rules)


@dataclass(frozen=True)
class Selected:
    """A module and the policy that the last matching rule gives it."""

    entry: NamedModule
    policy: Policy


def selected_by(modules: Sequence[NamedModule], rules: Iterable[Rule]) -> list[Selected]:
    """The norm layers, and with ``weights`` the modules with parameters, that the rules select.

    The last rule that matches any of a module's names wins. A module that it leaves alone
    (``none``) is not selected. A module that an earlier call froze, and that this rule's policy
    does not freeze, is selected with the policy ``none``: it will be restored.

    Raises:
        PolicyError: a rule that selects nothing, with the nearest existing names; or one that
            selects a TorchScript module. A rule ``none`` needs to match any module at all.
    """
    chosen: dict[int, Policy] = {}
    for rule in rules:
        reached = [index for index, entry in enumerate(modules) if matches(entry, rule.pattern)]
        if not any(not rule.policy or _eligible(modules[i].module, rule.policy) for i in reached):
            raise PolicyError(_nothing_found(modules, rule))
        chosen.update(dict.fromkeys(reached, rule.policy))
    selected = []
    for index, entry in enumerate(modules):
        policy = chosen.get(index, Policy.NONE)
        if policy and _eligible(entry.module, policy):
            selected.append(Selected(entry, policy))
        elif policy and record_of(entry.module) is not None:
            selected.append(Selected(entry, Policy.NONE))
    for choice in selected:
        _refuse_script(choice.entry)
    return selected


def matching(modules: Sequence[NamedModule], patterns: Iterable[Pattern]) -> list[NamedModule]:
    """The modules that any of the patterns matches.

    Raises:
        PolicyError: a pattern that matches no module at all.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(matches(entry, pattern) for entry in modules):
            raise PolicyError(
                f"Pattern {pattern.text!r} matches no module."
                + _suggest(pattern.text, modules, lambda module: True)
            )
    return [entry for entry in modules if any(matches(entry, p) for p in patterns)]


def matches(entry: NamedModule, pattern: Pattern) -> bool:
    """Whether the pattern matches any of the module's names, with wrappers or without."""
    return any(pattern.matches(name) for name in (*entry.plain_names, *entry.names))


def _eligible(module: nn.Module, policy: Policy) -> bool:
    if is_norm(module) or _is_scripted_norm(module):
        return True
    return Policy.WEIGHTS in policy and any(p is not None for p in module._parameters.values())


def _stateless(module: nn.Module) -> bool:
    """Whether the module normalises without running statistics; by name, for RMSNorm has many."""
    return any(_STATELESS.search(kind.__name__) for kind in type(module).__mro__)


def _is_scripted_norm(module: nn.Module) -> bool:
    name = (
        getattr(module, "original_name", "") if isinstance(module, torch.jit.ScriptModule) else ""
    )
    return "BatchNorm" in name or "InstanceNorm" in name


def _refuse_script(entry: NamedModule) -> None:
    if isinstance(entry.module, torch.jit.ScriptModule):
        raise PolicyError(
            f"{entry.name} is a TorchScript module, whose layers are compiled and cannot be "
            f"changed: freeze the original module before you script it, or leave this one out "
            f"with {{{entry.name!r}: 'none'}} as the last rule."
        )


def _nothing_found(modules: Sequence[NamedModule], rule: Rule) -> str:
    text, wanted = rule.pattern.text, rule.policy
    what = "norm layer" + (" and no parameter" if Policy.WEIGHTS in wanted else "")
    if wanted and not any(_eligible(entry.module, wanted) for entry in modules):
        others = sorted({type(e.module).__name__ for e in modules if _stateless(e.module)})
        if others and Policy.WEIGHTS not in wanted:
            return (
                f"No batch norm here: the model normalises with {' and '.join(others)}, and these "
                f"keep no running statistics. To freeze weights, use the policy 'weights'."
            )
        return f"The model has no {what}: policy {str(wanted)!r} would freeze nothing."
    reached = [entry for entry in modules if matches(entry, rule.pattern)]
    problem = "matches no module."
    if reached:
        more = f" and {len(reached) - 1} more modules" if len(reached) > 1 else ""
        problem = f"matches {reached[0].name!r}{more}, but no {what}."
    if set("[]{}()|") & set(text):
        problem += " Only *, ? and ** are special in a pattern."
    return f"Pattern {text!r} {problem}" + _suggest(
        text, modules, lambda module: _eligible(module, wanted), skip=reached
    )


def _suggest(
    text: str,
    modules: Sequence[NamedModule],
    eligible: Callable[[nn.Module], bool],
    skip: Sequence[NamedModule] = (),
) -> str:
    """Name the nearest modules that are eligible, or contain a module that is."""
    names: dict[str, None] = {}
    for entry in modules:
        if eligible(entry.module):
            for name in entry.plain_names:
                while name:
                    names[name] = None
                    name = name.rpartition(".")[0]
    for entry in skip:
        for name in entry.plain_names:
            names.pop(name, None)
    near = nearest(text, names)
    if near:
        return " Did you mean " + " or ".join(map(repr, near)) + "?"
    top = list(dict.fromkeys(name.partition(".")[0] for name in names))[:6]
    return " There are: " + ", ".join(map(repr, top)) + "." if top else ""
