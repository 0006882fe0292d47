"""recalibrate: make the stored statistics those of some data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnfreeze.calibration.advice import advice_after
from bnfreeze.calibration.batches import Batches, Progress
from bnfreeze.calibration.measuring import CalibrationError, Measured, as_in_evaluation, measure
from bnfreeze.calibration.probe import MEASURABLE, left_out, measurable_layers, probe_report
from bnfreeze.calibration.report import Mode, RecalibrationReport
from bnfreeze.errors import PolicyError
from bnfreeze.findings import worst_first
from bnfreeze.norm_layers import AFFINE, STATISTICS, NamedModule, check_model, eps_of, matching
from bnfreeze.policies.record import frozen_names

_MEAN, _VAR, _COUNT = STATISTICS
# A tensor of the model, and its new value.
_New = tuple[Tensor, Tensor]


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
    process_group: dist.ProcessGroup | None = None,
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
    layers = measurable_layers(model)
    chosen = _not_frozen(layers, keep) if select is None else matching(layers, select, MEASURABLE)
    _check_sharing(layers, chosen)
    if keep:
        _check_affine(model, chosen)
    source = Batches(batches, max_batches, 2 if keep else 3, progress)
    scores: list[float] = []

    def rate() -> None:
        if score is not None:
            scores.append(float(score(inner)))

    with source, as_in_evaluation(model, process_group) as inner:
        run = partial(measure, inner, source, forward=forward, group=process_group)
        now = run(layers, exact=keep, first=rate)
        reached = _reached(chosen, now)
        apart = None if keep or exact else run(reached, with_batch=True, exact=True)
        before = probe_report(layers, now, apart)
        new: list[_New] = []
        source.passes += len(reached) - 1 if exact else 0
        for entry in reached:
            found = run([entry], exact=True) if exact else apart or now
            own = _new_values(entry, found, keep)
            new += own
            if exact:
                _write(own)  # for the layers behind it
        old = _current(new)
        try:
            _write(new)
            after = probe_report(layers, run(layers, first=rate))
        finally:
            _write(old)  # of weight and bias; buffers are put back on leaving
    # Nothing can fail from here on.
    old = _current(new)
    _write(new)
    report = RecalibrationReport(
        mode=mode,
        exact=exact,
        recalibrated=tuple(entry.name for entry in reached),
        before=before,
        after=after,
        score_before=scores[0] if scores else None,
        score_after=scores[1] if scores else None,
        passes=source.passes,
        findings=worst_first([*after.findings, *left_out(model)]),
        advice="",
        undo=partial(_write, old),
    )
    return replace(report, advice=advice_after(report))


def _not_frozen(layers: Sequence[NamedModule], keep: bool) -> list[NamedModule]:
    """Those in which nothing is frozen that would change."""
    written = {_MEAN, *(AFFINE if keep else ())}
    free = [entry for entry in layers if written.isdisjoint(frozen_names(entry.module))]
    if not free:
        raise PolicyError(
            f"All {len(layers)} norm layers are frozen, and frozen layers are "
            f"recalibrated only if they are named: pass select='**' to change them all the same."
        )
    return free


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
    """Refuse what has no weight and bias that could change without changing something else."""
    own = {module: {**module._parameters, **module._buffers} for module in model.modules()}
    holders = Counter(id(tensor) for tensors in own.values() for tensor in tensors.values())
    for entry in chosen:
        affine = [own[entry.module].get(name) for name in AFFINE]
        problem = ""
        if not all(isinstance(tensor, Tensor) for tensor in affine):
            problem = "this layer has none of its own"
        elif any(holders[id(tensor)] > 1 for tensor in affine):
            problem = "another module shares them, whose function would change"
        if problem:
            raise PolicyError(
                f"{entry.name or 'the model'}: mode='keep-function' changes weight and bias, and "
                f"{problem}. Leave it out by select=, or use mode='replace'."
            )


def _reached(chosen: Sequence[NamedModule], measured: Measured) -> list[NamedModule]:
    """Those of the chosen layers that were given data, in the order of their first call."""
    by_name = {entry.name: entry for entry in chosen}
    found = {by_name[name]: m for name, m in measured.moments.items() if name in by_name}
    if not found:
        raise CalibrationError(
            "None of the chosen norm layers was given any data: nothing was changed. "
            "Pass forward=, if the model has to be called in another way."
        )
    for entry, moments in found.items():
        if not moments.has_variance:
            raise CalibrationError(
                f"{entry.name or 'the model'}: a single value per channel was measured"
                f"{' in each sample' if moments.within else ''}, and one value has no variance. "
                f"Nothing was changed."
            )
    return list(found)


def _new_values(entry: NamedModule, measured: Measured, keep: bool) -> list[_New]:
    """Statistics of the data; with `keep` a weight and a bias that compute the same as before.

    Raises:
        CalibrationError: the dtype of a tensor is too narrow for its new value, or this pass did
            not reach the layer.
    """
    if entry.name not in measured.moments:
        raise CalibrationError(
            f"{entry.name or 'the model'}: no batch reached it in a later pass. Nothing was "
            f"changed."
        )
    layer, moments = entry.module, measured.moments[entry.name]
    stored = [layer.get_buffer(name) for name in (_MEAN, _VAR)]
    # What is stored is rounded, and it is what the layer will compute with.
    rounded = [v.to(t.dtype) for v, t in zip((moments.mean, moments.variance), stored, strict=True)]
    new = list(zip(stored, rounded, strict=True))
    if isinstance(count := getattr(layer, _COUNT, None), Tensor):
        new.append((count, torch.tensor(measured.batches)))
    if keep:
        weight, bias = (getattr(layer, name) for name in AFFINE)
        # On the CPU: some accelerators have no fp64.
        mean, var, w, b = (t.detach().cpu().double() for t in (*stored, weight, bias))
        new_mean, new_var = (t.double() for t in rounded)
        eps = eps_of(layer) or 0.0
        scale = w / (var + eps).sqrt()
        new += [(weight, (scale * (new_var + eps).sqrt()).to(weight.dtype))]
        new += [(bias, (b + (new_mean - mean) * scale).to(bias.dtype))]
    for tensor, value in new:
        if not bool(torch.isfinite(value).all()):
            raise CalibrationError(
                f"{entry.name or 'the model'}: a new value is beyond the range of {tensor.dtype}. "
                f"Nothing was changed. Use the model in float32."
            )
    return new


def _current(new: Sequence[_New]) -> list[_New]:
    return [(tensor, tensor.detach().clone()) for tensor, _ in new]


def _write(values: Sequence[_New]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
