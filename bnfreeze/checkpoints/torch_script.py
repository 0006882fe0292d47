"""TorchScript files, as torch.jit.save writes them: their tensors. Their code is not looked at."""

from __future__ import annotations

from bnfreeze.checkpoints.reading import Content, OpenFile
from bnfreeze.checkpoints.torch_zip import read_archive

__all__ = ["read_torchscript"]


def read_torchscript(file: OpenFile) -> Content:
    """The module that was saved, as a placeholder with its tensors.

    Its code entries are compressed; they are never read. What its pickle names are classes of that
    code, and not of Python: loading it calls nothing by these names.

    Raises:
        CheckpointError: refused or damaged.
    """
    described = read_archive(file)
    return Content(
        described.root,
        tuple(made for made in described.made if not made.name.startswith("__torch__.")),
        ("TorchScript: its code was not looked at. Calling the model runs that code.",),
    )
