"""freeze and unfreeze: every layer is checked, then all are changed, in place, or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from bnfreeze.findings import Finding
from bnfreeze.freezing.apply import carry_out, thaw
from bnfreeze.freezing.plan import plan
from bnfreeze.freezing.report import FreezeReport, LayerRow
from bnfreeze.freezing.rules import matching, parse_rules, select
from bnfreeze.fusion.survey import Absorption
from bnfreeze.inspection.behaviour import optimizers_by_id
from bnfreeze.inspection.live import inspect_model
from bnfreeze.norm_layers import NamedModule, check_model, is_norm, named_modules
from bnfreeze.patterns import Pattern
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, policy_name, record_of

__all__ = ["freeze", "unfreeze"]


def freeze(
    model: nn.Module,
    policy: Policy | str | Mapping[str, Policy | str] = "eval+affine",
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> FreezeReport:
    """Freeze the norm layers of `model`, in place and undoably.

    Modules, parameters and buffers stay the very objects they were, under the same names; so
    references, optimizer groups, hooks, aliases of a shared layer and state_dict keys stay right.
    Every layer is checked before any is changed.

    Args:
        model: any `nn.Module`, also one that is a single norm layer, or a wrapper such as
            DistributedDataParallel around one.
        policy: a `Policy`, its name (``"eval+affine"``), or a mapping from a pattern of dotted
            module names to a policy: ``{"backbone": "eval", "backbone.layer4": "none"}``. In a
            pattern ``*`` and ``?`` stay inside one segment and ``**`` spans any number; a module
            that matches stands for itself and all below it. The last rule that matches wins.
            Layers that no rule matches, or that ``none`` does, keep what they have.
        optimizer: the optimizer, or several. Held parameters that stand in it are then listed.

    Returns:
        A `FreezeReport` with a row for each norm layer. Leaving it as a context manager unfreezes
        what this call froze.

    Raises:
        PolicyError: an unknown policy, a pattern that matches nothing, or a layer that cannot
            keep the policy's promise. Nothing has been changed then.
        TypeError: `model` is no `nn.Module`, or is TorchScript.
    """
    model = check_model(model)
    rules = parse_rules(policy)
    if isinstance(optimizer, Iterator):
        optimizer = list(optimizer)  # it is asked twice
    optimizers_by_id(optimizer)  # what is no optimizer is refused before anything is changed
    modules = named_modules(model)
    changes = plan(modules, select(modules, rules))
    actions, absorbed = carry_out(modules, changes)
    done = {
        id(change.module): (did, change.note) for change, did in zip(changes, actions, strict=True)
    }
    return FreezeReport(
        _rows(modules, done, absorbed),
        _findings(model, {change.entry.name for change in changes}, optimizer),
        _norm_names(modules),
        lambda: thaw(named_modules(model), [change.module for change in changes]),
    )


def unfreeze(model: nn.Module, match: str | Iterable[str] | None = None) -> FreezeReport:
    """Give frozen layers back exactly as they were: class, forward and requires_grad.

    The training flag becomes the one last asked for by ``train()`` or ``eval()``, as if the layer
    had never been frozen. Values are left as they are; only the statistics of a fused layer, which
    stayed in fp32 while the model was cast to a half precision, follow it. Where nothing is
    frozen, nothing is done.

    Args:
        model: the model that was frozen, or a copy of it, or one loaded from a file. Of a part of
            it, only what that part holds is known: a parameter tied to one elsewhere thaws.
        match: a pattern of dotted module names, or several; None for all.

    Returns:
        A `FreezeReport`, with the action ``restore`` on each row that was given back.

    Raises:
        PolicyError: a pattern that matches no module, a layer whose class something else has
            changed since, or one whose gradients the DistributedDataParallel that wraps it would
            not average. Nothing has been changed then.
        TypeError: `model` is no `nn.Module`.
    """
    model = check_model(model)
    modules = named_modules(model)
    chosen = modules
    if match is not None:
        texts = [match] if isinstance(match, str) else match
        chosen = matching(modules, [Pattern.parse(text) for text in texts])
    frozen = [entry.module for entry in chosen if record_of(entry.module) is not None]
    absorbed = thaw(modules, frozen)
    done = {id(module): (("restore",), "") for module in frozen}
    return FreezeReport(_rows(modules, done, absorbed), norm_names=_norm_names(modules))


def _rows(
    modules: Sequence[NamedModule],
    done: Mapping[int, tuple[tuple[str, ...], str]],
    absorbed: Mapping[int, Absorption],
) -> tuple[LayerRow, ...]:
    """A row for each norm layer and for each other module that something was done to."""
    rows = []
    for entry in modules:
        module = entry.module
        actions, note = done.get(id(module), ((), ""))
        if id(module) not in done and not is_norm(module):
            continue
        found = absorbed.get(id(module), Absorption("", ""))
        rows.append(
            LayerRow(
                entry.name,
                layer_class(module).__name__,
                policy_name(module),
                found.absorbs,
                actions,
                "; ".join(filter(None, [note, found.note])),
            )
        )
    return tuple(rows)


def _norm_names(modules: Sequence[NamedModule]) -> frozenset[str]:
    return frozenset(entry.name for entry in modules if is_norm(entry.module))


def _findings(
    model: nn.Module,
    frozen: set[str],
    optimizer: Optimizer | Iterable[Optimizer] | None,
) -> tuple[Finding, ...]:
    """What `inspect` finds in the layers just frozen, and in those that it could not judge."""
    return tuple(
        finding
        for finding in inspect_model(model, optimizer=optimizer).findings
        if finding.name in frozen
        or finding.code in ("layer-foreign", "model-nothing-trains", "optimizer-without-parameters")
    )
