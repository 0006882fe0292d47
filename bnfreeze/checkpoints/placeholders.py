"""What of a file was not interpreted, and what loading it would call."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from bnfreeze.checkpoints.code_names import VALUES, level_of
from bnfreeze.checkpoints.modules import is_module
from bnfreeze.checkpoints.pickled import (
    HOLDERS,
    Content,
    Global,
    Opaque,
    children_of,
    joined_key,
    key_text,
)
from bnfreeze.findings import Level

__all__ = ["CodeCall", "Uninterpreted", "placeholders_in"]

# Of each kind so many are listed; more of them say nothing more.
_ENOUGH: Final = 100
_SCRIPT: Final = "__torch__."


@dataclass(frozen=True)
class CodeCall:
    """Something that loading the file with `torch.load(weights_only=False)` would call.

    Attributes:
        name: the qualified name, such as ``"posix.system"``; of the result of another call, that
            call's name and ``"(…)"``.
        where: under which key it was first found; empty for the top, or where no key leads to it.
        level: ``"error"`` for what is known or made at run time, ``"warning"`` for a package of
            which nothing is known, ``"note"`` for the class of a module.
    """

    name: str
    where: str
    level: Level


@dataclass(frozen=True)
class Uninterpreted:
    """An object that was left as a placeholder.

    Attributes:
        name: the qualified name of its class.
        where: under which key it was first found; empty for the top.
    """

    name: str
    where: str


def placeholders_in(content: Content) -> tuple[tuple[Uninterpreted, ...], tuple[CodeCall, ...]]:
    """What was not interpreted and what would be called, each name once, the worst calls first."""
    places, uninterpreted = _walk(content.root)
    calls: dict[str, CodeCall] = {}
    for made in content.made:
        is_model = not made.arguments and is_module(made)
        level = level_of(made.name, at_run_time=made.at_run_time, is_module=is_model)
        before = calls.get(made.name)
        if level and (before is None or _SEVERITY[level] < _SEVERITY[before.level]):
            calls[made.name] = CodeCall(made.name, places.get(id(made), ""), level)
    ordered = sorted(calls.values(), key=lambda call: _SEVERITY[call.level])
    return uninterpreted, tuple(ordered[:_ENOUGH])


_SEVERITY: Final = {"error": 0, "warning": 1, "note": 2}


def _walk(root: Any) -> tuple[dict[int, str], tuple[Uninterpreted, ...]]:
    """The key of each placeholder, and those that were not interpreted; each object once."""
    places: dict[int, str] = {}
    found: dict[str, Uninterpreted] = {}
    seen = {id(root)}
    waiting: deque[tuple[str, Any, bool]] = deque([("", root, False)])
    while waiting:
        place, value, is_inside = waiting.popleft()
        if isinstance(value, (Opaque, Global)):
            places[id(value)] = place
            # What is in an object that is left out is left out with it.
            if not is_inside and not _is_interpreted(value):
                is_inside = True
                if len(found) < _ENOUGH:
                    found.setdefault(value.name, Uninterpreted(value.name, place))
        for key, child in children_of(value):
            if isinstance(child, _LOOKED_INTO) and id(child) not in seen:
                seen.add(id(child))
                name = key_text(key)
                inside = place if name in _PARTS else joined_key(place, name)
                waiting.append((inside, child, is_inside))
    return places, tuple(found.values())


def _is_interpreted(value: Opaque | Global) -> bool:
    return value.name in VALUES or is_module(value) or value.name.startswith(_SCRIPT)


_LOOKED_INTO: Final = (Global, *HOLDERS)
# The parts of a module, which are no keys of their own.
_PARTS: Final = frozenset({"", "_modules", "_parameters", "_buffers"})
