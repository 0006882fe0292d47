"""diff: what changed between two checkpoints, state_dicts or models, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.checkpoints import StoredTensor, open_checkpoint
from bnfreeze.errors import CheckpointError
from bnfreeze.findings import Finding, finding, worst_first
from bnfreeze.inspection.checkpoint import Unread
from bnfreeze.inspection.inspect import selected
from bnfreeze.inspection.origin import Found
from bnfreeze.verification.compare import Progress, compare
from bnfreeze.verification.diff_report import Diff, ModelPair, TensorChange
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.pairing import check_prefixes, common_prefix, mapped, paired
from bnfreeze.verification.stored import state_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Diff", "ModelPair", "TensorChange", "diff", "diff_found"]

_STATISTICS: Final = frozenset({"running_mean", "running_var", "num_batches_tracked"})
# If a tensor changed in several ways, the first of these is shown.
_ORDER: Final = ("removed", "added", "shape", "dtype", "unverified", "value")
# In units of the last place: d * x + (1 - d) * x comes as far from x, for d up to 0.9999.
_ROUNDING: Final = 4096


def diff(
    a: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    b: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    select: str | Iterable[str] | None = None,
    key: str | tuple[str | None, str | None] | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> Diff:
    """Compare two checkpoints, state_dicts or models, bit by bit.

    A model stands for its state_dict. Nothing in a file is run or imported. If the names of one
    begin with a prefix that those of the other lack, such as ``model.backbone.``, it is found.

    Args:
        a: the earlier one: the path of a checkpoint, a state_dict or a mapping that has one, or a
            model.
        b: the later one.
        select: a pattern of dotted module names, or several: only these are compared. A name of
            either side may match. None means all.
        key: if a checkpoint has several models, the one to take, such as ``"model_ema"``; a pair
            has one for `a` and one for `b`. None means all: those with the same key are compared.
        prefixes: how the names of `a` begin in `b`, such as ``{"": "model.backbone"}``. None means
            that it is found out.

    Returns:
        A `Diff`; it is true if both have the same names and every bit is the same.

    Raises:
        TypeError: one is none of these.
        PolicyError: a pattern is malformed or matches nothing, or no name has a prefix.
        CheckpointError: a checkpoint cannot be read, or several models or prefixes fit.
    """
    keys = key if isinstance(key, tuple) else (key, key)
    patterns = [select] if isinstance(select, str) else list(select or ())
    with ExitStack() as stack:
        first, second = (_found(one, k, stack) for one, k in zip((a, b), keys, strict=True))
        return diff_found(first, second, select=patterns, prefixes=prefixes)


def _found(what: object, key: str | None, stack: ExitStack) -> Found:
    if isinstance(what, str | os.PathLike):
        checkpoint = stack.enter_context(open_checkpoint(what))
        return Found(checkpoint.chosen(key), checkpoint)
    kind = "state_dict"
    if not isinstance(what, Mapping):
        from bnfreeze.norm_layers import check_model

        what, kind, key = check_model(what).state_dict(), "model", None
    from bnfreeze.inspection.in_memory import found_in

    return found_in(what, kind, key)


def diff_found(
    first: Found,
    second: Found,
    *,
    select: Sequence[str] = (),
    prefixes: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total: None,
) -> Diff:
    """Compare all that was found on two sides.

    Args:
        first: the earlier one.
        second: the later one.
        select: patterns of dotted module names; none means all.
        prefixes: as in `diff`.
        progress: is called with how many tensors of a model are done, and of how many.

    Raises:
        PolicyError: a pattern is malformed or matches nothing, or no name has a prefix.
        CheckpointError: a tensor cannot be read, or several models or prefixes fit.
    """
    sides = (first, second)
    names = [[name for part in side.parts.all for name in part.tensors] for side in sides]
    chosen = selected([part for side in sides for part in side.parts.all], select)
    wanted = {name for part in chosen for name in part.tensors}
    check_prefixes(prefixes or {}, *names)
    pairs: list[ModelPair] = []
    tensors: list[TensorChange] = []
    findings = [
        replace(one, message=f"{side.checkpoint.path}: {one.message}")
        for side in sides
        for one in side.code_findings()
    ]
    unread: list[Unread] = []
    matching = paired(first, second)
    for before, after in matching:
        old, new = (part.tensors if part else {} for part in (before, after))
        keys = [part.key if part else None for part in (before, after)]
        key = keys[0] if before else keys[1]
        used: Mapping[str, str] = {}
        if before and after:
            used = common_prefix(old, new) if prefixes is None else prefixes
        there = mapped(old, used)
        in_both = sum(name in new for name in there.values())
        pairs.append(ModelPair(keys[0], keys[1], tuple(used.items()), in_both))
        # Compared under the second's names.
        here = {name: name for name in new} | {other: name for name, other in there.items()}
        keep = {name for name in here if name in wanted or here[name] in wanted}
        states = (
            {there[name]: tensor for name, tensor in old.items() if there[name] in keep},
            {name: tensor for name, tensor in new.items() if name in keep},
        )
        try:
            changes = _changes(states, sides, progress)
        except CheckpointError as error:
            if len(matching) == 1:
                raise
            # The others are compared all the same.
            unread.append(Unread(key or "", type(error).__name__, str(error)))
            continue
        changes = [
            replace(one, name=min(here[one.name], one.name, key=len), key=key or "")
            for one in changes
        ]
        findings += (*_leaks(changes, key or ""), *_averages(changes, key or ""))
        tensors += changes
    return Diff(
        first.origin(first.parts.all),
        second.origin(second.parts.all),
        tuple(pairs),
        tuple(tensors),
        worst_first(findings),
        tuple(unread),
    )


def _changes(
    states: tuple[dict[str, StoredTensor], dict[str, StoredTensor]],
    sides: tuple[Found, Found],
    progress: Progress,
) -> list[TensorChange]:
    """What changed of each tensor of two models, in the order of the first.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    first, second = states
    facts = []
    for tensors, side in zip(states, sides, strict=True):
        try:
            facts.append(state_of(tensors))
        except CheckpointError as error:
            raise type(error)(f"{side.checkpoint.path or side.checkpoint.kind}: {error}") from None
    drifts: dict[str, Drift] = {}
    for drift in compare(*facts, progress=progress).drifts:
        known = drifts.setdefault(drift.name, drift)
        if _ORDER.index(drift.kind) < _ORDER.index(known.kind):
            drifts[drift.name] = drift
    names = [*first, *(name for name in second if name not in first)]
    return [
        _change(name, (first.get(name) or second[name]).numel, drifts.get(name)) for name in names
    ]


def _change(name: str, total: int, drift: Drift | None) -> TensorChange:
    last = name.rpartition(".")[2]
    role: Any = last if last in ("weight", "bias") else "other"
    role = "statistics" if last in _STATISTICS else role
    if drift is None:
        return TensorChange(name, role, "identical", total)
    kind: Any = "missing" if drift.kind == "removed" else drift.kind
    return TensorChange(
        name,
        role,
        kind,
        total,
        drift.changed or 0,
        drift.max_abs,
        drift.max_ulps,
        drift.cause_code,
        drift.cause,
    )


def _leaks(changes: Iterable[TensorChange], key: str) -> Iterator[Finding]:
    """Norm layers whose weight and bias did not change, and whose statistics did."""
    layers: dict[str, dict[str, TensorChange]] = {}
    for change in changes:
        layer, _, part = change.name.rpartition(".")
        layers.setdefault(layer, {})[part] = change
    for layer, parts in layers.items():
        affine = [parts[part].kind for part in ("weight", "bias") if part in parts]
        moved = any(
            parts[part].kind == "value" and not _is_rounding(parts[part])
            for part in ("running_mean", "running_var")
            if part in parts
        )
        if moved and affine and all(kind == "identical" for kind in affine):
            yield finding(
                "stats-not-frozen",
                layer,
                "weight and bias are bit-identical, and the running statistics moved.",
                key=key,
            )


def _is_rounding(change: TensorChange) -> bool:
    """Whether it moved as in an average of equal numbers: most elements stay, the others hardly."""
    few = 2 * change.changed <= change.total
    return 0 < (change.max_ulps or 0) <= (_ROUNDING if few else 4)


def _averages(changes: Iterable[TensorChange], key: str) -> Iterator[Finding]:
    """Whether tensors differ by so little as an average of equal numbers does."""
    moved = [change for change in changes if change.kind == "value"]
    rounded = [change for change in moved if _is_rounding(change)]
    if rounded:
        most = max(change.max_ulps or 0 for change in rounded)
        yield finding(
            "model-averaged",
            "",
            f"{len(rounded)} of {len(moved)} tensors that moved differ by rounding alone, at most "
            f"{most:,} units of the last place: they look like an average (EMA, SWA) of values "
            f"that did not change.",
            key=key,
        )
