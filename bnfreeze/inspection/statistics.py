"""Findings from the values of a norm layer's statistics, of a live layer and a stored one alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfreeze.checkpoints import StoredTensor
from bnfreeze.findings import Finding, finding

__all__ = ["batches_in", "real_values", "statistics_findings"]

_LOW_PRECISION = frozenset({"float16", "bfloat16"})


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
    bias: NDArray[Any] | None,
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
        bias: the `real_values` of the layer's bias, or None where there is none.
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
        yield finding(
            "stats-nonfinite",
            layer,
            f"NaN or infinite: {bad_mean} of {len(mean)} means, {bad_var} of {len(var)} variances.",
            key=key,
        )
    negative, zero = int((var < 0).sum()), int((var == 0).sum())
    if negative:
        yield finding(
            "stats-var-nonpositive",
            layer,
            f"{negative} of {len(var)} running variances are negative, "
            f"the lowest {float(var[var < 0].min()):.3g}.",
            key=key,
        )
    elif zero:
        factor = f" = {eps**-0.5:.3g}" if eps and eps > 0 else ""
        yield finding(
            "stats-var-nonpositive",
            layer,
            f"{zero} of {len(var)} running variances are 0: these channels are dead, and any "
            f"signal in them is multiplied by 1/sqrt(eps){factor}.",
            level="warning",
            key=key,
        )
    if eps is not None and eps <= 0:
        yield finding("layer-eps-zero", layer, f"eps is {eps:g}.", key=key)
    if (mean == 0).all() and (var == 1).all():
        if count:
            yield finding(
                "stats-not-updated",
                layer,
                f"every mean is 0 and every variance 1, although {count:,} batches were counted.",
                key=key,
            )
        elif bias is not None and bias.any():
            yield finding(
                "never-trained",
                layer,
                "every mean is 0 and every variance 1, and the bias was trained: either weight and "
                "bias include the statistics, as in models from Caffe2, or these were not loaded.",
                "In the first case, keep it frozen. In the second, load the pretrained statistics.",
                level="note" if count is None else "warning",
                key=key,
            )
        else:
            yield finding(
                "never-trained",
                layer,
                "every mean is 0, every variance 1, and no batch was counted: "
                "these are the values of a new layer, which normalises nothing.",
                key=key,
            )
