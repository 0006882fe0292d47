"""Running a model over data and measuring what its norm layers are given, with nothing changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnfreeze.calibration.batches import Batches, call
from bnfreeze.calibration.moments import Moments
from bnfreeze.errors import BnfreezeError
from bnfreeze.norm_layers import NamedModule
from bnfreeze.policies.record import record_of, set_record

__all__ = ["CalibrationError", "as_in_evaluation", "measure"]


class CalibrationError(BnfreezeError):
    """The data cannot be measured: NaN or infinity in it, or too little of it."""


@contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Run what is inside in eval mode and without gradients; then put everything back.

    Training flags, buffers and the random state of torch, NumPy and Python are afterwards what they
    were, bit for bit.
    """
    modules = list({id(module): module for module in model.modules()}.values())
    flags = [(module, module.training, record_of(module)) for module in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    numpy = sys.modules.get("numpy.random")
    state = random.getstate(), numpy.get_state() if numpy is not None else None
    devices = list({t.device for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, flag, record in flags:
            if module.training != flag:
                module.training = flag
            if record_of(module) is not record:
                set_record(module, record)
        with torch.no_grad():
            for buffer, before in buffers:
                # Some layers write to their buffers in eval mode too.
                if not torch.equal(_bytes(buffer), _bytes(before)):
                    buffer.copy_(before)
        random.setstate(state[0])
        if numpy is not None:
            numpy.set_state(state[1])


def measure(
    model: nn.Module,
    layers: Sequence[NamedModule],
    batches: Batches,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    normalize_with_batch: Sequence[nn.Module] = (),
    exact: bool = False,
    progress: Callable[[int, int | None], object] | None = None,
) -> tuple[dict[int, Moments], list[nn.Module], int]:
    """Run the model over the batches and measure the inputs of `layers`.

    Call it inside `as_in_evaluation`.

    Args:
        model: in eval mode.
        layers: the norm layers to measure.
        batches: what to run.
        forward: how to call the model on a batch, where it is not ``model(inputs)``.
        normalize_with_batch: those of the layers that are to normalise with each batch's own
            statistics while they are measured. A batch with one value per channel is normalised
            with the stored ones.
        exact: reduce in fp64.
        progress: called after each batch with the number done and of all, if known.

    Returns:
        By identity of each layer what was measured (no samples where it was never called); the
        layers in the order of their first call; the number of batches.

    Raises:
        CalibrationError: a layer was given NaN or infinity.
    """
    found = {id(e.module): Moments.empty(_reference(e.module)) for e in layers}
    order: dict[int, nn.Module] = {}
    names = {id(e.module): e.name or "the model" for e in layers}
    with_batch = {id(module) for module in normalize_with_batch}
    stored: dict[int, dict[str, Tensor]] = {}
    place = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.unsqueeze(0) if x.dim() == _unbatched_rank(module) else x
        moments = Moments.of(x, found[id(module)].reference, exact=exact)
        order.setdefault(id(module), module)
        if not moments.samples:
            return
        if not bool(torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()):
            raise CalibrationError(
                f"batch {place}: the input of {names[id(module)]} has NaN or infinity in it. "
                f"Nothing was changed."
            )
        found[id(module)] = found[id(module)].merged(moments)
        if id(module) in with_batch and moments.elements > 1:
            own = module._buffers
            kept = {key: own[key] for key in ("running_mean", "running_var")}
            stored[id(module)] = kept  # type: ignore[assignment]
            batch = moments.mean, moments.m2 / moments.elements
            for key, value in zip(kept, batch, strict=True):
                own[key] = value.to(kept[key])  # type: ignore[arg-type]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._buffers.update(stored.pop(id(module), {}))

    hooks: list[Any] = []
    try:
        for entry in layers:
            hooks.append(entry.module.register_forward_pre_hook(before, with_kwargs=True))
            if id(entry.module) in with_batch:
                hooks.append(entry.module.register_forward_hook(after, always_call=True))
        device = _device(model)
        for batch in batches:
            call(model, batch, forward, device)
            place += 1
            if progress is not None:
                progress(place, batches.count())
    finally:
        for hook in hooks:
            hook.remove()
        for entry in layers:
            entry.module._buffers.update(stored.pop(id(entry.module), {}))
    if not place:
        raise CalibrationError("batches: there are none, so nothing was measured.")
    return found, list(order.values()), place


def _reference(module: nn.Module) -> Tensor:
    mean = module.running_mean
    assert isinstance(mean, Tensor)
    return mean


def _unbatched_rank(module: nn.Module) -> int | None:
    """The rank of a single sample, where the layer takes one without its batch dimension."""
    rank = getattr(module, "_get_no_batch_dim", None)
    return int(rank()) if rank is not None else None


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
