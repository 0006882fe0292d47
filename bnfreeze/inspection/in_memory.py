"""Tensors of a state_dict in memory, under the same face as those of a file; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from bnfreeze.checkpoints import StateDict, StoredTensor
from bnfreeze.checkpoints.state_dicts import find_state_dict
from bnfreeze.checkpoints.stored_tensor import Words

__all__ = ["in_memory", "state_dict_in"]


_META: Final = "it is on the meta device"


def _why_unread(tensor: torch.Tensor) -> str:
    """Why the values cannot be read as plain memory; empty where they can."""
    if tensor.is_meta:
        return _META
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return "its class keeps its values in a way of its own"
    if tensor.layout is not torch.strided:
        return "it is sparse"
    return "it is quantised" if tensor.is_quantized else ""


class _TensorInMemory(StoredTensor):
    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)
        self.why = _why_unread(tensor)
        self.has_values = not self.why
        self._tensor = tensor

    def storage(self) -> tuple[object, int]:
        if self.why == _META:
            # There every storage has the same address.
            return (self._tensor.device, id(self)), self._tensor.untyped_storage().nbytes()
        if self.why:
            return self, 0
        storage = self._tensor.untyped_storage()
        return (self._tensor.device, storage.data_ptr()), storage.nbytes()

    def words(self) -> Words:
        flat = self._tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
        size = min(flat.dtype.itemsize, 8)
        return flat.view(torch.uint8).numpy().view(np.dtype(f"<u{size}"))


def state_dict_in(saved: Mapping[str, Any], key: str | None = None) -> StateDict:
    """Find the state_dict in a mapping: a state_dict itself, or a checkpoint that holds one.

    Raises:
        UnsupportedFormatError: it holds no tensors by name.
    """
    return find_state_dict(_described(saved), key)


def in_memory(tensor: StoredTensor) -> torch.Tensor:
    """Read a stored tensor: every bit of it, contiguous, on the CPU.

    Raises:
        CheckpointError: it cannot be read.
    """
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    # A copy, because what was read is read-only.
    flat = torch.from_numpy(tensor.words().view(np.uint8).copy())
    return flat.view(dtype).reshape(tensor.shape)


def _described(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The same dicts with each tensor described; each dict once, without recursion."""
    made: dict[int, dict[str, Any]] = {id(saved): {}}
    waiting = [saved]
    while waiting:
        holder = waiting.pop()
        for name, value in holder.items():
            if isinstance(value, torch.Tensor):
                made[id(holder)][name] = _TensorInMemory(value)
            elif isinstance(value, Mapping):
                if id(value) not in made:
                    made[id(value)] = {}
                    waiting.append(value)
                made[id(holder)][name] = made[id(value)]
    return made[id(saved)]
