"""The state_dict in what was saved: inside wrappers, beside twins, under prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_DICTS, MAX_NAME_LENGTH, check_limit
from bnfreeze.checkpoints.pickles import Pairs
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.errors import UnsupportedFormatError

__all__ = ["StateDict", "find_state_dict"]

# Where trainers keep the model, most usual first; the exponential averages after the model itself.
_USUAL: Final = (
    "",
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "backbone",
    "teacher",
    "student",
    "generator",
    "G",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "ema",
    "params_ema",
    "averaged_model",
    "swa_model",
)
_OPTIMIZERS: Final = ("optim", "lr_sched", "scaler")
# Of a key that is shown: what is longer is told by its end.
_KEY_LENGTH: Final = 400
_HIDDEN_SEGMENT: Final = "_orig_mod"


@dataclass(frozen=True)
class StateDict:
    """A model's tensors by name.

    Attributes:
        tensors: by name, in order, without the prefixes.
        key: where it was found in the file, dotted; empty for the top.
        stripped: the prefixes taken from every name, and segments taken out of them.
        others: the keys of the other state_dicts in the file.
    """

    tensors: Mapping[str, StoredTensor]
    key: str = ""
    stripped: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def storage_bytes(self) -> int:
        """The bytes of the storages, each counted once however many names share it."""
        return sum(dict(tensor.storage() for tensor in self.tensors.values()).values())


def find_state_dict(root: Any, key: str | None = None) -> StateDict:
    """Find the state_dict in what was saved.

    Args:
        root: dicts and lists, with tensors in them.
        key: where to look: the dotted key, or its last part. None takes the most usual one.

    Raises:
        UnsupportedFormatError: none at all, or none under `key`; the message names those there are.
    """
    found = dict(_candidates(root))
    if not found:
        raise UnsupportedFormatError("It holds no tensors by name, and so no state_dict.")
    if key is None:
        chosen = min(found, key=lambda path: _rank(path, found[path]))
        twins = _statistics_in(found[chosen])
        others = [p for p in found if p != chosen and _statistics_in(found[p]) >= min(1, twins)]
    else:
        named = [p for p in found if p == key] or [p for p in found if p.split(".")[-1] == key]
        if not named:
            there = ", ".join(repr(path) for path in list(found)[:8] if path)
            raise UnsupportedFormatError(
                f"No state_dict under the key {key!r:.200}."
                + (f" There are: {there}." if there else " There is one alone: leave the key out.")
            )
        chosen, others = named[0], []
    tensors, stripped = _without_prefixes(found[chosen])
    usual = [path for path in others if path.split(".")[-1] in _USUAL]
    return StateDict(tensors, chosen, stripped, tuple(usual))


def _candidates(root: Any) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Every dict that has tensors by name, level by level, each object once."""
    count = 0
    level: list[tuple[str, Any]] = [("", root)]
    seen = {id(root)}
    while level:
        below: list[tuple[str, Any]] = []
        for path, holder in level:
            children = list(_children(holder))
            tensors = {}
            for name, child in children:
                if isinstance(child, StoredTensor):
                    if type(name) is str:
                        check_limit(len(name), MAX_NAME_LENGTH, "characters of a tensor's name")
                        tensors[name] = child
                elif (
                    isinstance(child, (Pairs, dict, list, tuple))
                    and id(child) not in seen
                    and not str(name).startswith(_OPTIMIZERS)
                ):
                    seen.add(id(child))
                    key = f"{name:.200}" if isinstance(name, str) else str(name)
                    below.append((f"{path}.{key}"[-_KEY_LENGTH:] if path else key, child))
            if tensors:
                count += 1
                check_limit(count, MAX_DICTS, "dicts of tensors")
                yield path, tensors
        level = below


def _children(holder: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(holder, Pairs):
        holder = holder.named()
    if isinstance(holder, dict):
        yield from holder.items()
    elif isinstance(holder, (list, tuple)):
        yield from enumerate(holder)


def _statistics_in(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(name.endswith("running_mean") for name in tensors)


def _rank(path: str, tensors: Mapping[str, StoredTensor]) -> tuple[Any, ...]:
    """Usual places first, then those with many norm layers, then those with many tensors."""
    place = path.split(".")[-1]
    # A counter or two at the top is no model.
    usual = place in _USUAL and (bool(place) or len(tensors) > 4 or _statistics_in(tensors) > 0)
    return (
        not _statistics_in(tensors),
        _USUAL.index(place) if usual else len(_USUAL),
        path.count("."),
        -_statistics_in(tensors),
        -len(tensors),
    )


def _without_prefixes(
    tensors: dict[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Take off what DistributedDataParallel, averaging and torch.compile put on the names."""
    stripped: list[str] = []
    for prefix in ("module.", f"{_HIDDEN_SEGMENT}.") * 3:
        # AveragedModel keeps its counter beside the model.
        models = [name for name in tensors if name != "n_averaged"]
        if models and all(name.startswith(prefix) for name in models):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            stripped.append(prefix)
    plain = [
        ".".join(part for part in name.split(".") if part != _HIDDEN_SEGMENT) for name in tensors
    ]
    if plain != list(tensors) and len(set(plain)) == len(plain):
        tensors = dict(zip(plain, tensors.values(), strict=True))
        stripped.append(f"{_HIDDEN_SEGMENT}.")
    return tensors, tuple(dict.fromkeys(stripped))
