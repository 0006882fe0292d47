"""diff: what changed between two checkpoints, state_dicts or models, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.checkpoints import StoredTensor, naming_file, open_checkpoint
from bnfreeze.errors import CheckpointError
from bnfreeze.findings import Finding, finding, worst_first
from bnfreeze.inspection.checkpoint import Unread
from bnfreeze.inspection.inspect import selected
from bnfreeze.inspection.origin import Found
from bnfreeze.text import counted
from bnfreeze.verification.compare import Progress, compare
from bnfreeze.verification.diff_report import Diff, ModelPair, TensorChange
from bnfreeze.verification.drift import Drift
from bnfreeze.verification.pairing import checked_prefixes, common_prefix, mapped, paired
from bnfreeze.verification.stored import layer_of, state_of

if TYPE_CHECKING:
    from torch import nn

# The role of a tensor by the last part of its name; of all others it is "other".
_ROLES: Final = {"weight": "weight", "bias": "bias"} | dict.fromkeys(
    ("running_mean", "running_var", "num_batches_tracked"), "statistics"
)
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
    progress: Progress = lambda done, total: None,
) -> Diff:
    """Compare two checkpoints, state_dicts or models, bit by bit.

    A model stands for its state_dict and the eps of its norm layers. Nothing in a file is run or
    imported. If the names of one begin with a prefix that those of the other lack, such as
    ``model.backbone.``, it is found.

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
        progress: is called with how many tensors of a model are done, and of how many.

    Returns:
        A `Diff`; it is true if both have the same names, every bit is the same, and no eps differs.

    Raises:
        TypeError: one is none of these.
        PolicyError: a pattern is malformed or matches nothing, or no name has a prefix.
        CheckpointError: a checkpoint cannot be read, or several models or prefixes fit.
    """
    keys = key if isinstance(key, tuple) else (key, key)
    patterns = [select] if isinstance(select, str) else list(select or ())
    with ExitStack() as stack:
        sides = [_found(one, k, stack) for one, k in zip((a, b), keys, strict=True)]
        chosen = selected([part for side in sides for part in side.parts.all], patterns)
        wanted = {name for part in chosen for name in part.tensors}
        if prefixes is not None:
            names = ([name for part in side.parts.all for name in part.tensors] for side in sides)
            prefixes = checked_prefixes(prefixes, *names)
        pairs: list[ModelPair] = []
        tensors: list[TensorChange] = []
        findings = [
            replace(one, message=f"{side.checkpoint.path}: {one.message}")
            for side in sides
            for one in side.code_findings()
        ]
        unread: list[Unread] = []
        matching = paired(*sides)
        for before, after in matching:
            old, new = (part.tensors if part else {} for part in (before, after))
            used: Mapping[str, str] = {}
            if before and after:
                used = common_prefix(old, new) if prefixes is None else prefixes
            # Compared under the second's names.
            there = mapped(old, used)
            here = {name: name for name in new} | {other: name for name, other in there.items()}
            first, second = (part.key if part else None for part in (before, after))
            in_both = sum(name in new for name in there.values())
            pairs.append(ModelPair(first, second, tuple(used.items()), in_both))
            model = (second or "") if first is None else first
            states = [
                {name: t for name, t in one.items() if wanted & {name, here[name]}}
                for one in ({there[name]: tensor for name, tensor in old.items()}, new)
            ]
            try:
                changes, others = _changes(states, sides, here, model, progress)
            except CheckpointError as error:
                if len(matching) == 1:
                    raise
                # The others are compared all the same.
                unread.append(Unread(model, type(error).__name__, str(error)))
                continue
            findings += (*others, *_meaning(states, changes, model))
            tensors += changes
        left, right = (side.origin(side.parts.all) for side in sides)
        return Diff(left, right, tuple(pairs), tuple(tensors), worst_first(findings), tuple(unread))


def _found(what: object, key: str | None, stack: ExitStack) -> Found:
    if isinstance(what, str | os.PathLike):
        checkpoint = stack.enter_context(open_checkpoint(what))
        return Found(checkpoint.chosen(key), checkpoint)
    from bnfreeze.inspection.in_memory import found_in, found_in_model

    return found_in(what, key) if isinstance(what, Mapping) else found_in_model(what)


def _changes(
    states: Sequence[dict[str, StoredTensor]],
    sides: Sequence[Found],
    here: Mapping[str, str],
    key: str,
    progress: Progress,
) -> tuple[list[TensorChange], list[Finding]]:
    """What changed of each tensor of two models, in the first's order, and which layers' eps did.

    Args:
        states: their tensors, under the second's names.
        sides: where they were found.
        here: by each of these names, the first's name.
        key: of the model.
        progress: as in `diff`.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    facts = []
    for tensors, side in zip(states, sides, strict=True):
        with naming_file(side.checkpoint.path or side.checkpoint.kind):
            facts.append(state_of(tensors, side.parts.all))
    drifts: dict[str, Drift] = {}
    found = compare(*facts, progress=progress).drifts
    for drift in sorted(found, key=lambda drift: _ORDER.index(drift.kind)):
        drifts.setdefault(drift.name, drift)
    old, new = states
    changes = []
    for name, tensor in (old | new | old).items():  # the first's order, and its values
        kind: Any = drifts[name].kind if name in drifts else "identical"
        role: Any = _ROLES.get(name.rpartition(".")[2], "other")
        drift = drifts.get(name, Drift(name, "value"))
        changes.append(
            TensorChange(
                min(here[name], name, key=len),
                role,
                "missing" if kind == "removed" else kind,
                tensor.numel,
                drift.changed or 0,
                drift.max_abs,
                drift.max_ulps,
                drift.cause_code,
                drift.cause,
                key,
            )
        )
    layers = {layer_of(name): layer_of(min(here[name], name, key=len)) for name in old | new}
    others = [
        finding(
            "layer-eps-differs",
            layers[layer_of(drift.name)],
            f"eps is {drift.before:g} in the first and {drift.after:g} in the second.",
            key=key,
        )
        for drift in found
        if drift.cause_code == "eps"
    ]
    return changes, others


def _meaning(
    states: Sequence[dict[str, StoredTensor]], changes: Sequence[TensorChange], key: str
) -> Iterator[Finding]:
    """What the changes of a model together mean."""
    old, new = states
    pairs = [(one, new[n]) for n, one in old.items() if n in new and one.has_values and one.numel]
    if same := sum(one.address is not None and one.address == two.address for one, two in pairs):
        yield finding(
            "model-same-memory",
            "",
            f"{same} of {len(pairs)} tensors are the same memory on both sides and cannot differ.",
            level="error" if same == len(pairs) else "warning",
            key=key,
        )
    layers: dict[str, dict[str, TensorChange]] = {}
    for change in changes:
        layer, _, part = change.name.rpartition(".")
        layers.setdefault(layer, {})[part] = change
    for layer, parts in layers.items():
        affine = {parts[part].kind for part in ("weight", "bias") if part in parts}
        statistics = [parts[part] for part in ("running_mean", "running_var") if part in parts]
        moved = any(one.kind == "value" and not _is_rounding(one) for one in statistics)
        if moved and affine == {"identical"}:
            text = (
                "weight and bias are bit-identical, and the running statistics moved. (If you "
                "recalibrated them, that is as it should be.)"
            )
            yield finding("stats-not-frozen", layer, text, key=key)
    moving = [change for change in changes if change.kind == "value"]
    rounded = [change.max_ulps or 0 for change in moving if _is_rounding(change)]
    # A bias before batch norm has no gradient but rounding, so that it alone says nothing.
    if any(change.role != "bias" and _is_rounding(change) for change in moving):
        yield finding(
            "model-averaged",
            "",
            f"{len(rounded)} of {len(moving)} tensors that moved differ by rounding alone, at most "
            f"{counted(max(rounded), 'unit')} of the last place: they look like an average (EMA, "
            f"SWA) of values that did not change, or like weight decay at a small learning rate.",
            key=key,
        )


def _is_rounding(change: TensorChange) -> bool:
    """Whether it moved as in an average of equal numbers: most elements stay, the others hardly."""
    few = 2 * change.changed <= change.total
    return 0 < (change.max_ulps or 0) <= (_ROUNDING if few else 4)
