"""freeze and unfreeze: every layer is checked, then all are changed, in place, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from bnfreeze.freezing.apply import carry_out
from bnfreeze.freezing.plan import plan, restoring
from bnfreeze.freezing.report import FreezeReport, LayerRow
from bnfreeze.freezing.rules import parse_rules, policies_for
from bnfreeze.fusion.tracing import names_of
from bnfreeze.inspection.behaviour import optimizers_by_id
from bnfreeze.inspection.live import inspect_model
from bnfreeze.norm_layers import NamedModule, check_model, is_norm, matching, named_modules
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import mark_left_alone, record_of
from bnfreeze.policies.transaction import transaction

# Findings about the model as a whole, which a report of freezing shows too.
_OF_THE_MODEL = frozenset(
    {"layer-foreign", "layer-unregistered", "model-nothing-trains", "optimizer-without-parameters"}
)


def freeze(
    model: nn.Module,
    policy: Policy | str | Mapping[str, Policy | str] = "eval+affine",
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    traceable: Sequence[type | str] = (),
    dry_run: bool = False,
) -> FreezeReport:
    """Freeze the norm layers of `model`, in place; `unfreeze` undoes it exactly.

    Modules, parameters and buffers stay the same objects, under the same names. So references,
    optimizer groups, hooks, aliases of a shared layer and state_dict keys stay right. Every layer
    is checked before any is changed.

    Args:
        model: any `nn.Module`, also a single norm layer, or a wrapper such as
            DistributedDataParallel.
        policy: a `Policy`, its name (``"eval+affine"``), or a mapping from a pattern of dotted
            module names to a policy: ``{"backbone": "eval", "backbone.layer4": "none"}``. In a
            pattern ``*`` and ``?`` stay inside one segment and ``**`` spans any number. A module
            that matches stands for itself and all below it. The last rule that matches wins.
            Layers that no rule matches, or whose rule is ``none``, keep what they have.
        optimizer: the optimizer, or several. Frozen parameters that are in it are then listed, and
            an optimizer that has none of the model's parameters is a finding.
        traceable: classes of your own, or names of packages, whose forward torch.fx may trace for
            ``fused-act`` and ``folded``, besides those of known libraries. Their forwards must
            do nothing that a trace misses.
        dry_run: return the report, and change nothing. The model is frozen, looked at and put
            back, so the report is exactly that of a real call; all errors are the same, too. With
            ``fused-act`` the blocks are traced as in a real call, so `LayerRow.fuses` is exact.
            Do not run the model in another thread meanwhile.

    Returns:
        A `FreezeReport` with a row for each norm layer. Used as a context manager, it unfreezes at
        the end what this call froze.

    Raises:
        PolicyError: an unknown policy, a pattern that matches nothing, a layer that cannot follow
            the policy, or parameters whose gradients a DistributedDataParallel around them waits
            for. Nothing was changed then.
        TypeError: `model` is no `nn.Module`, or is TorchScript.
    """
    model = check_model(model)
    rules = parse_rules(policy)
    optimized = optimizers_by_id(optimizer)
    modules = named_modules(model)
    policies = policies_for(modules, rules)
    changes = plan(modules, policies, names_of(traceable))

    def undo() -> None:
        _thaw(named_modules(model), [change.entry for change in changes])
        for entry, _ in policies:
            mark_left_alone(entry.module, False)

    with transaction((entry.module for entry in modules), keep=not dry_run):
        rows = carry_out(modules, changes)
        for entry, chosen in policies:
            mark_left_alone(entry.module, is_norm(entry.module) and not chosen)
        names = {change.entry.name for change in changes}
        found = inspect_model(model, optimized)
        return FreezeReport(
            rows,
            tuple(f for f in found.findings if f.name in names or f.code in _OF_THE_MODEL),
            {layer.name: layer for layer in found.layers},
            "freeze (dry run)" if dry_run else "freeze",
            (lambda: None) if dry_run else undo,
        )


def unfreeze(model: nn.Module, select: str | Iterable[str] | None = None) -> FreezeReport:
    """Restore frozen layers exactly as they were: class, forward and requires_grad.

    The training flag becomes the one last asked for by ``train()`` or ``eval()``, as if the layer
    had never been frozen. Values stay as they are, with one exception: the statistics of a fused
    layer stay in fp32 when the model is cast to a half precision, and are cast now. Layers that are
    not frozen are left alone.

    Args:
        model: the model that was frozen, or a copy of it, or one loaded from a file. If it is a
            part of a model, only that part is known: a parameter tied to one elsewhere thaws.
        select: a pattern of dotted module names, or several; None for all.

    Returns:
        A `FreezeReport`, with the action ``restore`` on each row that was restored.

    Raises:
        PolicyError: a pattern that matches no module, a layer whose class was changed by
            something else, or one whose gradients the DistributedDataParallel around it would not
            average. Nothing was changed then.
        TypeError: `model` is no `nn.Module`.
    """
    modules = named_modules(check_model(model))
    rows = _thaw(modules, modules if select is None else matching(modules, select))
    facts = {layer.name: layer for layer in inspect_model(model).layers}
    return FreezeReport(rows, facts=facts, call="unfreeze")


def _thaw(modules: Sequence[NamedModule], chosen: Sequence[NamedModule]) -> tuple[LayerRow, ...]:
    """Restore the chosen ones among a model's modules, and forget which were left alone."""
    changes = [restoring(entry) for entry in chosen if record_of(entry.module) is not None]
    with transaction(entry.module for entry in modules):
        for entry in chosen:
            mark_left_alone(entry.module, False)
        # unfreeze(ddp.module) is the way to wrap again.
        return carry_out(modules, changes, around=False)
