"""recalibrate: make the stored statistics those of some data."""

from __future__ import annotations

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
from bnfreeze.calibration.probe import probe_report, selected_layers
from bnfreeze.calibration.progress import Progress, Steps
from bnfreeze.calibration.report import Mode, RecalibrationReport
from bnfreeze.errors import PolicyError
from bnfreeze.findings import worst_first
from bnfreeze.norm_layers import AFFINE, STATISTICS, NamedModule, check_model, eps_of
from bnfreeze.policies.record import frozen_names

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
        select: patterns of dotted module names. None for every norm layer whose statistics are not
            frozen; frozen ones are recalibrated only if a pattern matches them.
        mode: ``"replace"`` (AdaBN): the layers normalise this data. They are measured while they
            normalise with each batch, as the layers after them then see normalised inputs.
            ``"keep-function"``: weight and bias are changed with the statistics, so that the model
            computes what it did before. It is for fine-tuning from the same function with
            statistics that fit.
        exact: one layer after the other, from front to back, in eval mode, with all before it
            recalibrated: a pass over the data for each layer. What remains otherwise is in the
            report: the batches' noise.
        score: a function of the model (an accuracy on labelled data, say; more is better), called
            in eval mode before and after.
        forward: as for `probe`.
        max_batches: as for `probe`.
        process_group: pool over its ranks. No layer is synchronised while the model runs.
        progress: as for `probe`.

    Returns:
        a report; on every rank the same, except for the scores.

    Raises:
        TypeError: as `probe`; or `batches` can be read only once.
        ValueError: an unknown `mode`, or ``exact=True`` with ``"keep-function"``, which is exact.
        PolicyError: nothing is left to recalibrate; or ``"keep-function"`` and a layer has no
            weight and bias of its own.
        CalibrationError: as `probe`; or a layer was given a single value per channel, of which
            there is no variance.
    """
    check_model(model)
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, not {mode!r}.")
    keep = mode == "keep-function"
    if keep and exact:
        raise ValueError("exact=True: the mode 'keep-function' is exact, in a single pass.")
    layers = selected_layers(model, None)
    chosen = _chosen(layers, selected_layers(model, select), by_name=select is not None)
    if keep:
        _check_affine(chosen)
    source = Batches(batches, max_batches, passes=2 if keep else 3)

    with Steps(progress, source, passes=2 if keep else 3) as steps:

        def measured(model: nn.Module, which: Sequence[NamedModule], **options: Any) -> Measured:
            def run() -> Measured:
                return measure(
                    model, which, source, forward=forward, progress=steps.advance, **options
                )

            return pooled_over_ranks(run, which, process_group)

        passes = 2  # before and after
        with as_in_evaluation(model) as inner:
            first = None if score is None else float(score(model))
            now = measured(inner, layers, exact=keep)
            apart = None
            reached = _reached(chosen, now)
            if keep:
                writes = [w for e in reached for w in _keeping_function(e, now)]
            elif exact:
                steps.more_passes(len(reached) - 1)
                passes += len(reached)
                writes = []
                for entry in reached:
                    alone = measured(inner, [entry], exact=True)
                    own = _replacing(entry, alone)
                    _write(own)  # for the layers behind it; undone on leaving
                    writes += own
            else:
                passes += 1
                apart = measured(inner, reached, normalize_with_batch=reached, exact=True)
                writes = [w for entry in reached for w in _replacing(entry, apart)]

        before = probe_report(layers, now, apart)  # the buffers are the old ones again
        old = [(tensor, tensor.detach().clone()) for tensor, _ in writes]

        def undo() -> None:
            _write(old)

        try:
            _write(writes)
            with as_in_evaluation(model) as inner:
                after = probe_report(layers, measured(inner, layers))
                then = None if score is None else float(score(model))
        except BaseException:
            undo()
            raise
    scores = None if first is None or then is None else (first, then)
    return RecalibrationReport(
        mode=mode,
        exact=exact,
        recalibrated=tuple(entry.name for entry in reached),
        before=before,
        after=after,
        score_before=first,
        score_after=then,
        passes=passes,
        findings=worst_first(after.findings),
        advice=advice_after(before.layers, after.layers, mode, scores),
        undo=undo,
    )


def _chosen(
    layers: Sequence[NamedModule], matched: Sequence[NamedModule], *, by_name: bool
) -> list[NamedModule]:
    """What to recalibrate: frozen layers only if they were named."""
    if by_name:
        return list(matched)
    free = [entry for entry in layers if _MEAN not in frozen_names(entry.module)]
    if not free:
        raise PolicyError(
            f"The statistics of all {len(layers)} norm layers are frozen, and frozen layers are "
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
        if measured.moments[id(entry.module)].elements < 2:
            raise CalibrationError(
                f"{entry.name or 'the model'}: a single value per channel was measured, and one "
                f"value has no variance. Nothing was changed. Use more data."
            )
    return reached


def _replacing(entry: NamedModule, measured: Measured) -> _Writes:
    layer = entry.module
    mean, var = running_statistics(layer, measured.moments[id(layer)])
    writes = [(_buffer(layer, _MEAN), mean), (_buffer(layer, _VAR), var)]
    if isinstance(count := getattr(layer, _COUNT, None), Tensor):
        writes.append((count, torch.tensor(measured.batches)))
    return writes


def _keeping_function(entry: NamedModule, measured: Measured) -> _Writes:
    """Statistics of the data, with a weight and a bias that compute the same as before."""
    layer = entry.module
    writes = _replacing(entry, measured)
    (mean, new_mean), (var, new_var) = writes[:2]
    weight, bias = (getattr(layer, name) for name in AFFINE)
    # What is stored is rounded, and it is what the layer will compute with.
    new_mean, new_var = (new.to(old).double() for new, old in ((new_mean, mean), (new_var, var)))
    eps = eps_of(layer) or 0.0
    old_scale = weight.detach().double() / (var.double() + eps).sqrt()
    new_weight = old_scale * (new_var + eps).sqrt()
    new_bias = bias.detach().double() + (new_mean - mean.double()) * old_scale
    return [*writes, (weight, new_weight), (bias, new_bias)]


def _check_affine(chosen: Sequence[NamedModule]) -> None:
    for entry in chosen:
        own = {**entry.module._parameters, **entry.module._buffers}
        if any(not isinstance(own.get(name), Tensor) for name in AFFINE):
            raise PolicyError(
                f"{entry.name or 'the model'}: mode='keep-function' changes weight and bias, and "
                f"this layer has none of its own. Leave it out by select=, or use mode='replace'."
            )
    tensors = [own for entry in chosen for own in entry.module.parameters(recurse=False)]
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise PolicyError(
            "mode='keep-function' changes weight and bias, and here norm layers share them: what "
            "keeps the function of one would change another. Use mode='replace'."
        )


def _buffer(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, Tensor)
    return tensor


def _write(writes: _Writes) -> None:
    with torch.no_grad():
        for tensor, value in writes:
            tensor.copy_(value)
