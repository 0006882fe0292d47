"""Findings from the values of a norm layer's statistics, of a live layer and a stored one alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfreeze.findings import Finding, finding

__all__ = ["statistics_findings"]

_LOW_PRECISION = frozenset({"float16", "bfloat16"})
_INFINITY = float("inf")


def statistics_findings(
    layer: str,
    mean: Any,
    var: Any,
    count: int | None,
    eps: float | None,
    *,
    dtypes: tuple[str, str],
    key: str = "",
) -> Iterator[Finding]:
    """What the running statistics of one layer show.

    Args:
        layer: the layer's dotted name.
        mean: ``running_mean``, shape (C,), as a CPU tensor or a NumPy array of any real dtype;
            None where there are no values (a tensor on the meta device).
        var: ``running_var``, shape (C,), likewise.
        count: ``num_batches_tracked``, or None where there is none.
        eps: the layer's eps, or None where it is not known (a state_dict does not have it).
        dtypes: the dtypes of mean and var, as torch names them.
        key: in a checkpoint, the key of the layer's model.

    Yields:
        findings with the codes ``stats-dtype``, ``stats-nonfinite``, ``stats-var-nonpositive``,
        ``layer-eps-zero``, ``never-trained`` and ``stats-not-updated``.
    """
    for name, dtype in zip(("running_mean", "running_var"), dtypes, strict=True):
        dtype = dtype.removeprefix("torch.")
        if dtype in _LOW_PRECISION or dtype.startswith("float8"):
            yield finding("stats-dtype", layer, f"{name} is {dtype}.", key=key)
            break
    if mean is None or var is None or not len(mean) or not len(var):
        return
    # Every comparison with NaN is false. Written so that it works for torch and for NumPy.
    bad_mean, bad_var = (int((~(abs(stat) < _INFINITY)).sum()) for stat in (mean, var))
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
    if bool((mean == 0).all()) and bool((var == 1).all()):
        if count:
            yield finding(
                "stats-not-updated",
                layer,
                f"every mean is 0 and every variance 1, although {count:,} batches were counted.",
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
