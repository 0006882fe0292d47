"""`inspect`, for a live model, a state_dict or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, overload

from bnfreeze.checkpoints import StateDict, StoredTensor, open_checkpoint, telling
from bnfreeze.errors import PolicyError
from bnfreeze.inspection.checkpoint import CheckpointInspection
from bnfreeze.inspection.origin import Origin
from bnfreeze.inspection.result import Inspection
from bnfreeze.inspection.stored_layers import StoredLayer, stored_layers
from bnfreeze.patterns import Pattern, nearest

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from bnfreeze.inspection.live import ModelInspection

__all__ = ["SORTS", "inspect", "inspect_checkpoint", "selected"]

# What layers can be sorted by; the most unusual come first.
SORTS: Final[dict[str, Callable[[StoredLayer], Any]]] = {
    "name": lambda layer: layer.name,
    "features": lambda layer: -layer.num_features,
    "batches": lambda layer: -1 if layer.batches is None else layer.batches,
    "mean": lambda layer: -max(abs(layer.mean.low), abs(layer.mean.high)) if layer.mean else 0.0,
    "var": lambda layer: layer.var.low if layer.var else float("-inf"),
    "dead": lambda layer: -layer.near_dead / (layer.num_features or 1),
}

# Of a file's module names: a suggestion is looked for among the first.
_SUGGESTED_FROM: Final = 20_000


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
            a state_dict or a mapping that holds one, or the path of a checkpoint: a file of
            torch.save, safetensors, a ``*.index.json`` of shards, or a folder of
            torch.distributed.checkpoint.
        optimizer: for a live model, its optimizer or several. With it, a weight or bias that is in
            none of them is known not to train, and one with a leftover gradient is known to move.
        key: of several state_dicts in one checkpoint, the one meant, such as ``"model_ema"``.

    Returns:
        A `ModelInspection` or a `CheckpointInspection`; print it, or read ``.layers``,
        ``.findings`` and ``.ok``.

    Raises:
        TypeError: none of these.
        CheckpointError: the checkpoint was not read. `UnsafeCheckpointError`,
            `CorruptCheckpointError` or `UnsupportedFormatError` says why.
    """
    if isinstance(what, (str, os.PathLike)):
        _no_optimizer(optimizer)
        return inspect_checkpoint(what, key=key)
    if isinstance(what, Mapping):
        _no_optimizer(optimizer)
        from bnfreeze.inspection.in_memory import state_dict_in

        return _inspection_of(state_dict_in(what, key), "", "state_dict")
    if key is not None:
        raise TypeError("key: a live model has no keys; it is for checkpoints.")
    from bnfreeze.inspection.live import inspect_model

    return inspect_model(what, optimizer=optimizer)


def _no_optimizer(optimizer: object) -> None:
    if optimizer is not None:
        raise TypeError("optimizer: a checkpoint is not trained; it is for a live model.")


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    select: Sequence[str] = (),
    sort: str = "",
) -> CheckpointInspection:
    """Say what the norm layers of a checkpoint hold.

    Args:
        path: a file or folder.
        key: of several state_dicts, the one meant.
        select: patterns of layer names; none means all.
        sort: one of `SORTS`; empty for the file's order.

    Raises:
        CheckpointError: it was not read.
        PolicyError: a pattern that is malformed or matches no layer.
    """
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.state_dict(key)
        with telling(checkpoint.path):
            return _inspection_of(
                found, str(checkpoint.path), checkpoint.kind, select=select, sort=sort
            )


def _inspection_of(
    found: StateDict, path: str, kind: str, *, select: Sequence[str] = (), sort: str = ""
) -> CheckpointInspection:
    layers, findings = stored_layers(selected(found.tensors, select), found.key)
    if sort:
        layers = tuple(sorted(layers, key=SORTS[sort]))
    return CheckpointInspection(layers, findings, Origin.of(found, path, kind), sort)


def selected(tensors: Mapping[str, StoredTensor], select: Sequence[str]) -> dict[str, StoredTensor]:
    """The tensors of the modules that a pattern matches; all where there are no patterns.

    Raises:
        PolicyError: a pattern that is malformed or matches nothing; names the nearest.
    """
    if not select:
        return dict(tensors)
    modules = {name: name.rpartition(".")[0] for name in tensors}
    wanted: set[str] = set()
    for text in select:
        pattern = Pattern.parse(text)
        matching = {module for module in set(modules.values()) if pattern.matches(module)}
        if not matching:
            raise PolicyError(f"Pattern {text!r} matches nothing in it.{_hint(text, modules)}")
        wanted |= matching
    return {name: tensors[name] for name, module in modules.items() if module in wanted}


def _hint(text: str, modules: Mapping[str, str]) -> str:
    """What a pattern that matches no module may have meant; `modules` are those of the tensors."""
    if text in modules:
        return f" It is a tensor; patterns name modules: {modules[text]!r}."
    close = nearest(text, _with_parents(modules.values()))
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _with_parents(names: Iterable[str]) -> dict[str, None]:
    """The names and those above them, as many as a suggestion is worth."""
    found: dict[str, None] = {}
    for name in names:
        while name and name not in found and len(found) < _SUGGESTED_FROM:
            found[name] = None
            name = name.rpartition(".")[0]
    return found
