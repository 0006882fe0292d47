"""What a DataLoader gives, turned into calls of the model, and how far a run has come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.errors import add_note

# None, whether to show a bar, or what is called with the number of batches done and of all.
Progress = bool | Callable[[int, int | None], object] | None

# Where a batch is a dict, the model gets the first of these that it has.
_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")


class Batches(ExitStack):
    """The batches that `probe` and `recalibrate` were given; a context manager, for the bar.

    Args:
        batches: any iterable; a DataLoader as a rule.
        most: how many to take; None for all.
        passes: how many times they will be gone through; it may change as more becomes known.
        progress: what to tell about that.

    Raises:
        TypeError: they are no iterable, or a one-shot iterator where several passes are needed.
    """

    def __init__(
        self, batches: Iterable[Any], most: int | None, passes: int, progress: Progress
    ) -> None:
        super().__init__()
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches: expected an iterable of batches, such as a DataLoader, "
                f"not {type(batches).__name__}. For a single batch, pass [batch]."
            )
        if passes > 1 and isinstance(batches, Iterator):
            raise TypeError(
                f"batches: {type(batches).__name__} can be read only once, and {passes} passes are "
                f"needed. Pass a DataLoader or a list, or list(batches)."
            )
        if most is not None and most < 1:
            raise ValueError(f"max_batches: expected at least 1, not {most}.")
        self.passes = passes
        self._batches, self._most, self._done = batches, most, 0
        self._tell = progress if callable(progress) else None
        if progress is True:
            from rich.console import Console
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            if console.is_terminal:
                bar = self.enter_context(Bar(console=console, transient=True))
                task = bar.add_task("Running the model", total=None)
                self._tell = lambda done, total: bar.update(task, completed=done, total=total)
        self._count: int | None = None
        if self._tell is not None:
            known = [count for count in (length_hint(batches), most) if count]
            self._count = min(known, default=None)

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(iter(self._batches), self._most):
            yield batch
            self._done += 1
            if self._tell is not None:
                self._tell(self._done, None if self._count is None else self._count * self.passes)


def call(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
    device: torch.device,
) -> None:
    """Run the model on one batch.

    Where the model fails without a `forward`, its error gets a note that names `forward`.

    Raises:
        TypeError: nothing in the batch looks like the model's input, and there is no `forward`.
    """
    batch = _moved(batch, device)
    if forward is not None:
        forward(model, batch)
        return
    what = ""
    if isinstance(batch, Mapping | tuple | list) and not batch:
        raise TypeError("batches: a batch is empty.")
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _KEYS if key in batch), None)
        if found is None:
            raise TypeError(
                f"batches: a batch is a dict with the keys {', '.join(map(repr, batch))}, and none "
                f"of them is known as the input. Pass forward=lambda model, batch: model(...)."
            )
        batch = found
    elif isinstance(batch, tuple | list):
        batch, what = batch[0], "the first item of the batch, "
    try:
        model(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        add_note(
            error,
            f"bnfreeze called the model with {what}{_described(batch)}. If the model takes "
            f"something else, pass forward=lambda model, batch: model(...).",
        )
        raise


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with the shape {tuple(value.shape)}"
    if isinstance(value, tuple | list) and value:
        return f"a {type(value).__name__} whose first item is {_described(value[0])}"
    return f"an object of the class {type(value).__name__}"


def samples_in(batch: Any, *, whole: bool = True) -> int | None:
    """How many samples a batch has; None where that cannot be seen.

    Args:
        batch: what the loader gave.
        whole: not only a part of it.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    if isinstance(batch, Mapping):
        parts = [batch[key] for key in sorted(batch, key=lambda key: key not in _KEYS)]
    elif isinstance(batch, tuple | list):
        parts = list(batch)
    else:
        return None
    for part in parts:
        if (found := samples_in(part, whole=False)) is not None:
            if isinstance(batch, Mapping) or (whole and isinstance(part, Tensor)):
                return found
            if whole and isinstance(batch, tuple) and isinstance(part, tuple | list):
                return found  # images and their targets
            # A list of images, or of the several inputs of a model: the larger number is right,
            # as a model has few inputs and an image few channels; but one or two images have fewer.
            image = isinstance(part, Tensor) and part.dim() == 3 and found <= 4
            return len(parts) if image else max(found, len(parts))
    return None


def _moved(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):  # what a library made of several tensors may change in place
        return (value if isinstance(value, Tensor) else copy.copy(value)).to(device)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple | list):
        moved = [_moved(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
