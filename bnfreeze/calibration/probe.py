"""probe: do the stored statistics fit this data?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor, nn

from bnfreeze.calibration.advice import advice_before, probe_findings
from bnfreeze.calibration.batches import Batches, Progress
from bnfreeze.calibration.fit import THRESHOLDS, THRESHOLDS_APART, Origin, Verdict, layer_fit
from bnfreeze.calibration.measuring import Measured, as_in_evaluation, measure
from bnfreeze.calibration.report import ProbeReport
from bnfreeze.errors import PolicyError
from bnfreeze.findings import Finding, Level, finding, worst_first
from bnfreeze.nn.eager import PLAIN
from bnfreeze.norm_layers import (
    STATISTICS,
    NamedModule,
    check_model,
    has_known_forward,
    is_plain_norm,
    matching,
    named_modules,
)
from bnfreeze.policies.record import layer_class

MEASURABLE: Final = "norm layer that can be measured"

_MERGED: Final = (
    "every mean is 0, all variances are alike, and the bias was trained. Either weight and bias "
    "include the statistics, as in models from Caffe2, or these were reset or not loaded.",
    "In the first case, keep it frozen, and do not recalibrate it. In the second, load the "
    "pretrained statistics, or recalibrate it.",
)


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    select: str | Iterable[str] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress = None,
) -> ProbeReport:
    """Say whether the statistics that a model has stored fit some data.

    ::

        report = bnfreeze.probe(model, loader)
        print(report)          # a table; report.advice says what to do

    The model runs as in evaluation, once over the data. If layers do not fit, it runs once more,
    with all layers normalising with each batch: a shift in an early layer is carried to all layers
    behind it, and this tells where it starts. Nothing changes: neither tensors, training flags,
    gradients, hooks, nor the random state. Labels are not needed.

    Args:
        model: any `nn.Module`, frozen or not. Of one wrapped by `DistributedDataParallel`,
            `DataParallel` or `torch.compile`, the module inside is run.
        batches: a DataLoader, or any iterable of batches. Of a tuple or list the first item is the
            model's input, of a dict ``pixel_values``, ``image``, ``images``, ``input``,
            ``inputs`` or ``x``. Tensors are moved to the model's device. Several hundred samples
            like those that the model will see are a good number; the report says if they are
            too few. An iterator that can be read only once is enough; then there is no second run.
        select: patterns of dotted module names, as for `freeze`; None for every norm layer. Frozen
            layers of other libraries whose weight and bias include the statistics, as in models
            from Caffe2, are left out, and so are classes of your own whose forward takes a mask.
        forward: how to run the model on a batch: ``forward(model, batch)``.
        max_batches: stop after so many.
        process_group: pool over its ranks, which may have different numbers of batches, and all of
            which have to call this, with data that can be read twice. (A sharded model gathers its
            parameters in each forward pass: with it all ranks need the same number.) Where the
            ranks' statistics differ, those of the first rank are judged. None: this process alone.
        progress: True shows a bar on a terminal; or a function of the number of batches done and
            of all, None if not known.

    Returns:
        a report, the same on every rank.

    Raises:
        TypeError: `model` is no `nn.Module`, `batches` no iterable, or nothing in a batch looks
            like an input.
        PolicyError: no norm layer keeps statistics, or `select` matches none.
        CalibrationError: the data has NaN or infinity in it, or there are no batches.
    """
    check_model(model)
    every = measurable_layers(model)
    layers = every if select is None else matching(every, select, MEASURABLE)
    source = Batches(batches, max_batches, 1 if process_group is None else 2, progress)
    source.passes = 1  # as long as no layer is known not to fit
    with source, as_in_evaluation(model, process_group) as inner:
        run = partial(measure, inner, source, forward=forward, group=process_group)
        whole = run(layers)
        report = probe_report(layers, whole)
        if not isinstance(batches, Iterator) and any(x.verdict == "shifted" for x in report.layers):
            source.passes = 2
            report = probe_report(layers, whole, run(every, with_batch=True))
    return replace(report, findings=worst_first([*report.findings, *left_out(model)]))


def left_out(model: nn.Module) -> Iterator[Finding]:
    """What is said of norm layers that are not measured, or perhaps should not be."""
    for entry in named_modules(model):
        layer = entry.module
        if is_plain_norm(layer) and _are_merged(layer):
            level: Level = "note" if layer._buffers.get(STATISTICS[2]) is None else "warning"
            yield finding("never-trained", entry.name, *_MERGED, level=level)
        elif is_plain_norm(layer) and (mask := _mask_taken(layer)):
            yield finding(
                "layer-not-reached",
                entry.name,
                f"not measured: the forward of {layer_class(layer).__name__} takes {mask!r}, and "
                f"may leave out a part of its input.",
                "Let the layer gather its statistics itself, in train mode.",
            )


def probe_report(
    layers: Sequence[NamedModule], measured: Measured, apart: Measured | None = None
) -> ProbeReport:
    """Judge the layers' statistics, as they are now.

    Args:
        layers: the layers.
        measured: what they were given in eval mode.
        apart: what some of them were given while they normalised with each batch.
    """
    fits = []
    for entry in layers:
        fit = layer_fit(entry, measured.moments.get(entry.name))
        if apart is not None and fit.verdict == "shifted":
            alone = layer_fit(entry, apart.moments.get(entry.name), THRESHOLDS_APART)
            fit = replace(fit, origin=_ORIGINS[alone.verdict])
        fits.append(fit)
    return ProbeReport(
        layers=tuple(fits),
        findings=worst_first(probe_findings(fits)),
        advice=advice_before(fits),
        samples=next((moments.samples for moments in measured.moments.values()), 0),
        batches=measured.batches,
        thresholds=THRESHOLDS,
    )


_ORIGINS: Final[dict[Verdict, Origin]] = {
    "shifted": "own",
    "fits": "carried",
    "uncertain": "unclear",
    "not reached": "",
}


def measurable_layers(model: nn.Module) -> list[NamedModule]:
    """The norm layers that keep statistics.

    Raises:
        PolicyError: there are none, or they have no values.
    """
    layers = [
        entry
        for entry in named_modules(model)
        if is_plain_norm(entry.module)
        and all(isinstance(entry.module._buffers.get(name), Tensor) for name in STATISTICS[:2])
        and not (entry.module._buffers.get(STATISTICS[2]) is None and _are_merged(entry.module))
        and not _mask_taken(entry.module)
    ]
    for entry in layers:
        if any(entry.module.get_buffer(name).is_meta for name in STATISTICS[:2]):
            raise PolicyError(
                f"{entry.name or 'The model'}: its running statistics are on the meta device and "
                f"have no values. Load them onto a device first; of a model that Accelerate "
                f"offloads, keep the buffers (offload_buffers=False)."
            )
    if not layers:
        raise PolicyError(
            "No norm layer of this model keeps running statistics that could be compared with the "
            "data. (In models from Caffe2 they are a part of weight and bias, and cannot be. "
            "Layers whose forward takes a mask are left out.)"
        )
    return layers


def _mask_taken(layer: nn.Module) -> str:
    """The parameter by which a forward of the user's own may leave out a part of its input.

    As a masked batch norm leaves out padding. Empty if there is none.
    """
    kind = layer_class(layer)
    if has_known_forward(layer, kind):
        return ""
    names = list(inspect.signature(kind.forward).parameters)[2:]
    return next((name for name in names if re.search("mask|len|pad", name)), "")


def _are_merged(layer: nn.Module) -> bool:
    """Whether weight and bias seem to include the statistics, as in models from Caffe2.

    Then every mean is 0, all variances are alike, no batch was counted, and the bias is not 0.
    """
    mean, var, count = (layer._buffers.get(name) for name in STATISTICS)
    bias: Any = getattr(layer, "bias", None)
    # Of one that is sharded or on the meta device, it is not asked.
    if mean is None or var is None or type(bias) not in PLAIN or mean.is_meta or bias.is_meta:
        return False
    return not count and bool(bias.any()) and not bool(mean.any()) and bool((var == var[:1]).all())
