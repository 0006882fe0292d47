"""Checkpoints that nobody vouches for, read without running, importing or believing anything.

`open_checkpoint` tells the kind by content and gives what was saved as nested dicts and lists,
with a `StoredTensor` in the place of each tensor: its dtype and shape, checked against the bytes
that are there, and its values when they are asked for. torch is neither used nor imported; its
own loaders never see the file.

A reader for each format: `torch_zip`, `torch_legacy`, `safetensors_file`, `shards`, `distributed`.
The pickles in them are read as data (`pickles`), with the words of torch (`torch_tensors`).
`state_dicts` finds the state_dict in what was saved.
"""

from bnfreeze.checkpoints.opening import Checkpoint, open_checkpoint, telling
from bnfreeze.checkpoints.state_dicts import StateDict
from bnfreeze.checkpoints.stored_tensor import StoredTensor

__all__ = ["Checkpoint", "StateDict", "StoredTensor", "open_checkpoint", "telling"]
