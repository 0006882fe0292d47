"""assert_frozen: is everything frozen that should be, and is it what it was?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch.distributed as dist
from torch import nn

from bnfreeze.errors import NotFrozenError, PolicyError
from bnfreeze.findings import finding_kind
from bnfreeze.freezing.plan import plan
from bnfreeze.inspection.behaviour import (
    OUTSIDE,
    SHARES,
    LiveLayer,
    live_layers,
    updated_by_another,
)
from bnfreeze.inspection.modes import in_training
from bnfreeze.norm_layers import (
    NamedModule,
    check_model,
    foreign_remedy,
    is_foreign,
    is_norm,
    matching,
    named_modules,
)
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import (
    class_changed_since,
    is_left_alone,
    policy_name,
    record_of,
    recorded,
)
from bnfreeze.verification.snapshot import Snapshot
from bnfreeze.verification.verify import verify

# What strict=True demands, and what freeze does by itself.
_FULL = Policy.EVAL | Policy.AFFINE


def assert_frozen(
    model: nn.Module,
    before: Snapshot | None = None,
    *,
    select: str | Iterable[str] | None = None,
    strict: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Raise unless `model` is frozen, and is what it was.

    The state is always checked. Each layer that bnfreeze froze must keep its policy's promise in
    the next training step, which is taken to begin with ``model.train()``. A norm layer that is
    not frozen must not update its statistics, unless its rule was ``none``.

    Args:
        model: any `nn.Module`.
        before: a snapshot; with it the bits are compared first, as `verify` does.
        select: a pattern of dotted module names, or several: only these modules are checked for
            their state. None means all.
        strict: also demand of every selected norm layer that it normalises with its running
            statistics and trains neither weight nor bias.
        process_group: as in `verify`.

    Raises:
        NotFrozenError: a layer does not keep its promise, or was never frozen; ``.layers`` has
            the names and the reasons.
        DriftError: something has changed since the snapshot; ``.report`` has the drifts.
        PolicyError: there is nothing to check: no layer is frozen and none is a norm layer, or
            a pattern matches none.
        TypeError: `model` is not an `nn.Module`, or `before` not a `Snapshot`.
    """
    __tracebackhide__ = True
    modules = named_modules(check_model(model))
    if before is not None:
        verify(model, before, process_group=process_group).raise_if_drifted()
    chosen = [entry for entry in modules if record_of(entry.module) or is_norm(entry.module)]
    if select is not None:
        chosen = matching(chosen, select, "frozen module and no norm layer")
    if not chosen and (before is None or select is not None):
        raise PolicyError(
            "Nothing in the model is frozen and it has no norm layer: there is nothing to check."
        )
    with in_training(model):
        facts = {layer.name: layer for layer in live_layers(modules, None)}
        found = {
            entry.name: "; ".join(reasons)
            for entry in chosen
            if (reasons := list(_reasons(entry.module, facts.get(entry.name), strict)))
        }
        thawed = [p for e in chosen for _, p, _ in recorded(e.module) if p.requires_grad]
    if found:
        are = "is" if len(found) == 1 else "are"
        lines = [f"{name or 'The model'}: {why}." for name, why in found.items()]
        more = [f"And {len(lines) - 5} more layers."] if len(lines) > 5 else []
        head = f"{len(found)} of {len(chosen)} layers {are} not frozen:"
        remedy = _remedy(modules, found, strict)
        if thawed and not any(parameter.requires_grad for parameter in thawed):
            remedy = "A train() of the model sets requires_grad to True: take that out of it."
        text = "\n".join([head, *lines[:5], *more, remedy])
        raise NotFrozenError(text, tuple(found.items()))


def _reasons(module: nn.Module, facts: LiveLayer | None, strict: bool) -> Iterator[str]:
    """Why the module is not frozen as it should be."""
    record, policy = record_of(module), policy_name(module)
    if record is None and not is_left_alone(module) and facts and facts.updates_statistics:
        yield f"it is not frozen, and its statistics {_update(facts)}{_why(facts, 'statistics')}"
    if record is not None:
        if class_changed_since(module):
            yield f"it was frozen by {policy!r}, and something changed its class since"
        if facts and record.policy.freezes_statistics and facts.updates_statistics:
            shared = updated_by_another(facts)
            text = f"its statistics {_update(facts)}, though policy {policy!r} freezes them"
            yield f"{text}: {shared}" if shared else text
        if facts and record.policy.forces_eval and facts.normalizes_with == "batch":
            yield f"it normalises with the batch, though policy {policy!r} promises eval mode"
        own = {name: parameter for name, parameter, _ in recorded(module)}
        training = [name for name, parameter in own.items() if parameter.requires_grad]
        if training:
            verb, them = ("requires", "it") if len(training) == 1 else ("require", "them")
            text = f"{' and '.join(training)} {verb} grad, though policy {policy!r} freezes {them}"
            still = record.policy.freezes_statistics and facts and not facts.updates_statistics
            yield f"{text} (the statistics are frozen)" if still else text
        for name, parameter in own.items():
            if not parameter.requires_grad and parameter.grad is not None:
                yield f"{name} has a .grad, which the next optimizer step applies"
    if strict and facts is not None:
        if facts.normalizes_with != "running":
            uses = "does not use" if facts.normalizes_with == "batch" else "may not use"
            yield f"it {uses} its running statistics{_why(facts, 'normalizes_with')}"
        if facts.trains_affine:
            yield f"its weight or bias trains{_why(facts, 'affine')}"


def _update(facts: LiveLayer) -> str:
    return "may update" if facts.normalizes_with == "unknown" else "update"


def _why(facts: LiveLayer, answer: str) -> str:
    return f" ({facts.why[answer]})" if facts.why.get(answer) else ""


def _remedy(modules: Sequence[NamedModule], failing: Mapping[str, str], strict: bool) -> str:
    """What to do about the failing layers. It is planned as freeze plans it, which may refuse."""
    if all(SHARES in why for why in failing.values()):
        return finding_kind("stats-shared").remedy
    if all(OUTSIDE in why for why in failing.values()):
        return "Freeze the module that sets them ('weights'), or check only a part with select=…"
    records = {entry: record_of(entry.module) for entry in modules if entry.name in failing}
    policies = [
        # Of a foreign norm layer, what foreign_remedy names.
        (entry, record.policy if record else Policy.EVAL if is_foreign(entry.module) else _FULL)
        for entry, record in records.items()
    ]
    try:
        plan(modules, policies)
    except PolicyError as refusal:
        return f"To freeze them, mend this first: {refusal}"
    never = [entry for entry, record in records.items() if record is None]
    if foreign := next((entry for entry in never if is_foreign(entry.module)), None):
        return foreign_remedy(foreign.module, foreign.plain_names[0])
    if strict and any(is_norm(entry.module) and _FULL not in old for entry, old in policies):
        return f'Freeze them with freeze(model, "{_FULL}"), or check only a part with select=…'
    if not never:
        return "Freeze them again: call freeze(model, …) with the same policy."
    return (
        "Freeze them with freeze(model, …). To leave a layer out on purpose, give it the rule "
        "'none', or check only a part of the model with select=…"
    )
