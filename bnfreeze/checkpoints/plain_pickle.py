"""Plain pickles: `pickle.dump` of a dict of arrays, as detectron2's `.pkl` files, or of tensors."""

from __future__ import annotations

from bnfreeze.checkpoints.reading import Content, OpenFile
from bnfreeze.checkpoints.torch_legacy import read_storage
from bnfreeze.checkpoints.torch_tensors import read_torch_pickle
from bnfreeze.errors import CorruptCheckpointError

__all__ = ["read_plain_pickle"]


def read_plain_pickle(file: OpenFile) -> Content:
    """What was saved, with a `StoredTensor` for each array and each tensor.

    Raises:
        CheckpointError: refused or damaged.
    """
    described = read_torch_pickle(file.source, None, nested=read_storage)
    if described.end != file.source.size:
        # A second pickle would not be read, and nothing be said of it.
        raise CorruptCheckpointError(
            f"Damaged: {file.source.size - described.end:,} bytes follow after its pickle."
        )
    return Content(described.root, described.made)
