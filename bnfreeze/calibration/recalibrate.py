"""recalibrate: make the stored statistics those of some data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from bnfreeze.calibration.advice import advice_after
from bnfreeze.calibration.batches import Batches
from bnfreeze.calibration.measuring import (
    CalibrationError,
    Measured,
    as_in_evaluation,
    measure,
    pooled_over_ranks,
    running_statistics,
)
from bnfreeze.calibration.probe import layer_fits, probe_report, selected_layers
from bnfreeze.calibration.progress import Progress, Steps
from bnfreeze.calibration.report import Mode, RecalibrationReport
from bnfreeze.errors import PolicyError
from bnfreeze.norm_layers import AFFINE, STATISTICS, NamedModule, check_model, eps_of
from bnfreeze.policies.record import frozen_names
from bnfreeze.torch_private import _InstanceNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["recalibrate"]

_MEAN, _VAR, _COUNT = STATISTICS
# The new value of each tensor that is written.
_Writes = list[tuple[Tensor, Tensor]]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    select: str | Iterable[str] | None = None,
    mode: Mode = "replace",
    exact: bool = False,
    score: Callable[[nn.Module], float] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int | None = None,
    process_group: ProcessGroup | None = None,
    progress: Progress = None,
) -> RecalibrationReport:
    """Replace the running statistics by those of some data. Nothing is trained.

    ::

        report = bnfreeze.recalibrate(model, loader, score=accuracy)
        print(report)
        bnfreeze.freeze(model, "eval+affine")

    Mean, unbiased variance and count of the pooled data are written into the same buffers: each
    value counts once, whatever the sizes of the batches. Nothing else changes; after an error,
    nothing has. Only `score` needs labels.

    Args:
        model: any `nn.Module`.
        batches: as for `probe`. The data are gone through several times, so no one-shot iterator.
        select: patterns of dotted module names. None for every norm layer in which nothing is
            frozen that would change; others are recalibrated only if a pattern matches them.
        mode: ``"replace"`` (AdaBN): the layers normalise this data. They are measured while they
            normalise with each batch, as the layers after them then see normalised inputs.
            ``"keep-function"``: weight and bias are changed with the statistics, so that the model
            computes what it did before. It is for fine-tuning from the same function with
            statistics that fit.
        exact: one layer after the other, from front to back, in eval mode, with all before it
            recalibrated: a pass over the data for each layer. What remains otherwise is in the
            report: the batches' noise.
        score: a function of the model (an accuracy on labelled data, say; more is better), called
            in eval mode before and after. Of a wrapped model it gets the module inside: DDP would
            wait for other ranks.
        forward: as for `probe`.
        max_batches: as for `probe`.
        process_group: pool over its ranks. No layer is synchronised while the model runs.
        progress: as for `probe`.

    Returns:
        a report; on every rank the same, except for the scores and what is advised from them.

    Raises:
        TypeError: as `probe`; or `batches` can be read only once.
        ValueError: an unknown `mode`, or ``exact=True`` with ``"keep-function"``, which is exact.
        PolicyError: nothing is left to recalibrate; or ``"keep-function"`` and a layer has no
            weight and bias of its own.
        CalibrationError: as `probe`; or a layer was given a single value per channel, which has no
            variance; or a new value is beyond the range of the layer's dtype.
    """
    check_model(model)
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, not {mode!r}.")
    keep = mode == "keep-function"
    if keep and exact:
        raise ValueError("exact=True: the mode 'keep-function' is exact, in a single pass.")
    layers = selected_layers(model, None)
    chosen = _chosen(layers, selected_layers(model, select), keep=keep, by_name=select is not None)
    _check_sharing(layers, chosen)
    if keep:
        _check_affine(model, chosen)
    passes = 2 if keep else 3
    source = Batches(batches, max_batches, passes)
    scores: list[float] = []
    with Steps(progress, source, passes) as steps:

        def measured(
            inner: nn.Module, which: Sequence[NamedModule], scored: bool = False, **options: Any
        ) -> Measured:
            def run() -> Measured:
                if scored and score is not None:  # here, so that its errors reach all ranks
                    scores.append(float(score(inner)))
                return measure(
                    inner, which, source, forward=forward, progress=steps.advance, **options
                )

            return pooled_over_ranks(run, which, process_group)

        with as_in_evaluation(model, process_group) as inner:
            now = measured(inner, layers, scored=True, exact=keep)
            fits = layer_fits(layers, now)
            apart = None
            reached = _reached(chosen, now)
            if keep:
                writes = [w for e in reached for w in _keeping_function(e, now)]
            elif exact:
                steps.passes += len(reached) - 1
                writes = []
                for entry in reached:
                    alone = measured(inner, [entry], exact=True)
                    own = _replacing(entry, alone)
                    _write(own)  # for the layers behind it; undone on leaving
                    writes += own
            else:
                apart = measured(inner, reached, normalize_with_batch=reached, exact=True)
                writes = [w for entry in reached for w in _replacing(entry, apart)]
            before = probe_report(layers, fits, now, apart)
            _check_range(writes, reached)

        old = [(tensor, tensor.detach().clone()) for tensor, _ in writes]

        def undo() -> None:
            _write(old)

        try:
            _write(writes)
            with as_in_evaluation(model, process_group) as inner:
                then = measured(inner, layers, scored=True)
                after = probe_report(layers, layer_fits(layers, then), then)
        except BaseException:
            undo()
            raise
    first, last = scores or (None, None)
    names = tuple(entry.name for entry in reached)
    return RecalibrationReport(
        mode=mode,
        exact=exact,
        recalibrated=names,
        before=before,
        after=after,
        score_before=first,
        score_after=last,
        passes=steps.passes,
        findings=after.findings,
        advice=advice_after(before.layers, after.layers, names, mode, exact, scores),
        undo=undo,
    )


def _chosen(
    layers: Sequence[NamedModule], matched: Sequence[NamedModule], *, keep: bool, by_name: bool
) -> list[NamedModule]:
    """What to recalibrate: frozen layers only if they were named."""
    if by_name:
        return list(matched)
    written = {_MEAN, *(AFFINE if keep else ())}
    free = [entry for entry in layers if written.isdisjoint(frozen_names(entry.module))]
    if not free:
        raise PolicyError(
            f"All {len(layers)} norm layers are frozen, and frozen layers are "
            f"recalibrated only if they are named: pass select='**' to change them all the same."
        )
    return free


def _reached(chosen: Sequence[NamedModule], measured: Measured) -> list[NamedModule]:
    """Those of the chosen layers that were given data, in the order of their first call."""
    wanted = {id(entry.module) for entry in chosen}
    reached = [
        entry
        for entry in measured.order
        if id(entry.module) in wanted and measured.moments[id(entry.module)].samples
    ]
    if not reached:
        raise CalibrationError(
            "None of the chosen norm layers was given any data: nothing was changed. "
            "Pass forward=, if the model has to be called in another way."
        )
    for entry in reached:
        moments = measured.moments[id(entry.module)]
        instance = isinstance(entry.module, _InstanceNorm)
        if moments.elements == (moments.samples if instance else 1):
            raise CalibrationError(
                f"{entry.name or 'the model'}: a single value per channel was measured"
                f"{' in each sample' if instance else ''}, and one value has no variance. "
                f"Nothing was changed."
            )
    return reached


def _replacing(entry: NamedModule, measured: Measured) -> _Writes:
    layer = entry.module
    mean, var = running_statistics(layer, measured.moments[id(layer)])
    writes = [(layer.get_buffer(_MEAN), mean), (layer.get_buffer(_VAR), var)]
    if isinstance(count := getattr(layer, _COUNT, None), Tensor):
        writes.append((count, torch.tensor(measured.batches)))
    return writes


def _keeping_function(entry: NamedModule, measured: Measured) -> _Writes:
    """Statistics of the data, with a weight and a bias that compute the same as before."""
    layer = entry.module
    writes = _replacing(entry, measured)
    weight, bias = (getattr(layer, name) for name in AFFINE)
    # On the CPU: some accelerators have no fp64.
    mean, var, w, b = (
        t.detach().cpu().double() for t in (writes[0][0], writes[1][0], weight, bias)
    )
    # What is stored is rounded, and it is what the layer will compute with.
    new_mean, new_var = (new.cpu().to(old.dtype).double() for old, new in writes[:2])
    eps = eps_of(layer) or 0.0
    old_scale = w / (var + eps).sqrt()
    new_weight = old_scale * (new_var + eps).sqrt()
    new_bias = b + (new_mean - mean) * old_scale
    return [*writes, (weight, new_weight), (bias, new_bias)]


def _check_sharing(layers: Sequence[NamedModule], chosen: Sequence[NamedModule]) -> None:
    """Refuse a layer if another one has the same statistics: what fits one need not fit both."""
    written = {id(entry.module) for entry in chosen}
    owners: dict[int, NamedModule] = {}
    for entry in layers:
        for name in STATISTICS[:2]:
            other = owners.setdefault(id(entry.module.get_buffer(name)), entry)
            if other is not entry and written & {id(entry.module), id(other.module)}:
                raise PolicyError(
                    f"{other.name or 'The model'} and {entry.name} have the same {name}, which "
                    f"cannot fit the inputs of both. Give each its own statistics first: "
                    f"layer.{name} = layer.{name}.clone()."
                )


def _check_affine(model: nn.Module, chosen: Sequence[NamedModule]) -> None:
    holders = Counter(id(tensor) for module in model.modules() for tensor in _own(module))
    for entry in chosen:
        own = {**entry.module._parameters, **entry.module._buffers}
        if any(not isinstance(own.get(name), Tensor) for name in AFFINE):
            raise PolicyError(
                f"{entry.name or 'the model'}: mode='keep-function' changes weight and bias, and "
                f"this layer has none of its own. Leave it out by select=, or use mode='replace'."
            )
        if any(holders[id(own[name])] > 1 for name in AFFINE):
            raise PolicyError(
                f"{entry.name or 'the model'}: mode='keep-function' changes weight and bias, and "
                f"another module shares them, whose function would change. Use mode='replace'."
            )


def _check_range(writes: _Writes, reached: Sequence[NamedModule]) -> None:
    for tensor, value in writes:
        if not bool(torch.isfinite(value.to(tensor.dtype)).all()):
            owner = next(e.name for e in reached if any(t is tensor for t in _own(e.module)))
            raise CalibrationError(
                f"{owner or 'the model'}: a new value is beyond the range of {tensor.dtype}. "
                f"Nothing was changed. Use the model in float32."
            )


def _own(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


def _write(writes: _Writes) -> None:
    with torch.no_grad():
        for tensor, value in writes:
            tensor.copy_(value)
