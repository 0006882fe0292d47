"""The norm layers of a live model: what they will do in the next training step, and findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bnfreeze.findings import Finding, Level, finding, worst_first
from bnfreeze.inspection.behaviour import (
    LiveLayer,
    fate,
    fate_legend,
    live_layers,
    updated_by_another,
)
from bnfreeze.inspection.checkpoint import Inspection
from bnfreeze.inspection.in_memory import TensorInMemory
from bnfreeze.inspection.modes import in_training
from bnfreeze.inspection.statistics import batches_in, real_values, statistics_findings
from bnfreeze.inspection.unregistered import unregistered
from bnfreeze.norm_layers import (
    AFFINE,
    STATISTICS,
    affine_parameters,
    check_model,
    foreign_remedy,
    is_foreign,
    is_lazy,
    is_norm,
    keeps_statistics,
    named_modules,
    statistics_in,
)
from bnfreeze.policies.record import frozen_names, policy_name, record_of, recorded
from bnfreeze.sheets import Sheet, shared_kind
from bnfreeze.text import counted

# Shown by a wide terminal only.
_FURTHER = ("eps", "statistics, because", "affine, because")


@dataclass(frozen=True, repr=False)
class ModelInspection(Inspection):
    """The norm layers of a live model, and what they will do in the next training step."""

    layers: tuple[LiveLayer, ...]

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        rows = [
            (
                layer.name or "(the model)",
                layer.kind,
                str(layer.num_features),
                layer.policy,
                layer.normalizes_with,
                *fate(layer),
                "" if layer.eps is None else f"{layer.eps:g}",
                layer.why["statistics"],
                layer.why["affine"],
            )
            for layer in self.layers
        ]
        updating = sum(layer.updates_statistics for layer in self.layers)
        training = sum(layer.trains_affine for layer in self.layers)
        uses = [layer.normalizes_with for layer in self.layers]
        unknown = f", {n} in a way that is not known" if (n := uses.count("unknown")) else ""
        title, further = shared_kind(
            "What the next training step does", [layer.kind for layer in self.layers]
        )
        return Sheet(
            title=title if rows else "",
            columns=("layer", "kind", "C", "policy", "uses", "statistics", "affine", *_FURTHER),
            rows=rows,
            findings=self.findings,
            verdict=(
                f"{counted(len(rows), 'norm layer')}: "
                f"{uses.count('batch')} normalise with the batch{unknown}, "
                f"{updating} update their statistics, {training} train weight or bias."
                if rows
                else "No norm layer."
            ),
            further=further | {*_FURTHER},
            legend=fate_legend(rows),
        )


def inspect_model(model: object, optimized: Mapping[int, str] | None = None) -> ModelInspection:
    """Say what each norm layer of `model` will do in the next training step.

    See `bnfreeze.inspect`, which calls this for a live model.

    Args:
        model: the model.
        optimized: what `optimizers_by_id` gives; None where no optimizer is known.

    Raises:
        TypeError: `model` is no live `nn.Module`, or is TorchScript.
    """
    model = check_model(model)
    modules = named_modules(model)
    norms = [entry.module for entry in modules if is_norm(entry.module)]
    undone = [model.training and not layer.training for layer in norms]
    findings: list[Finding] = []
    with in_training(model):
        layers = live_layers(modules, optimized)
        for facts, layer, was_eval in zip(layers, norms, undone, strict=True):
            findings += _layer_findings(facts, layer, was_eval, optimized)
        for entry in modules:
            if recorded(entry.module) and not is_norm(entry.module):
                findings += _gradient_findings(entry.name, entry.module, optimized)
        trains = any(parameter.requires_grad for parameter in model.parameters())
    for path, hidden in unregistered(modules).items():
        drifting = [m for m in hidden if not {n for _, n in statistics_in(m)} & {*frozen_names(m)}]
        if drifting:
            message = (
                f"{counted(len(drifting), 'norm layer')} that the model has not registered: "
                f"freeze, guard, state_dict() and train() do not reach such layers."
            )
            level: Level = "warning" if any(m.training for m in drifting) else "note"
            findings.append(finding("layer-unregistered", path, message, level=level))
    if not layers and not findings:
        findings.append(finding("model-no-norm-layer", ""))
    weights = any("weights" in policy_name(e.module) for e in modules if recorded(e.module))
    if weights and not trains:
        findings.append(finding("model-nothing-trains", ""))
    if optimized and not any(id(p) in optimized for p in model.parameters()):
        findings.append(finding("optimizer-without-parameters", ""))
    return ModelInspection(tuple(layers), worst_first(findings))


def _layer_findings(
    facts: LiveLayer, layer: nn.Module, was_eval: bool, optimized: Mapping[int, str] | None
) -> Iterator[Finding]:
    record = record_of(layer)
    name = facts.name
    if is_lazy(layer):
        yield finding("layer-lazy", name)
        return
    inner = [inner for inner, m in layer.named_modules() if m is not layer and is_norm(m)]
    if inner and (record is not None or not is_foreign(layer)):
        forced = record is not None and record.policy.forces_eval
        yield finding(
            "layer-inside-norm",
            name,
            f"{' and '.join(inner[:2])}: the forward of {facts.kind} decides whether it runs"
            + (", and in eval mode it may never run." if forced else "."),
            level="warning" if forced else "note",
        )
    if why := updated_by_another(facts):
        yield finding("stats-shared", name, f"{why}.")
    elif is_foreign(layer) and facts.updates_statistics:
        message = f"{facts.why['statistics']}, and they may change in each forward pass."
        yield finding("layer-foreign", name, message, foreign_remedy(layer, name))
    elif not keeps_statistics(layer):
        yield finding("stats-missing", name)
    elif facts.normalizes_with == "batch" and (
        not facts.updates_statistics or getattr(layer, "momentum", None) == 0
    ):
        chosen = record is not None and record.policy.freezes_statistics
        yield finding(
            "batch-stats-in-train",
            name,
            f"its statistics are fixed ({facts.why['statistics']}), but train mode normalises "
            f"with the batch: eval mode computes something else.",
            level="note" if chosen else "warning",
        )
    elif facts.updates_statistics and affine_parameters(layer) and not facts.trains_affine:
        still = "may still" if facts.normalizes_with == "unknown" else "still"
        yield finding(
            "stats-not-frozen",
            name,
            f"weight and bias do not train ({facts.why['affine']}), "
            f"but the running statistics {still} update in each forward pass"
            f"{' after model.train()' if was_eval else ''}.",
            ""
            if record is None
            else f"To freeze them, too, use 'eval+{record.policy}' in place of '{record.policy}'.",
            level="note" if record is not None else "warning",
        )
    if was_eval and "train mode" in facts.why.values():
        yield finding("train-undoes-eval", name)
    yield from _gradient_findings(name, layer, optimized)
    own = (getattr(layer, statistic, None) for statistic in STATISTICS)
    mean, var, count = (TensorInMemory(t) if isinstance(t, Tensor) else None for t in own)
    if mean and var:
        if why := mean.why or var.why:
            remedy = "Load the model's values onto a device, then look again."
            yield finding("stats-unread", name, f"of its running statistics: {why}.", remedy)
        yield from statistics_findings(
            name,
            real_values(mean),
            real_values(var),
            batches_in(count),
            facts.eps,
            (mean.dtype, var.dtype),
            [TensorInMemory(t) for n in AFFINE if isinstance(t := getattr(layer, n, None), Tensor)],
        )


def _gradient_findings(
    name: str, layer: nn.Module, optimized: Mapping[int, str] | None
) -> Iterator[Finding]:
    own = {n: p for n, p in layer._parameters.items() if p is not None and not p.requires_grad}
    if optimized is not None:
        own = {n: p for n, p in own.items() if id(p) in optimized}
    left = [n for n, p in own.items() if p.grad is not None]
    if left:
        yield finding(
            "affine-grad-left",
            name,
            f"{_and(left)} requires_grad=False and a .grad that is not None: "
            f"until that is None, each optimizer step moves it.",
        )
    if thawed := [n for n, parameter, _ in recorded(layer) if parameter.requires_grad]:
        yield finding(
            "affine-thawed",
            name,
            f"{_and(thawed)} requires_grad=True again, though the policy is {policy_name(layer)}.",
        )
    listed = [n for n in frozen_names(layer) if n in own]
    if listed and optimized and not left:
        kind = optimized[id(own[listed[0]])]
        lbfgs = kind == "torch.optim.lbfgs.LBFGS"
        if lbfgs:
            why = " LBFGS, which moves its parameters along its past steps, without a gradient too."
        elif kind.startswith("torch.optim."):
            why = ", which skips what has no .grad: harmless."
        else:
            why = (
                f" {kind.rpartition('.')[2]}. Most optimizers skip what has no .grad; some do "
                f"not (KellerJordan's Muon decays it)."
            )
        are = "is" if len(listed) == 1 else "are"
        yield finding(
            "optimizer-has-frozen",
            name,
            f"{' and '.join(listed)} {are} frozen and in the optimizer{why}",
            level="warning" if lbfgs else "note",
        )


def _and(names: list[str]) -> str:
    return " and ".join(names) + (" has" if len(names) == 1 else " have")
