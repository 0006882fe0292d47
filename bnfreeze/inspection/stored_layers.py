"""The norm layers of a state_dict, found by the names of their statistics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bnfreeze.checkpoints import LayerSettings, StateDict, naming_file
from bnfreeze.checkpoints.stored_tensor import StoredTensor, shown
from bnfreeze.findings import Finding, finding, worst_first
from bnfreeze.inspection.statistics import batches_in, real_values, statistics_findings
from bnfreeze.patterns import MEAN_OR_VARIANCE
from bnfreeze.text import counted, listed

# A state_dict has names and values but no classes, so this is all that can be known of a layer.
BATCH_NORM: Final = "batch norm"
FROZEN_OR_OLD: Final = "frozen or old batch norm"

_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
_FOREIGN: Final = re.compile(MEAN_OR_VARIANCE)
# TensorFlow's averages have the name of what they average, and this behind it.
_AVERAGE: Final = "/ExponentialMovingAverage"
# torch's usual eps: a variance below it counts for less than eps does.
_USUAL_EPS: Final = 1e-5
# The least positive number of half precision is 2**-24; what is below half of it becomes 0.
_HALF_UNDERFLOW: Final = 2.0**-25
_DEAD_WEIGHT: Final = 1e-3


@dataclass(frozen=True)
class Spread:
    """How the finite values of one tensor are spread.

    Attributes:
        low: the least.
        high: the greatest.
        deciles: eleven numbers: the least, the nine deciles, the greatest.
    """

    low: float
    high: float
    deciles: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[Any] | None) -> Spread | None:
        """The spread of the finite values; None where there are none."""
        finite = () if values is None else values[np.isfinite(values)].astype(np.float64)
        if not len(finite):
            return None
        # Values that are there: between huge ones, an average could overflow.
        deciles = np.sort(finite)[np.arange(11) * (len(finite) - 1) // 10].tolist()
        return cls(deciles[0], deciles[-1], tuple(deciles))


@dataclass(frozen=True)
class StoredLayer:
    """One norm layer of a checkpoint.

    Attributes:
        name: the dotted name; empty where the model itself is the layer.
        kind: the name of its class, of a model that was saved whole. Of a state_dict, which has no
            classes, `BATCH_NORM` where the layer counts its batches; else `FROZEN_OR_OLD`: a frozen
            look-alike, or a batch norm that was saved before torch 0.4.1. An instance norm that
            tracks statistics has the same names, and is called a batch norm.
        num_features: the number of channels C.
        batches: num_batches_tracked; None where it is not kept.
        dtype: of running_var, as torch names it.
        affine: whether weight and bias are there.
        mean: the spread of running_mean; None where it has no finite value.
        var: the spread of running_var, likewise.
        near_dead: how many channels give next to nothing: the variance is below 1e-5 (eps
            outweighs it) or the weight is below 1e-3. A negative variance is none of these: it is
            an error.
        weight: the spread of the weight; None where it has none or no finite value.
        key: the dotted key of its state_dict in the checkpoint; empty at the top.
        eps: of a model that was saved whole; None where it is not known.
        momentum: likewise.
        training: the flag it was saved with, likewise.
        frozen_by: ``"bnfreeze"`` for a layer of a model that was saved whole while frozen.
    """

    name: str
    kind: str
    num_features: int
    batches: int | None
    dtype: str
    affine: bool
    mean: Spread | None
    var: Spread | None
    near_dead: int
    weight: Spread | None = None
    key: str = ""
    eps: float | None = None
    momentum: float | None = None
    training: bool | None = None
    frozen_by: str | None = None


def stored_layers(model: StateDict) -> tuple[tuple[StoredLayer, ...], tuple[Finding, ...]]:
    """Find the norm layers of a model and what a person should know about them.

    Only their own tensors are read.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    key = model.key
    modules: dict[str, dict[str, StoredTensor]] = {}
    for full, tensor in model.tensors.items():
        name, dot, part = full.rpartition(".")
        modules.setdefault(name or dot, {})[part] = tensor
    layers: list[StoredLayer] = []
    findings: list[Finding] = []
    for name, parts in modules.items():
        wanted: tuple[str, ...] = (*_STATISTICS, "weight", "bias")
        own = {part: parts[part] for part in wanted if part in parts}
        if not own.keys() & {*_STATISTICS}:
            continue
        if problem := _mismatch(own):
            findings.append(finding("stats-unpaired", name, problem, key=key))
            continue
        with naming_file(name):
            layer, own_findings = _layer(name, own, model)
        layers.append(layer)
        findings += own_findings
    findings += [*_across(layers, model), *_foreign(model)]
    if not layers and not findings:
        text = "No tensor looked at is named running_mean or running_var" + _bare(modules)
        findings.append(finding("model-no-norm-layer", "", text, key=key))
    return tuple(layers), worst_first(findings)


def _foreign(model: StateDict) -> Iterator[Finding]:
    """The modules that keep running statistics under other names than torch's."""
    parts = {name: name.rpartition(".")[2] for name in model.tensors}
    # In ONNX a tensor may have its own name, and that of its layer.
    known = {id(model.tensors[name]) for name, part in parts.items() if part in _STATISTICS}
    found: dict[str, list[str]] = {}
    for name, tensor in model.tensors.items():
        plain = name.removesuffix(_AVERAGE)
        start = max(plain.rfind("running_"), plain.rfind("moving_"), 0)
        layer, part = plain[:start], plain[start:]
        if layer[-1:] in "._/" and _FOREIGN.fullmatch(part):
            if id(tensor) not in known:
                found.setdefault(layer, []).append(part)
        elif name.endswith("mean") and _of_another_framework(f"{model.key}.{name}"):
            stem = name.removesuffix("mean")
            pair = [stem + end for end in ("var", "variance") if stem + end in model.tensors]
            layer = name[: max(name.rfind("."), name.rfind("/")) + 1]
            if pair:
                found[layer] = [one.removeprefix(layer) for one in (name, *pair)]
    for layer, names in found.items():
        yield finding(
            "layer-foreign",
            layer[:-1],
            f"it has {' and '.join(dict.fromkeys(names))}: not looked at.",
            "diff compares such tensors, and snapshot --all takes them.",
            key=model.key,
        )


def _of_another_framework(name: str) -> bool:
    """Whether Paddle, Chainer or Flax may call a running mean so. It is one beside a variance."""
    *above, last = re.split("[./]", name)
    return last in ("_mean", "avg_mean") or (last == "mean" and "batch_stats" in above)


def _bare(modules: Mapping[str, Mapping[str, StoredTensor]]) -> str:
    """What looks like norm layers without statistics, as the end of a sentence."""
    names = [f"{name}.{part}" for name, own in modules.items() for part in own]
    folded = [name.lstrip(".")[:-2] for name in names if name.endswith("_bn_s")]
    if folded:
        return (
            f". {counted(len(folded), 'batch norm')} ({listed(folded, 2)}) of Caffe2: a scale "
            f"(_s) and a bias (_b), and the statistics are folded into them."
        )
    bare = [
        name or "the model"
        for name, own in modules.items()
        if own.keys() == {"weight", "bias"} and len(own["weight"].shape) == 1
    ]
    if not bare:
        return ": there is no batch norm of torch's."
    shown = ", ".join(bare[:2]) + (f", … {bare[-1]}" if len(bare) > 2 else "")
    return (
        f". {counted(len(bare), 'module')} ({shown}) {'has' if len(bare) == 1 else 'have'} the "
        f"weight and bias of a norm layer alone: LayerNorm and GroupNorm do; of a batch norm, the "
        f"statistics were lost."
    )


def _mismatch(own: Mapping[str, StoredTensor]) -> str:
    """Why these tensors are not those of a norm layer; empty where they are."""
    missing = [part for part in _STATISTICS[:2] if part not in own]
    if missing:
        return f"it has {' and '.join(own)}, and no {' and '.join(missing)}."
    shapes = {part: tensor.shape for part, tensor in own.items() if part != _STATISTICS[2]}
    if len(own[_STATISTICS[0]].shape) != 1:
        return f"running_mean has {len(own[_STATISTICS[0]].shape)} dimensions, and not one."
    if len(set(shapes.values())) > 1:
        each = ", ".join(f"{part} {shown(s)}" for part, s in shapes.items())
        return f"its tensors differ in shape: {each}."
    count = own.get(_STATISTICS[2])
    if count is not None and count.numel != 1:
        return f"num_batches_tracked has {count.numel} elements, and not one."
    return ""


def _layer(
    name: str, own: Mapping[str, StoredTensor], model: StateDict
) -> tuple[StoredLayer, list[Finding]]:
    mean, var, weight = (real_values(own.get(p)) for p in (*_STATISTICS[:2], "weight"))
    batches = batches_in(own.get(_STATISTICS[2]))
    settings = model.layers.get(name) or LayerSettings("")
    guessed = BATCH_NORM if _STATISTICS[2] in own else FROZEN_OR_OLD
    layer = StoredLayer(
        name=name,
        kind=settings.class_name.rpartition(".")[2] or guessed,
        num_features=own["running_mean"].numel,
        batches=batches,
        dtype=own["running_var"].dtype,
        affine="weight" in own and "bias" in own,
        mean=Spread.of(mean),
        var=Spread.of(var),
        near_dead=_near_dead(var, weight),
        weight=Spread.of(weight),
        key=model.key,
        eps=settings.eps,
        momentum=settings.momentum,
        training=settings.training,
        frozen_by=settings.frozen_by or None,
    )
    dtypes = (own["running_mean"].dtype, own["running_var"].dtype)
    affine = [own[part] for part in ("weight", "bias") if part in own]
    findings = [
        *statistics_findings(name, mean, var, batches, layer.eps, dtypes, affine, model.key)
    ]
    if settings.in_graph and settings.training:
        findings.append(finding("layer-exported-training", name, key=model.key))
    if mean is None or var is None:
        findings.append(finding("stats-unread", name, key=model.key))
    elif tiny := int(((var > 0) & (var < _HALF_UNDERFLOW)).sum()):
        text = (
            f"{tiny} of {len(var)} running variances are so small that half precision makes them "
            f"0: such a channel is multiplied by up to 1/sqrt(eps), 316 for an eps of 1e-5."
        )
        findings.append(finding("stats-var-tiny", name, text, key=model.key))
    return layer, findings


def _near_dead(var: NDArray[Any] | None, weight: NDArray[Any] | None) -> int:
    if var is None:
        return 0
    dead = var < _USUAL_EPS
    if weight is not None:
        dead |= abs(weight) < _DEAD_WEIGHT
    return int((dead & (var >= 0)).sum())


def _across(layers: list[StoredLayer], model: StateDict) -> Iterator[Finding]:
    """What only all layers together show."""
    for layer in layers:
        # Where the class is known, there is nothing to guess.
        if layer.kind == FROZEN_OR_OLD and layer.name not in model.layers:
            yield finding("stats-count-missing", layer.name, key=model.key)
    counts = Counter(layer.batches for layer in layers if layer.batches is not None)
    if len(counts) > 1:
        (usual, number), *rest = counts.most_common()
        odd = [layer for layer in layers if layer.batches not in (None, usual)]
        lowest, highest = min(count for count, _ in rest), max(count for count, _ in rest)
        seen = f"{lowest:,}" if lowest == highest else f"{lowest:,} to {highest:,}"
        yield finding(
            "stats-count-mixed",
            "",
            f"num_batches_tracked is {usual:,} in {number} layers, and {seen} in {len(odd)} "
            f"(first in {odd[0].name or 'the model'}).",
            key=model.key,
        )
