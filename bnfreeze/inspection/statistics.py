"""Findings from the values of a norm layer's statistics, of a live layer and a stored one alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfreeze.checkpoints import StoredTensor
from bnfreeze.findings import Finding, finding

_LOW_PRECISION = frozenset({"float16", "bfloat16"})
# A new frozen layer of detectron2 has the variance 1 - eps; no eps is larger than this.
_LARGEST_EPS = 1.001e-3


def real_values(tensor: StoredTensor | None) -> NDArray[Any] | None:
    """The values, flat, where there are any and they are real numbers."""
    values = None if tensor is None or not tensor.has_values else tensor.values()
    if values is None or values.dtype.kind == "c":
        return None
    return values.astype(np.float64) if values.dtype.kind in "biu" else values


def batches_in(count: StoredTensor | None) -> int | None:
    """The number in ``num_batches_tracked``; None where there is none.

    An average of models (FedAvg, a soup) may keep it as a fraction. A part of a batch is one.
    """
    batches = None if count is None else count.item()
    return math.ceil(batches) if batches is not None and math.isfinite(batches) else None


def statistics_findings(
    layer: str,
    mean: NDArray[Any] | None,
    var: NDArray[Any] | None,
    count: int | None,
    eps: float | None,
    dtypes: tuple[str, str],
    affine: Iterable[StoredTensor],
    key: str = "",
) -> Iterator[Finding]:
    """What the running statistics of one layer show.

    Args:
        layer: the layer's dotted name.
        mean: the `real_values` of ``running_mean``.
        var: those of ``running_var``.
        count: ``num_batches_tracked``, or None where there is none.
        eps: the layer's eps, or None where it is not known (a state_dict does not have it).
        dtypes: the dtypes of mean and var, as torch names them.
        affine: weight and bias, as far as there are any; read only if they decide something.
        key: in a checkpoint, the key of the layer's model.

    Yields:
        findings with the codes ``stats-dtype``, ``stats-nonfinite``, ``stats-var-nonpositive``,
        ``layer-eps-zero``, ``never-trained`` and ``stats-not-updated``.
    """
    for name, dtype in zip(("running_mean", "running_var"), dtypes, strict=True):
        if dtype in _LOW_PRECISION or dtype.startswith("float8"):
            yield finding("stats-dtype", layer, f"{name} is {dtype}.", key=key)
            break
    if mean is None or var is None or not len(mean) or not len(var):
        return
    bad_mean, bad_var = (int((~np.isfinite(stat)).sum()) for stat in (mean, var))
    if bad_mean or bad_var:
        text = f"{bad_mean} of {len(mean)} means, {bad_var} of {len(var)} variances."
        yield finding("stats-nonfinite", layer, f"NaN or infinite: {text}", key=key)
    negative, zero = int((var < 0).sum()), int((var == 0).sum())
    if negative:
        lowest = f"{float(var[var < 0].min()):.3g}"
        text = f"{negative} of {len(var)} running variances are negative, the lowest {lowest}."
        yield finding("stats-var-nonpositive", layer, text, key=key)
    elif zero:
        factor = f" = {eps**-0.5:.3g}" if eps and eps > 0 else ""
        text = (
            f"{zero} of {len(var)} running variances are 0: these channels are dead, and any "
            f"signal in them is multiplied by 1/sqrt(eps){factor}."
        )
        yield finding("stats-var-nonpositive", layer, text, level="warning", key=key)
    if eps is not None and eps <= 0:
        yield finding("layer-eps-zero", layer, f"eps is {eps:g}.", key=key)
    if (mean == 0).all() and (var == var[0]).all() and 0 <= 1 - var[0] <= _LARGEST_EPS:
        if count:
            text = (
                f"every mean is 0 and every variance 1, although num_batches_tracked is {count:,}."
            )
            yield finding("stats-not-updated", layer, text, key=key)
        elif any(_varies(tensor) for tensor in affine):
            text = (
                "every mean is 0, every variance 1, and no batch was counted, but weight and bias "
                "are not those of a new layer: the statistics are missing, or they were folded "
                "into weight and bias, as in Detectron's weights."
            )
            remedy = (
                "Load a checkpoint that has them, or call bnfreeze.recalibrate(model, loader). If "
                "they were folded, nothing is wrong."
            )
            # Frozen layers, which alone are made from folded statistics, keep no count.
            level: Any = "note" if count is None else "warning"
            yield finding("never-trained", layer, text, remedy, level=level, key=key)
        else:
            text = (
                "every mean is 0, every variance 1, and no batch was counted: "
                "these are the values of a new layer, which normalises nothing."
            )
            yield finding("never-trained", layer, text, key=key)


def _varies(tensor: StoredTensor) -> bool:
    """Whether its elements differ from each other: those of a new layer are all 1, or all 0."""
    values = real_values(tensor)
    return values is not None and len(values) > 0 and bool((values != values[0]).any())
