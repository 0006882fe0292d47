"""Findings from the values of a norm layer's statistics, wherever these were read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfreeze.findings import Finding

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
) -> Iterator[Finding]:
    """What the running statistics of one layer tell.

    Args:
        layer: the layer's dotted name.
        mean: ``running_mean``, shape (C,), as a CPU tensor or a NumPy array of any real dtype;
            None where the values cannot be had (a tensor on the meta device).
        var: ``running_var``, shape (C,), likewise.
        count: ``num_batches_tracked``, or None where there is none.
        eps: the layer's eps, or None where it is not known (a state_dict does not hold it).
        dtypes: in which dtypes mean and var are kept, as torch names them.

    Yields:
        findings with the codes ``stats-dtype``, ``stats-nonfinite``, ``var-nonpositive``,
        ``never-trained`` and ``eps-zero``.
    """
    for name, dtype in zip(("running_mean", "running_var"), dtypes, strict=True):
        if dtype in _LOW_PRECISION or dtype.startswith("float8"):
            yield Finding(
                "warning",
                "stats-dtype",
                layer,
                f"{name} is {dtype}: rounded statistics make "
                f"a coarser layer than the one that was trained.",
                "Keep statistics in float32: convert the model first, then load the checkpoint "
                "into float32 statistics.",
            )
            break
    if mean is None or var is None or not len(mean) or not len(var):
        return
    # NaN is below nothing. Written so that it reads the same to torch and to NumPy.
    bad_mean, bad_var = (int((~(abs(stat) < _INFINITY)).sum()) for stat in (mean, var))
    if bad_mean or bad_var:
        yield Finding(
            "error",
            "stats-nonfinite",
            layer,
            f"NaN or infinite: {bad_mean} of {len(mean)} means, {bad_var} of {len(var)} variances.",
            "Training diverged, or the file is damaged: go back to an earlier checkpoint.",
        )
    negative, zero = int((var < 0).sum()), int((var == 0).sum())
    if negative:
        yield Finding(
            "error",
            "var-nonpositive",
            layer,
            f"{negative} of {len(var)} running variances are negative, "
            f"the lowest {float(var[var < 0].min()):.3g}.",
            "A variance cannot be negative: the checkpoint was converted wrongly. "
            "Use the original one.",
        )
    elif zero:
        yield Finding(
            "warning",
            "var-nonpositive",
            layer,
            f"{zero} of {len(var)} running variances are 0: these channels are dead, and any "
            f"signal in them is multiplied by 1/sqrt(eps)"
            + (f" = {eps**-0.5:.3g}." if eps else "."),
            "Check what the channels feed on; a channel that never varied cannot be normalised.",
        )
    if eps is not None and eps <= 0:
        yield Finding(
            "warning",
            "eps-zero",
            layer,
            f"eps is {eps:g}: a channel whose variance is 0, or underflows in half precision, "
            f"gives NaN.",
            "Set the eps that the checkpoint was trained with, usually 1e-5.",
        )
    if not count and bool((mean == 0).all()) and bool((var == 1).all()):
        yield Finding(
            "warning",
            "never-trained",
            layer,
            "every mean is 0, every variance 1, and no batch was counted: "
            "these are the values of a new layer, which normalises nothing.",
            "Load the pretrained weights before freezing, or leave this layer out.",
        )
