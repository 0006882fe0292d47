"""What a DataLoader gives, turned into calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Batches", "call"]

# Where a batch is a dict, the model gets the first of these that it has.
_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")


class Batches:
    """The batches that `probe` and `recalibrate` were given.

    Args:
        batches: any iterable; a DataLoader as a rule.
        most: how many to take; None for all.
        passes: how many times they will be gone through.

    Raises:
        TypeError: they are no iterable, or a one-shot iterator where several passes are needed.
    """

    def __init__(self, batches: Iterable[Any], most: int | None, passes: int) -> None:
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
        self._batches, self._most = batches, most

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batches), self._most)

    def count(self) -> int | None:
        """How many there are, or None where nobody knows."""
        try:
            count = len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            return self._most
        return count if self._most is None else min(count, self._most)


def call(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
    device: torch.device,
) -> None:
    """Run the model on one batch.

    Raises:
        TypeError: nothing in the batch looks like the model's input, and there is no `forward`.
    """
    batch = _moved(batch, device)
    if forward is not None:
        forward(model, batch)
        return
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _KEYS if key in batch), None)
        if found is None:
            raise TypeError(
                f"batches: a batch is a dict with the keys {', '.join(map(repr, batch))}, and none "
                f"of them is known as the input. Pass forward=lambda model, batch: model(...)."
            )
        batch = found
    elif isinstance(batch, tuple | list):
        if not batch:
            raise TypeError("batches: a batch is empty.")
        batch = batch[0]
    model(batch)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device) for each in value)
    return value
