"""A quick look which shows that nothing has changed since a comparison that found nothing.

The full comparison reads every fact of every tensor, which takes a third of a short training step
on a GPU. Most steps change nothing. The quick look asks only whether all that the facts were read
from is still the same: the modules, their modes, the objects in them, and the bits. If it is not
sure, the full comparison decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import Tensor, nn

from bnfreeze.inspection.in_memory import TensorInMemory
from bnfreeze.nn.eager import PLAIN
from bnfreeze.norm_layers import eps_of
from bnfreeze.policies.record import record_of
from bnfreeze.verification.on_device import SameBits
from bnfreeze.verification.state import State

__all__ = ["Unchanged", "unchanged"]


class Unchanged:
    """A model as it is; true as long as it is so."""

    def __init__(self, model: nn.Module, before: State, after: State) -> None:
        """Remember `model`, whose state is `after` and equals `before`."""
        self._model, self._optimizers = model, before.live_optimizers()
        tensors = [one.tensor for one in after.identities.values()]
        self._watched = {id(tensor): tensor for tensor in tensors}
        self._parts = self._all_parts()
        self._facts = [_facts(tensor) for tensor in tensors]
        self._tensors = tensors
        self._bits = SameBits(_pairs(before, after))

    def __bool__(self) -> bool:
        parts = self._all_parts()
        return (
            len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and [_facts(tensor) for tensor in self._tensors] == self._facts
            and bool(self._bits)
        )

    def _all_parts(self) -> list[object]:
        """All objects that the state is read from; the same ones in the same order, or a change."""
        parts: list[object] = []
        for module in self._model.modules():
            parts += type(module), record_of(module), module.training, eps_of(module)
            for holder in (module._modules, module._parameters, module._buffers):
                if holder:
                    parts += holder
                    parts += holder.values()
            parts += module._non_persistent_buffers_set
            for name, value in vars(module).items():
                if isinstance(value, Tensor):  # others are not kept alive
                    parts += name, self._watched.get(id(value))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                parts += group["params"]
        return parts


def unchanged(model: nn.Module, before: State, after: State) -> Unchanged | None:
    """Remember `model` as it is; None if a quick look could miss something."""
    for name, one in after.identities.items():
        value = after.values.get(after.tensors[name].first)
        if (
            type(one.tensor) not in PLAIN
            or not isinstance(value, TensorInMemory)
            or value.tensor.data_ptr() != one.tensor.data_ptr()  # a copy in another layout
        ):
            return None
    return Unchanged(model, before, after)


def _pairs(before: State, after: State) -> dict[str, tuple[Tensor, Tensor]]:
    values: Iterable[tuple[str, Any]] = before.values.items()
    return {name: (old.tensor, after.value(name).tensor) for name, old in values}  # type: ignore[attr-defined]


def _facts(tensor: Tensor) -> tuple[object, ...]:
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.is_leaf and tensor.grad is not None,
    )
