"""probe: do the stored statistics fit this data?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bnfreeze.calibration.advice import advice_before, probe_findings
from bnfreeze.calibration.batches import Batches
from bnfreeze.calibration.fit import THRESHOLDS, LayerFit, Origin, Verdict, layer_fit
from bnfreeze.calibration.measuring import Measured, as_in_evaluation, measure, pooled_over_ranks
from bnfreeze.calibration.progress import Progress, Steps
from bnfreeze.calibration.report import ProbeReport
from bnfreeze.errors import PolicyError
from bnfreeze.findings import worst_first
from bnfreeze.norm_layers import STATISTICS, NamedModule, check_model, is_plain_norm, named_modules
from bnfreeze.patterns import Pattern, hint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["layer_fits", "probe", "probe_report", "selected_layers"]


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    select: str | Iterable[str] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    process_group: ProcessGroup | None = None,
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
        select: patterns of dotted module names, as for `freeze`; None for every norm layer.
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
    layers = selected_layers(model, select)
    source = Batches(batches, max_batches, passes=1 if process_group is None else 2)
    apart = None
    with (
        Steps(progress, source, passes=1) as steps,
        as_in_evaluation(model, process_group) as inner,
    ):

        def measured(which: Sequence[NamedModule], with_batch: Sequence[NamedModule]) -> Measured:
            def run() -> Measured:
                return measure(
                    inner,
                    which,
                    source,
                    forward=forward,
                    normalize_with_batch=with_batch,
                    progress=steps.advance,
                )

            return pooled_over_ranks(run, which, process_group)

        whole = measured(layers, ())
        fits = layer_fits(layers, whole)
        if not isinstance(batches, Iterator) and any(fit.verdict == "shifted" for fit in fits):
            steps.passes += 1
            every = selected_layers(model, None)
            apart = measured(every, every)
        return probe_report(layers, fits, whole, apart)


def probe_report(
    layers: Sequence[NamedModule],
    fits: tuple[LayerFit, ...],
    measured: Measured,
    apart: Measured | None = None,
) -> ProbeReport:
    """Judge the layers' statistics.

    Args:
        layers: the layers.
        fits: what `layer_fits` says of them.
        measured: what they were given in eval mode.
        apart: what some of them were given while they normalised with each batch.
    """
    if apart is not None:
        known = [entry for entry in layers if id(entry.module) in apart.moments]
        alone = {fit.name: fit.verdict for fit in layer_fits(known, apart)}
        fits = tuple(
            replace(fit, origin=_ORIGINS[alone[fit.name]])
            if fit.verdict == "shifted" and fit.name in alone
            else fit
            for fit in fits
        )
    first = next((m.samples for e in measured.order if (m := measured.moments[id(e.module)])), 0)
    return ProbeReport(
        fits,
        worst_first(probe_findings(fits)),
        advice_before(fits),
        first,
        measured.batches,
        THRESHOLDS,
    )


_ORIGINS: dict[Verdict, Origin] = {
    "shifted": "own",
    "fits": "carried",
    "uncertain": "unclear",
    "not reached": "",
}


def layer_fits(layers: Sequence[NamedModule], measured: Measured) -> tuple[LayerFit, ...]:
    """Compare each layer's statistics, as they are now, with what was measured."""
    return tuple(
        layer_fit(entry, measured.moments[id(entry.module)], measured.sizes[id(entry.module)])
        for entry in layers
    )


def selected_layers(model: nn.Module, select: str | Iterable[str] | None) -> list[NamedModule]:
    """The norm layers that keep statistics, all or those that a pattern matches.

    Raises:
        PolicyError: there are none.
    """
    modules = named_modules(model)
    layers = [
        entry
        for entry in modules
        if is_plain_norm(entry.module)
        and all(isinstance(entry.module._buffers.get(name), Tensor) for name in STATISTICS[:2])
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
            "No norm layer of this model keeps running statistics, so there is nothing to compare "
            "with the data."
        )
    if select is None:
        return layers
    patterns = [Pattern.parse(text) for text in ([select] if isinstance(select, str) else select)]
    names = [name for entry in modules for name in entry.plain_names]
    for pattern in patterns:
        if not any(_matches(pattern, entry) for entry in layers):
            raise PolicyError(
                f"select: {pattern.text!r} matches no norm layer that keeps statistics."
                + hint(pattern.text, names)
            )
    return [entry for entry in layers if any(_matches(pattern, entry) for pattern in patterns)]


def _matches(pattern: Pattern, entry: NamedModule) -> bool:
    return pattern.matches(*entry.names, *entry.plain_names)
