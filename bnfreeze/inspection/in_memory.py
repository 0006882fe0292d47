"""Live tensors behind the interface of stored ones, so that both are looked at by the same code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bnfreeze.checkpoints import Checkpoint, LayerSettings, StoredTensor, find_state_dicts
from bnfreeze.checkpoints.modules import Model
from bnfreeze.checkpoints.pickled import Content
from bnfreeze.checkpoints.stored_tensor import Words
from bnfreeze.inspection.origin import Found
from bnfreeze.norm_layers import check_model, eps_of, is_norm
from bnfreeze.policies.record import layer_class
from bnfreeze.torch_private import DisableTorchFunctionSubclass


def shard_of(tensor: Tensor) -> Tensor | None:
    """This rank's shard of a DTensor; None for any other tensor."""
    # If nobody has imported the module, there is no DTensor; not every torch is built with it.
    home = sys.modules.get("torch.distributed.tensor")
    if home is None or not isinstance(tensor, home.DTensor):
        return None
    return cast("Tensor", tensor._local_tensor)


def why_unreadable(tensor: Tensor) -> str:
    """Why the tensor's bits cannot be read; empty if they can."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "it has not seen an input yet"
    own = shard_of(tensor)
    if own is not None:
        return why_unreadable(own)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"bnfreeze cannot read the values of a {type(tensor).__name__}"
    if tensor.is_meta:
        return "it is on the meta device and has no values"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"its layout is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "it is quantised"
    if tensor.numel() and not tensor.untyped_storage().size():
        return "its storage has been freed"
    return ""


def read_tensor(tensor: Tensor) -> Tensor:
    """The values as a plain contiguous tensor, of the same memory if possible.

    For a DTensor: this rank's shard. Call it only if `why_unreadable` gives nothing.
    """
    own = shard_of(tensor)
    with DisableTorchFunctionSubclass():
        plain = (tensor if own is None else own).detach()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        return plain.contiguous()


class TensorInMemory(StoredTensor):
    """A live tensor behind the interface of a stored one.

    Attributes:
        tensor: the tensor, as `read_tensor` gives it where it can be read.
        address: its device, and where its first element is; None if it cannot be read.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.why = why_unreadable(tensor)
        self.tensor = tensor if self.why else read_tensor(tensor)
        if not self.why:
            own = shard_of(tensor)
            self.address = (tensor.device, (tensor if own is None else own).data_ptr())
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        unseen = isinstance(tensor, UninitializedParameter | UninitializedBuffer)
        self.shape = () if unseen else tuple(self.tensor.shape)

    def storage(self) -> tuple[object, int]:
        """The device and address of the storage, and its size in bytes."""
        if self.why:
            # On the meta device every storage has the same address.
            size = self.tensor.untyped_storage().nbytes() if self.tensor.is_meta else 0
            return id(self), size
        storage = self.tensor.untyped_storage()
        return (self.tensor.device, storage.data_ptr()), storage.nbytes()

    def words(self) -> Words:
        """All elements in row-major order, as unsigned integers; of the same memory on a CPU."""
        flat = self.tensor.cpu().reshape(-1)
        size = min(flat.dtype.itemsize, 8)
        return flat.view(torch.uint8).numpy().view(np.dtype(f"<u{size}"))


def found_in(saved: Mapping[str, Any], key: str | None = None) -> Found:
    """The state_dicts in a mapping: itself, or those that it holds.

    Raises:
        UnsupportedFormatError: it holds no tensors by name, or none under the key.
    """
    parts = find_state_dicts(_described(saved)).chosen(key)
    return Found(parts, Checkpoint("", "state_dict", Content({})))


def found_in_model(what: object) -> Found:
    """The state_dict of a live model, and the eps of its norm layers.

    Raises:
        TypeError: it is no live `nn.Module`.
        UnsupportedFormatError: it has no tensors.
    """
    model = check_model(what)
    layers = {
        name: LayerSettings(layer_class(module).__name__, eps=eps_of(module))
        for name, module in model.named_modules(remove_duplicate=False)
        if is_norm(module)
    }
    saved = _described(model.state_dict())
    tensors = {name: one for name, one in saved.items() if isinstance(one, StoredTensor)}
    besides = [(name, one) for name, one in saved.items() if name not in tensors]
    parts = find_state_dicts(Model(tensors, layers, besides=besides))
    return Found(parts, Checkpoint("", "model", Content({})))


def _described(saved: Mapping[str, Any]) -> Any:
    """The same dicts and lists with each tensor described; each once, without recursion."""
    made: dict[int, Any] = {id(saved): {}}
    waiting: list[Any] = [saved]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, Mapping) else enumerate(holder)
        for name, value in items:
            if isinstance(value, Tensor):
                made[id(holder)][name] = TensorInMemory(value)
            elif isinstance(value, Mapping | list | tuple):
                if id(value) not in made:
                    made[id(value)] = {}
                    waiting.append(value)
                made[id(holder)][name] = made[id(value)]
    return made[id(saved)]
