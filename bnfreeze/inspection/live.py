"""The norm layers of a live model: what they will do in the next training step, and findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from bnfreeze.findings import Finding, finding, worst_first
from bnfreeze.inspection.behaviour import (
    LiveLayer,
    affine_parameters,
    live_layer,
    optimizers_by_id,
)
from bnfreeze.inspection.result import Inspection
from bnfreeze.inspection.statistics import statistics_findings
from bnfreeze.inspection.train_mode import training_flags
from bnfreeze.norm_layers import (
    STATISTICS,
    NamedModule,
    check_model,
    is_lazy,
    is_norm,
    keeps_statistics,
    keeps_unknown_statistics,
    named_modules,
)
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import frozen_names, policy_name, record_of
from bnfreeze.tables import Sheet, shared_kind

__all__ = ["ModelInspection", "inspect_model"]


@dataclass(frozen=True)
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
                "update" if layer.updates_statistics else _unchanged(layer.why["statistics"]),
                "train" if layer.trains_affine else _unchanged(layer.why["affine"]),
                f"{layer.eps:g}",
                layer.why["statistics"],
                layer.why["affine"],
            )
            for layer in self.layers
        ]
        updating = sum(layer.updates_statistics for layer in self.layers)
        training = sum(layer.trains_affine for layer in self.layers)
        on_batch = sum(layer.normalizes_with == "batch" for layer in self.layers)
        title, further = shared_kind(
            "What the next training step does", [layer.kind for layer in self.layers]
        )
        return Sheet(
            title=title if rows else "",
            columns=(
                "layer",
                "kind",
                "C",
                "policy",
                "uses",
                "statistics",
                "affine",
                "eps",
                "statistics, because",
                "affine, because",
            ),
            rows=rows,
            findings=self.findings,
            verdict=(
                f"{len(rows)} norm layer{'' if len(rows) == 1 else 's'}: "
                f"{on_batch} normalise with the batch, "
                f"{updating} update their statistics, {training} train weight or bias."
                if rows
                else "No norm layer."
            ),
            further=further | {"eps", "statistics, because", "affine, because"},
        )


def _unchanged(why: str) -> str:
    return "frozen" if why.startswith("frozen") else "still"


def inspect_model(
    model: object, *, optimizer: Optimizer | Iterable[Optimizer] | None = None
) -> ModelInspection:
    """Say what each norm layer of `model` will do in the next training step.

    See `bnfreeze.inspect`, which calls this for a live model.

    Raises:
        TypeError: `model` is no live `nn.Module`, or is TorchScript.
    """
    model = check_model(model)
    optimized = optimizers_by_id(optimizer)
    modules = named_modules(model)
    flags = training_flags(model)
    layers: list[LiveLayer] = []
    findings: list[Finding] = []
    for entry in modules:
        if is_norm(entry.module):
            layer = live_layer(entry, flags[id(entry.module)], optimized)
            layers.append(layer)
            findings += _layer_findings(layer, entry.module, model.training, optimized)
        elif keeps_unknown_statistics(entry.module):
            findings.append(_foreign(entry))
    if not layers and not findings:
        findings.append(finding("model-no-norm-layer", ""))
    if _all_frozen(modules):
        findings.append(finding("model-nothing-trains", ""))
    if optimized and not any(id(p) in optimized for p in model.parameters()):
        findings.append(finding("optimizer-without-parameters", ""))
    return ModelInspection(tuple(layers), worst_first(findings))


def _all_frozen(modules: Iterable[NamedModule]) -> bool:
    records = [record_of(entry.module) for entry in modules]
    if not any(record is not None and Policy.WEIGHTS in record.policy for record in records):
        return False
    parameters = [p for entry in modules for p in entry.module._parameters.values()]
    return not any(p is not None and p.requires_grad for p in parameters)


def _layer_findings(
    facts: LiveLayer, layer: nn.Module, root_training: bool, optimized: Mapping[int, str] | None
) -> Iterator[Finding]:
    record = record_of(layer)
    name = facts.name
    if is_lazy(layer):
        yield finding("layer-lazy", name)
        return
    if not keeps_statistics(layer):
        yield finding("stats-missing", name)
    elif facts.normalizes_with == "batch" and _statistics_stay(facts, layer):
        chosen = record is not None and record.policy.freezes_statistics
        yield finding(
            "batch-stats-in-train",
            name,
            f"its statistics are fixed ({_why_fixed(facts, layer)}), but train mode normalises "
            f"with the batch: eval mode is another function.",
            level="note" if chosen else "warning",
        )
    elif facts.updates_statistics and affine_parameters(layer) and not facts.trains_affine:
        yield finding(
            "stats-not-frozen",
            name,
            f"weight and bias do not train ({facts.why['affine']}), "
            f"but the running statistics still update in each forward pass.",
            level="note" if record is not None else "warning",
        )
    if root_training and not layer.training and facts.why["normalizes_with"] == "train mode":
        yield finding("train-undoes-eval", name)
    yield from _gradient_findings(name, layer, optimized)
    if keeps_statistics(layer):
        mean, var, count = (getattr(layer, stat, None) for stat in STATISTICS)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            yield from statistics_findings(
                name,
                _on_cpu(mean),
                _on_cpu(var),
                None if count is None or count.is_meta else int(count),
                facts.eps,
                dtypes=(_dtype_name(mean), _dtype_name(var)),
            )


def _on_cpu(stat: Tensor) -> Tensor | None:
    if stat.is_meta:
        return None
    stat = stat.detach().cpu()
    return stat.float() if stat.is_floating_point() and stat.dtype.itemsize < 4 else stat


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _statistics_stay(facts: LiveLayer, layer: nn.Module) -> bool:
    return not facts.updates_statistics or getattr(layer, "momentum", None) == 0


def _why_fixed(facts: LiveLayer, layer: nn.Module) -> str:
    if facts.updates_statistics:
        return "momentum is 0; num_batches_tracked still rises"
    return facts.why["statistics"]


def _gradient_findings(
    name: str, layer: nn.Module, optimized: Mapping[int, str] | None
) -> Iterator[Finding]:
    own = {n: p for n, p in layer._parameters.items() if p is not None and not p.requires_grad}
    left = [n for n, p in own.items() if p.grad is not None]
    if left:
        yield finding(
            "affine-grad-left",
            name,
            f"{_and(left)} requires_grad=False and a .grad that is not None: "
            f"the next optimizer step moves it.",
        )
    optimized = optimized or {}
    record = record_of(layer)
    thawed = [
        name
        for name in (record.requires_grad if record else ())
        if (parameter := layer._parameters.get(name)) is not None and parameter.requires_grad
    ]
    if thawed:
        yield finding(
            "affine-thawed",
            name,
            f"{_and(thawed)} requires_grad=True again, though the policy is {policy_name(layer)}.",
        )
    listed = [n for n in frozen_names(layer) if n in own and id(own[n]) in optimized]
    if listed and not left:
        names = " and ".join(listed)
        are = "is" if len(listed) == 1 else "are"
        if "LBFGS" in {optimized[id(own[n])] for n in listed}:
            yield finding(
                "optimizer-has-frozen",
                name,
                f"{names} {are} frozen and in the optimizer LBFGS, which moves its parameters "
                f"along its past steps, without a gradient too.",
                level="warning",
            )
        else:
            yield finding(
                "optimizer-has-frozen",
                name,
                f"{names} {are} frozen and in the optimizer, which skips it while its .grad is "
                f"None: harmless.",
            )


def _and(names: list[str]) -> str:
    return " and ".join(names) + (" has" if len(names) == 1 else " have")


def _foreign(entry: NamedModule) -> Finding:
    return finding(
        "layer-foreign",
        entry.name,
        f"{type(entry.module).__name__} keeps running statistics, but is no norm layer "
        f"that bnfreeze knows: it is left alone.",
    )
