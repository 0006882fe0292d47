"""Norm layers that a model keeps outside of PyTorch's registry, in plain attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from torch import nn

from bnfreeze.norm_layers import NamedModule, is_norm

# Attributes of every module, torch's registries among them; and where a module of a traced one
# keeps its compiled form.
_TORCHS_OWN = frozenset({*vars(nn.Module()), "_actual_script_module"})
_MOST_ITEMS = 1000
_DEEPEST = 4


def unregistered(modules: Sequence[NamedModule]) -> dict[str, list[nn.Module]]:
    """Find norm layers in lists, tuples, sets and dicts, or set past ``nn.Module.__setattr__``.

    A container is searched to a depth of 4, and 1000 items of each. Other objects that refer to
    modules are not searched.

    Args:
        modules: all that the model has registered.

    Returns:
        For each module that is not registered, by its path from the model (such as
        ``"backbone.norms[0]"``), the norm layers in it.
    """
    known = {id(entry.module) for entry in modules}
    waiting = [(entry.plain_names[0], entry.module) for entry in modules]
    found: dict[str, list[nn.Module]] = {}
    for name, module in waiting:  # it grows meanwhile
        for key, value in vars(module).items():
            if key in _TORCHS_OWN:
                continue
            for path, inner in _modules_in(value, f"{name}.{key}" if name else key, 0):
                if id(inner) in known:
                    continue
                new = [(n, m) for n, m in inner.named_modules() if id(m) not in known]
                known |= {id(m) for _, m in new}
                waiting += [(f"{path}.{n}" if n else path, m) for n, m in new]
                if layers := [m for _, m in new if is_norm(m)]:
                    found[path] = layers
    return found


def _modules_in(value: object, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth < _DEEPEST and isinstance(value, (Mapping, list, tuple, set, frozenset)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in islice(items, _MOST_ITEMS):
            yield from _modules_in(item, f"{path}[{key!r}]", depth + 1)
