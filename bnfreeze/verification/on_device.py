"""Live tensors compared on the device where they are, with one answer for all of them.

And a quick look at a whole model, which shows that nothing has changed since a comparison that
found nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.nn.eager import PLAIN
from bnfreeze.norm_layers import eps_of, is_lookalike, is_norm, named_modules
from bnfreeze.policies.record import record_of
from bnfreeze.verification.state import State

Pair = tuple[Tensor, Tensor]

# On the CPU the C library compares memory several times as fast as torch.equal does.
_memcmp = (ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("msvcrt")).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int
# Tensors up to this many bytes are compared together on an accelerator, where each launch costs.
_SMALL = 1 << 20


class SameBits:
    """Whether two and two tensors have the same bits; can be asked again after writes to them.

    An accelerator gives one answer for all its pairs, so that it is waited for once.
    """

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        """Take plain contiguous tensors, two and two of the same dtype and shape, by name."""
        self._kept = dict(pairs)  # the memory behind the addresses
        self._here: list[tuple[int, int, int]] = []
        small: dict[torch.device, list[Pair]] = {}
        self._there: dict[torch.device, list[tuple[Tensor, list[Tensor]]]] = {}
        for old, new in pairs.values():
            if _on_cpu(new) and _on_cpu(old):
                self._here.append((old.data_ptr(), new.data_ptr(), new.nbytes))
                continue
            before, after = (t.reshape(-1).view(torch.uint8) for t in (old.to(new.device), new))
            if new.nbytes <= _SMALL:
                small.setdefault(new.device, []).append((before, after))
            else:
                self._there.setdefault(new.device, []).append((before, [after]))
        for device, group in small.items():
            olds, news = zip(*group, strict=True)
            self._there.setdefault(device, []).append((torch.cat(olds), list(news)))

    def __bool__(self) -> bool:
        return not any(size and _memcmp(old, new, size) for old, new, size in self._here) and all(
            not torch.stack([_differs(*job) for job in jobs]).any() for jobs in self._there.values()
        )


def unequal_tensors(pairs: Mapping[str, Pair]) -> set[str]:
    """The names of the pairs whose bits differ; the pairs are as for `SameBits`."""
    if SameBits(pairs):
        return set()
    return {name for name, pair in pairs.items() if not SameBits({name: pair})}


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _differs(before: Tensor, after: list[Tensor]) -> Tensor:
    return torch.ne(before, after[0] if len(after) == 1 else torch.cat(after)).any()


class Unchanged:
    """A model as it is; true as long as it is so.

    The full comparison reads every fact of every tensor, which takes about as long as a short
    training step on a GPU. Most steps change nothing. This asks only whether all that the facts
    were read from is still the same: the modules, their modes, the objects in them, and the bits.
    If it is not sure, it is false, and the full comparison decides.
    """

    def __init__(self, model: nn.Module, before: State, after: State) -> None:
        """Remember `model`, whose state is `after` and equals `before`, which is a copy."""
        kept: Mapping[str, Any] = before.values
        live: Mapping[str, Any] = {name: after.value(name) for name in kept}
        # A tensor subclass may do anything, and a copy in another layout is no look at the tensor.
        self._sure = all(
            type(tensor := after.identities[name].tensor) in PLAIN
            and tensor.data_ptr() == value.tensor.data_ptr()
            for name, value in live.items()
        )
        if not self._sure:
            return
        self._model, self._optimizers = model, before.live_optimizers()
        self._watched = {id(one.tensor): one.tensor for one in after.identities.values()}
        self._norms = [entry.module for entry in named_modules(model) if is_norm(entry.module)]
        self._others: set[type] = set()  # types of attributes that are no tensors
        self._parts, self._facts = self._all_parts(), self._all_facts()
        self._bits = SameBits({name: (one.tensor, live[name].tensor) for name, one in kept.items()})

    def __bool__(self) -> bool:
        return (
            self._sure
            and len(parts := self._all_parts()) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and self._all_facts() == self._facts
            and bool(self._bits)
        )

    def _all_parts(self) -> list[object]:
        """All objects that the state is read from; the same ones in the same order, or a change."""
        parts: list[object] = []
        # Not modules(), which a class may override.
        waiting, seen = [self._model], set()
        while waiting:
            module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            waiting += [child for child in module._modules.values() if child is not None]
            parts += type(module), record_of(module), module.training
            for holder in (module._modules, module._parameters, module._buffers):
                parts += holder.keys()
                parts += holder.values()
            parts += getattr(module, "_non_persistent_buffers_set", ())
            kinds = set(map(type, vars(module).values()))
            if kinds <= self._others:  # as a rule; to ask each value takes three times as long
                continue
            self._others |= {kind for kind in kinds if not issubclass(kind, Tensor)}
            for name, value in vars(module).items():
                if isinstance(value, Tensor):  # others are not kept alive
                    parts += name, self._watched.get(id(value))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                parts += group["params"]
        return parts

    def _all_facts(self) -> list[object]:
        """What else is read, of norm layers and of tensors: equal, or a change."""
        own = [(eps_of(module), is_lookalike(module)) for module in self._norms]
        return [*own, *map(_facts, self._watched.values())]


def _facts(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided:
        return (tensor.layout,)
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.is_conj(),
        tensor.is_neg(),
        tensor.requires_grad,
        tensor.is_leaf and tensor.grad is not None,
    )
