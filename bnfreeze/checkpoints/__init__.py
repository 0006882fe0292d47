"""Untrusted checkpoints, read without running or importing anything in them.

`open_checkpoint` recognises the format by the content. It gives what was saved as nested dicts and
lists, with a `StoredTensor` in the place of each tensor: its dtype and shape, checked against the
bytes that are there, and its values when they are asked for. What is neither a tensor, a number,
a text nor a container of these becomes a placeholder with a name. torch is neither used nor
imported; its own loaders never see the file.

`opening` has the table of formats; their readers are in `torch_zip`, `torch_legacy`,
`numpy_arrays`, `safetensors_file`, `onnx_file` and `distributed`. The pickles in them are read as
data (`opcodes`, `pickles`, `pickled`), with the names of torch (`torch_tensors`,
`torch_calls`) and of NumPy (`numpy_arrays`). `state_dicts` finds the models in what was saved, and
`modules` those that were saved whole. `placeholders` says what was not interpreted, and what
loading the file would call; it has the list of names that are harmless. `source` reads files and
URLs by ranges.
"""

from bnfreeze.checkpoints.modules import LayerSettings
from bnfreeze.checkpoints.opening import Checkpoint, open_checkpoint
from bnfreeze.checkpoints.placeholders import CodeCall, Uninterpreted
from bnfreeze.checkpoints.reading import naming_file
from bnfreeze.checkpoints.state_dicts import (
    StateDict,
    StateDicts,
    find_state_dicts,
    tensors_by_name,
)
from bnfreeze.checkpoints.stored_tensor import StoredTensor

__all__ = [
    "Checkpoint",
    "CodeCall",
    "LayerSettings",
    "StateDict",
    "StateDicts",
    "StoredTensor",
    "Uninterpreted",
    "find_state_dicts",
    "naming_file",
    "open_checkpoint",
    "tensors_by_name",
]
