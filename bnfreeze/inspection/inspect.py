"""`inspect`, for a live model, a state_dict or a checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, overload

from bnfreeze.checkpoints import StateDict, naming_file, open_checkpoint
from bnfreeze.checkpoints.limits import MAX_CHANNELS, check_limit
from bnfreeze.errors import CheckpointError, PolicyError
from bnfreeze.findings import Finding, worst_first
from bnfreeze.inspection.checkpoint import CheckpointInspection, Inspection, Unread
from bnfreeze.inspection.origin import Found
from bnfreeze.inspection.stored_layers import StoredLayer, stored_layers
from bnfreeze.patterns import Pattern, hint, with_parents

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from bnfreeze.inspection.live import ModelInspection

# What layers can be sorted by; the most unusual come first.
SORTS: Final[dict[str, Callable[[StoredLayer], Any]]] = {
    "name": lambda layer: _natural(layer.name),
    "features": lambda layer: -layer.num_features,
    "batches": lambda layer: -1 if layer.batches is None else layer.batches,
    "mean": lambda layer: -max(abs(layer.mean.low), abs(layer.mean.high)) if layer.mean else 0.0,
    "var": lambda layer: layer.var.low if layer.var else float("-inf"),
    "dead": lambda layer: -layer.near_dead,
}


def _natural(name: str) -> list[Any]:
    """A key that sorts `layer.2` before `layer.10`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


@overload
def inspect(
    what: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    key: None = None,
) -> ModelInspection: ...
@overload
def inspect(
    what: str | os.PathLike[str] | Mapping[str, Any],
    *,
    optimizer: None = None,
    key: str | None = None,
) -> CheckpointInspection: ...
@overload
def inspect(
    what: object,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    key: str | None = None,
) -> Inspection: ...
def inspect(
    what: object,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    key: str | None = None,
) -> Inspection:
    """Say what there is to know about the norm layers of a model or a checkpoint.

    Of a live model: what each will really do in the next training step. The step is taken to begin
    with ``model.train()``, as nearly every loop's does. A model that overrides ``train`` is asked
    by calling it, and every flag that the call changes is put back. Nothing else is run, and
    nothing is changed.

    Of a checkpoint: what its tensors hold. Nothing in the file is run or imported.

    Args:
        what: an `nn.Module` (wrappers such as DistributedDataParallel and torch.compile's too),
            a state_dict or a mapping that holds some, or the path of a checkpoint: a file of
            torch.save, torch.jit.save or torch.export.save, safetensors, a ``*.index.json`` of
            shards, pickled or zipped NumPy arrays, ONNX, or a folder of
            torch.distributed.checkpoint or Hugging Face.
        optimizer: for a live model, its optimizer or several. With it, a weight or bias that is in
            none of them is known not to train, and one with a leftover gradient is known to move.
        key: of several models in one checkpoint, the one meant, such as ``"model_ema"``; None
            for all of them.

    Returns:
        A `ModelInspection` or a `CheckpointInspection`; print it, or read ``.layers``,
        ``.findings`` and ``.ok``.

    Raises:
        TypeError: none of these.
        CheckpointError: the checkpoint was not read. `UnsafeCheckpointError`,
            `CorruptCheckpointError` or `UnsupportedFormatError` says why.
    """
    if optimizer is not None and isinstance(what, (str, os.PathLike, Mapping)):
        raise TypeError("optimizer: a checkpoint is not trained; it is for a live model.")
    if isinstance(what, (str, os.PathLike)):
        return inspect_checkpoint(what, key=key)
    if isinstance(what, Mapping):
        from bnfreeze.inspection.in_memory import found_in

        return _inspection_of(found_in(what, key=key))
    if key is not None:
        raise TypeError("key: a live model has no keys; it is for checkpoints.")
    from bnfreeze.inspection.behaviour import optimizers_by_id
    from bnfreeze.inspection.live import inspect_model

    return inspect_model(what, optimizers_by_id(optimizer))


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    select: Sequence[str] = (),
    sort: str = "",
    weights: bool = False,
) -> CheckpointInspection:
    """Say what the norm layers of a checkpoint hold.

    Args:
        path: a file or folder.
        key: of several models, the one meant; None for all of them.
        select: patterns of layer names; none means all.
        sort: one of `SORTS`; empty for the file's order.
        weights: whether the table has the range of the weights.

    Raises:
        CheckpointError: it was not read.
        PolicyError: a pattern that is malformed or matches no layer.
    """
    with open_checkpoint(path) as checkpoint:
        found = Found(checkpoint.chosen(key), checkpoint)
        with naming_file(checkpoint.path):
            return replace(_inspection_of(found, select=select, sort=sort), weights=weights)


def _inspection_of(
    found: Found, *, select: Sequence[str] = (), sort: str = ""
) -> CheckpointInspection:
    models = selected(found.parts.models, select)
    channels = 0
    for name, tensor in (item for model in models for item in model.tensors.items()):
        layer, _, part = name.rpartition(".")
        if part == "running_mean" and len(tensor.shape) == 1:
            channels += tensor.numel
            check_limit(channels, MAX_CHANNELS, f"channels up to {layer!r:.200}")
    layers: list[StoredLayer] = []
    findings: list[Finding] = [*found.code_findings()]
    unread: list[Unread] = []
    for model in models:
        try:
            own, own_findings = stored_layers(model)
        except CheckpointError as error:
            if len(models) == 1:
                raise
            # The others are shown all the same.
            unread.append(Unread(model.key, type(error).__name__, str(error)))
            continue
        layers += sorted(own, key=SORTS[sort]) if sort else own
        findings += own_findings
    return CheckpointInspection(
        tuple(layers), worst_first(findings), found.origin(models), sort, tuple(unread)
    )


def selected(parts: Sequence[StateDict], select: Sequence[str]) -> tuple[StateDict, ...]:
    """The tensors of the modules that a pattern matches, in each state_dict.

    Patterns match names within a state_dict. Where there are no patterns, all is selected.

    Raises:
        PolicyError: a pattern that is malformed or matches nothing; names the nearest.
    """
    if not select:
        return tuple(parts)
    modules = {name: name.rpartition(".")[0] for part in parts for name in part.tensors}
    wanted: set[str] = set()
    for text in select:
        pattern = Pattern.parse(text)
        matching = {module for module in set(modules.values()) if pattern.matches(module)}
        if not matching:
            near = hint(text, with_parents(modules.values()))
            if text in modules:
                near = f" It is a tensor; patterns name modules: {modules[text]!r}."
            raise PolicyError(f"Pattern {text!r} matches nothing in it.{near}")
        wanted |= matching
    chosen = (
        replace(part, tensors={n: t for n, t in part.tensors.items() if modules[n] in wanted})
        for part in parts
    )
    return tuple(part for part in chosen if part.tensors)
