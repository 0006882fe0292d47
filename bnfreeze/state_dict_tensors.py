"""Tensors of a state_dict in memory, under the same face as those of a file; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bnfreeze.checkpoint import StateDict, StoredTensor
from bnfreeze.checkpoint.state_dicts import find_state_dict
from bnfreeze.checkpoint.tensors import Words

__all__ = ["in_memory", "state_dict_in"]


class _TensorInMemory(StoredTensor):
    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        self.shape = tuple(tensor.shape)
        self.has_values = not tensor.is_meta
        self.why = "it is on the meta device" if tensor.is_meta else ""
        self._tensor = tensor

    def storage(self) -> tuple[object, int]:
        storage = self._tensor.untyped_storage()
        # On the meta device every storage has the same address.
        key = id(self) if self._tensor.is_meta else storage.data_ptr()
        return (self._tensor.device, key), storage.nbytes()

    def words(self) -> Words:
        flat = self._tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
        size = min(flat.dtype.itemsize, 8)
        return flat.view(torch.uint8).numpy().view(np.dtype(f"<u{size}"))


def state_dict_in(saved: Mapping[str, Any], key: str | None = None) -> StateDict:
    """Find the state_dict in a mapping: a state_dict itself, or a checkpoint that holds one.

    Raises:
        UnsupportedFormat: it holds no tensors by name.
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
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                made[id(holder)][name] = _TensorInMemory(value)
            elif isinstance(value, Mapping):
                if id(value) not in made:
                    made[id(value)] = {}
                    waiting.append(value)
                made[id(holder)][name] = made[id(value)]
    return made[id(saved)]
