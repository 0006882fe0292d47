"""What each norm layer of a live model will really do in the next training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from bnfreeze.findings import Finding, by_gravity
from bnfreeze.inspection.behaviour import (
    LayerFacts,
    affine_parameters,
    layer_facts,
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
from bnfreeze.tables import Sheet, told_kinds

__all__ = ["ModelInspection", "inspect"]


@dataclass(frozen=True)
class ModelInspection(Inspection):
    """The norm layers of a live model."""

    layers: tuple[LayerFacts, ...]

    def sheet(self) -> Sheet:
        """The facts laid out for `bnfreeze.tables`."""
        rows = [
            (
                layer.name or "(the model)",
                layer.kind,
                str(layer.num_features),
                layer.policy,
                layer.normalizes_with,
                "update" if layer.updates_statistics else _still(layer.why["statistics"]),
                "train" if layer.trains_affine else _still(layer.why["affine"]),
                f"{layer.eps:g}",
                layer.why["statistics"],
                layer.why["affine"],
            )
            for layer in self.layers
        ]
        moving = sum(layer.updates_statistics for layer in self.layers)
        training = sum(layer.trains_affine for layer in self.layers)
        on_batch = sum(layer.normalizes_with == "batch" for layer in self.layers)
        title, further = told_kinds(
            "What the next training step does", [layer.kind for layer in self.layers]
        )
        return Sheet(
            title=title,
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
                f"{len(rows)} norm layers: {on_batch} normalise with the batch, "
                f"{moving} update their statistics, {training} train weight or bias."
            ),
            further=further | {"eps", "statistics, because", "affine, because"},
        )


def _still(why: str) -> str:
    return "held" if why.startswith("held") else "still"


def inspect(
    model: object, *, optimizer: Optimizer | Iterable[Optimizer] | None = None
) -> Inspection:
    """Say what each norm layer of `model` will really do in the next training step.

    The step is taken to begin with ``model.train()``, as nearly every loop's does. A model that
    overrides ``train`` is asked by calling it, and every flag that the call changes is put back.
    Nothing else is run, and nothing is changed.

    Args:
        model: any `nn.Module`; wrappers such as DistributedDataParallel and torch.compile's too.
        optimizer: the optimizer, or several. With it, a weight or bias that is in none of them is
            known not to train, and one with a leftover gradient is known to move.

    Returns:
        An `Inspection`; print it, or read ``.layers``, ``.findings`` and ``.ok``.

    Raises:
        TypeError: `model` is no live `nn.Module`, or is TorchScript.
    """
    model = check_model(model)
    optimized = optimizers_by_id(optimizer)
    modules = named_modules(model)
    flags = training_flags(model)
    layers: list[LayerFacts] = []
    findings: list[Finding] = []
    for entry in modules:
        if is_norm(entry.module):
            facts = layer_facts(entry, flags[id(entry.module)], optimized)
            layers.append(facts)
            findings += _layer_findings(facts, entry.module, model.training, optimized)
        elif keeps_unknown_statistics(entry.module):
            findings.append(_unknown(entry))
    if not layers:
        findings.append(
            Finding("note", "no-norm-layer", "", "The model has no norm layer.", "Nothing to do.")
        )
    if _all_held(modules):
        findings.append(
            Finding(
                "warning",
                "nothing-trains",
                "",
                "Every parameter of the model is held: there is nothing left to train, and "
                "backward() fails.",
                "Leave out what shall train, the head, say: {'**': 'eval+weights', 'fc': 'none'}.",
            )
        )
    if optimized and not any(id(parameter) in optimized for parameter in model.parameters()):
        findings.append(
            Finding(
                "warning",
                "optimizer-without-parameters",
                "",
                "The optimizer holds none of the model's parameters, so its steps do not change "
                "the model.",
                "Build the optimizer from model.parameters(), after the model got its final "
                "parameters (moved to its device, wrapped, or loaded whole).",
            )
        )
    return ModelInspection(tuple(layers), by_gravity(findings))


def _all_held(modules: Iterable[NamedModule]) -> bool:
    records = [record_of(entry.module) for entry in modules]
    if not any(record is not None and Policy.WEIGHTS in record.policy for record in records):
        return False
    parameters = [p for entry in modules for p in entry.module._parameters.values()]
    return not any(p is not None and p.requires_grad for p in parameters)


def _layer_findings(
    facts: LayerFacts, layer: nn.Module, root_training: bool, optimized: Mapping[int, str] | None
) -> Iterator[Finding]:
    record = record_of(layer)
    name = facts.name
    if is_lazy(layer):
        yield Finding(
            "warning",
            "lazy",
            name,
            "it has not seen an input yet, so it has no tensors to hold.",
            "Run one forward pass before freezing.",
        )
        return
    if not keeps_statistics(layer):
        yield Finding(
            "warning",
            "no-running-stats",
            name,
            "it was built with track_running_stats=False: there is nothing to freeze, and "
            "it normalises with the batch in eval mode too.",
            "Build it with track_running_stats=True and load statistics, or leave it.",
        )
    elif facts.normalizes_with == "batch" and _statistics_stand_still(facts, layer):
        chosen = record is not None and record.policy.freezes_statistics
        yield Finding(
            "note" if chosen else "warning",
            "batch-stats-in-train",
            name,
            f"its statistics are fixed ({_why_fixed(facts, layer)}), but train mode normalises "
            f"with the batch: eval mode is another function.",
            "Meant so with policy 'stats'; otherwise use freeze(model, 'eval').",
        )
    elif facts.updates_statistics and affine_parameters(layer) and not facts.trains_affine:
        chosen = record is not None
        yield Finding(
            "note" if chosen else "warning",
            "statistics-drift",
            name,
            f"weight and bias do not train ({facts.why['affine']}), "
            f"but the running statistics still update in each forward pass.",
            "They are buffers, which no optimizer and no requires_grad holds: "
            "use freeze(model, 'eval').",
        )
    if root_training and not layer.training and facts.why["normalizes_with"] == "train mode":
        yield Finding(
            "warning",
            "eval-not-lasting",
            name,
            "it is in eval mode now, and the next model.train() undoes that.",
            "Use freeze(model, 'eval'), which model.train() does not undo.",
        )
    yield from _gradient_findings(name, layer, optimized)
    if keeps_statistics(layer):
        mean, var, count = (getattr(layer, stat, None) for stat in STATISTICS)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            yield from statistics_findings(
                name,
                _at_hand(mean),
                _at_hand(var),
                None if count is None or count.is_meta else int(count),
                facts.eps,
                dtypes=(_dtype_name(mean), _dtype_name(var)),
            )


def _at_hand(stat: Tensor) -> Tensor | None:
    if stat.is_meta:
        return None
    stat = stat.detach().cpu()
    return stat.float() if stat.is_floating_point() and stat.dtype.itemsize < 4 else stat


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _statistics_stand_still(facts: LayerFacts, layer: nn.Module) -> bool:
    return not facts.updates_statistics or getattr(layer, "momentum", None) == 0


def _why_fixed(facts: LayerFacts, layer: nn.Module) -> str:
    if facts.updates_statistics:
        return "momentum is 0; num_batches_tracked still rises"
    return facts.why["statistics"]


def _gradient_findings(
    name: str, layer: nn.Module, optimized: Mapping[int, str] | None
) -> Iterator[Finding]:
    own = {n: p for n, p in layer._parameters.items() if p is not None and not p.requires_grad}
    left = [n for n, p in own.items() if p.grad is not None]
    if left:
        yield Finding(
            "warning",
            "grad-left",
            name,
            f"{_and(left)} requires_grad=False but a .grad is left: "
            f"the next optimizer step moves it.",
            "Use freeze(model, 'affine'), which clears it, or set .grad = None.",
        )
    optimized = optimized or {}
    record = record_of(layer)
    moving = [
        name
        for name in (record.requires_grad if record else ())
        if (parameter := layer._parameters.get(name)) is not None and parameter.requires_grad
    ]
    if moving:
        yield Finding(
            "warning",
            "held-trains",
            name,
            f"{_and(moving)} requires_grad=True again, though policy {policy_name(layer)} holds.",
            "Something set the flag since, requires_grad_() on the whole model, say: freeze again.",
        )
    listed = [n for n in frozen_names(layer) if n in own and id(own[n]) in optimized]
    if listed and not left:
        names = " and ".join(listed)
        tidy = "build the optimizer from the parameters that have requires_grad=True."
        if "LBFGS" in {optimized[id(own[n])] for n in listed}:
            yield Finding(
                "warning",
                "in-optimizer",
                name,
                f"{names} is held and stands in LBFGS, which moves all that it was given along "
                f"its past steps, without a gradient too.",
                f"After freezing, {tidy}",
            )
        else:
            yield Finding(
                "note",
                "in-optimizer",
                name,
                f"{names} is held and stands in the optimizer, which passes it over while its "
                f".grad is None.",
                f"Harmless; to be tidy, {tidy}",
            )


def _and(names: list[str]) -> str:
    return " and ".join(names) + (" has" if len(names) == 1 else " have")


def _unknown(entry: NamedModule) -> Finding:
    return Finding(
        "warning",
        "unknown-norm",
        entry.name,
        f"{type(entry.module).__name__} keeps running statistics, but is no norm layer "
        f"that bnfreeze knows: it is left alone.",
        "Let it derive from torch's batch norm, or hold it yourself and verify.",
    )
