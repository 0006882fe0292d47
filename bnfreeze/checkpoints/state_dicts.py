"""The models in what was saved: inside wrappers, beside others, under prefixes."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from bnfreeze.checkpoints.limits import MAX_DICTS, MAX_NAME_LENGTH, check_limit, is_size
from bnfreeze.checkpoints.modules import LayerSettings, Model, is_module, model_of
from bnfreeze.checkpoints.pickled import (
    HOLDERS,
    Opaque,
    children_of,
    joined_key,
    key_text,
    tensor_in,
)
from bnfreeze.checkpoints.stored_tensor import StoredTensor
from bnfreeze.errors import CorruptCheckpointError, UnsupportedFormatError

# Below these, tensors are no model's, unless there are norm layers.
_OPTIMIZERS: Final = ("optim", "lr_sched", "scaler")
_HIDDEN_SEGMENT: Final = "_orig_mod"
# torch's names, and those of TensorFlow, MXNet and many an own batch norm.
_STATISTICS: Final = (
    *("running_mean", "running_var", "running_sd"),
    *("moving_mean", "moving_var", "moving_variance"),
)


@dataclass(frozen=True)
class StateDict:
    """A model's tensors by name.

    Attributes:
        key: where it was found in the file, dotted; empty for the top.
        tensors: by name, in order, without the prefixes.
        layers: of a model that was saved whole, the settings of its norm layers, by name.
        stripped: the prefixes taken from every name, and segments taken out of them.
    """

    key: str
    tensors: Mapping[str, StoredTensor]
    layers: Mapping[str, LayerSettings] = field(default_factory=dict)
    stripped: tuple[str, ...] = ()

    @property
    def has_norm_layers(self) -> bool:
        """Whether there are running statistics among its tensors."""
        return any(name.endswith(_STATISTICS) for name in self.tensors)

    @property
    def is_counter(self) -> bool:
        """Whether these are counters, losses or random states that stand beside a model."""
        return not self.has_norm_layers and all(
            tensor.numel <= 1 or (tensor.dtype == "uint8" and len(tensor.shape) == 1)
            for tensor in self.tensors.values()
        )


@dataclass(frozen=True)
class StateDicts:
    """The state_dicts of a file, in its order.

    Attributes:
        all: every one, with norm layers or without.
        aliases: other keys under which one of them is there too; the value is its key in `all`.
    """

    all: tuple[StateDict, ...]
    aliases: Mapping[str, str]

    @property
    def models(self) -> tuple[StateDict, ...]:
        """Those that have norm layers; all of them where none has."""
        return tuple(found for found in self.all if found.has_norm_layers) or self.all

    def chosen(self, key: str | None) -> StateDicts:
        """The one under a key alone; all of them where there is no key.

        A key is the dotted key, or the last part of it where that is clear.

        Raises:
            UnsupportedFormatError: none, or several; the message names those there are.
        """
        if key is None:
            return self
        keys = {found.key: found for found in self.all}
        keys |= {alias: replace(keys[there], key=alias) for alias, there in self.aliases.items()}
        named = [path for path in keys if path == key]
        named = named or [path for path in keys if path.split(".")[-1] == key]
        if len(named) == 1:
            return StateDicts((keys[named[0]],), {})
        shown = ", ".join(repr(path) for path in list(named or keys)[:8] if path)
        if named:
            raise UnsupportedFormatError(f"Several are named {key!r:.200}: {shown}.")
        raise UnsupportedFormatError(
            f"No state_dict under the key {key!r:.200}."
            + (f" There are: {shown}." if shown else " There is only one: leave the key out.")
        )


def tensors_by_name(parts: Iterable[StateDict], plain: str | None) -> dict[str, StoredTensor]:
    """The tensors of several state_dicts together, each with its key before the name.

    Args:
        parts: the state_dicts.
        plain: the key of the one whose names stay as they are; None for none.

    Raises:
        CorruptCheckpointError: two tensors would have the same name.
    """
    found: dict[str, StoredTensor] = {}
    for part in parts:
        prefix = f"{part.key}." if part.key and part.key != plain else ""
        for name, tensor in part.tensors.items():
            if prefix + name in found:
                raise CorruptCheckpointError(
                    f"Ambiguous: {prefix + name!r:.200} is in two of its state_dicts. Choose one "
                    f"with the key."
                )
            found[prefix + name] = tensor
    return found


def find_state_dicts(root: Any) -> StateDicts:
    """Find all state_dicts and whole models in what was saved.

    Args:
        root: dicts, lists and placeholders, with tensors in them.

    Raises:
        UnsupportedFormatError: there are no tensors by name.
    """
    aliases: dict[str, str] = {}
    found = list(_candidates(root, aliases))
    if len(found) > 1:
        found = [one for one in found if not one.is_counter] or found
    if not found:
        raise UnsupportedFormatError("It holds no tensors by name, and so no state_dict.")
    keys = {one.key for one in found}
    return StateDicts(tuple(found), {key: at for key, at in aliases.items() if at in keys})


def _candidates(root: Any, aliases: dict[str, str]) -> Iterator[StateDict]:
    """Every dict that has tensors by name and every whole model, level by level, each once."""
    waiting: deque[tuple[str, Any, bool]] = deque([("", root, False)])
    # The key under which each object was met first.
    seen = {id(root): ""}
    yielded: set[str] = set()
    alike: Counter[str] = Counter()
    looked = 0
    while waiting:
        key, holder, in_optimizer = waiting.popleft()
        model = holder if isinstance(holder, Model) else None
        if is_module(holder):
            model = model_of(holder, looked)
            looked = model.looked
        parts = [_state_dict(key, model.tensors, model.layers)] if model else []
        if not model or isinstance(holder, Opaque):
            # The class of a model may be one of dicts as well.
            parts.append(_state_dict(key, _tensors_of(holder), {}))
        for found in parts:
            if found is None or (in_optimizer and not found.has_norm_layers):
                continue
            # 0 and "0" are two keys, and look alike; as long keys do, which are cut.
            unique = found.key
            while unique in yielded:
                alike[found.key] += 1
                unique = f"{found.key}'{alike[found.key]}"
            yielded.add(unique)
            check_limit(len(yielded), MAX_DICTS, "dicts of tensors")
            yield replace(found, key=unique)
        if model:
            seen |= {module: key for module in model.visited if module not in seen}
        children = list(model.besides if model else children_of(holder))
        # What torch.optim.Optimizer.state_dict() returns, under any name.
        in_optimizer |= bool(key) and {"state", "param_groups"} <= {part for part, _ in children}
        for part, child in children:
            # Python has one empty tuple for all, which would be the same in many places.
            if not isinstance(child, HOLDERS) or not child:
                continue
            name = key_text(part)
            path = joined_key(key, name)
            if id(child) not in seen:
                seen[id(child)] = path
                waiting.append((path, child, in_optimizer or name.startswith(_OPTIMIZERS)))
            elif seen[id(child)] != path and len(aliases) < MAX_DICTS:
                aliases[path] = seen[id(child)]


def _state_dict(
    key: str, tensors: dict[str, StoredTensor], layers: dict[str, LayerSettings]
) -> StateDict | None:
    """The tensors by their plain names; None where there are none."""
    if not tensors:
        return None
    names, stripped = _plain_names(list(tensors))
    plain = dict(zip(tensors, names, strict=True))
    parts = {name.rpartition(".")[0]: name for name in tensors}
    renamed = {
        plain[parts[layer]].rpartition(".")[0]: settings
        for layer, settings in layers.items()
        if layer in parts
    }
    return StateDict(key, dict(zip(names, tensors.values(), strict=True)), renamed, stripped)


def _tensors_of(holder: Any) -> dict[str, StoredTensor]:
    """The tensors in a dict by name; in lists, and where keys are numbers, the number is the name.

    Raises:
        UnsafeCheckpointError: a name is too long.
    """
    named: dict[str, StoredTensor] = {}
    numbered: dict[str, StoredTensor] = {}
    for key, value in holder.pairs if isinstance(holder, Opaque) else children_of(holder):
        tensor = tensor_in(value)
        if type(key) is str:
            # The last of a name counts, as in Python.
            named.pop(key, None)
            if tensor is not None:
                check_limit(len(key), MAX_NAME_LENGTH, "characters of a tensor's name")
                named[key] = tensor
        elif tensor is not None and is_size(key):
            numbered[str(key)] = tensor
    return {f"{key}'" if key in named else key: value for key, value in numbered.items()} | named


def _plain_names(names: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Take off what DistributedDataParallel, averaging and torch.compile put on the names.

    Returns:
        the names without it, in the same order, and what was taken off.
    """
    stripped: list[str] = []
    for prefix in ("module.", f"{_HIDDEN_SEGMENT}.") * 3:
        # AveragedModel keeps its counter beside the model.
        models = [name for name in names if name != "n_averaged"]
        plain = [name.removeprefix(prefix) for name in names]
        together = all(name.startswith(prefix) for name in models)
        if models and together and len(set(plain)) == len(names):
            names = plain
            stripped.append(prefix)
    plain = [
        ".".join(part for part in name.split(".") if part != _HIDDEN_SEGMENT) for name in names
    ]
    if plain != names and len(set(plain)) == len(plain):
        names = plain
        stripped.append(f"{_HIDDEN_SEGMENT}.")
    return names, tuple(dict.fromkeys(stripped))
