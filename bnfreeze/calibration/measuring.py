"""Running a model over data and measuring what its norm layers are given, with nothing changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnfreeze.calibration.batches import Batches, call
from bnfreeze.calibration.moments import Moments
from bnfreeze.errors import BnfreezeError
from bnfreeze.inspection.modes import modes_put_back
from bnfreeze.norm_layers import STATISTICS, NamedModule
from bnfreeze.torch_private import _InstanceNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CalibrationError",
    "Measured",
    "as_in_evaluation",
    "measure",
    "pooled_over_ranks",
    "running_statistics",
]

_MEAN, _VAR = STATISTICS[:2]
# What runs a model in a way of its own: DDP's forward sends buffers to other ranks, which may have
# fewer batches.
_RUNNERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


class CalibrationError(BnfreezeError):
    """The data cannot be used: it has NaN or infinity in it, or there is too little of it."""


@dataclass(frozen=True)
class Measured:
    """What one pass over the data gave.

    Attributes:
        moments: by the layer's id; of no samples where it was never called.
        sizes: likewise, how many samples the layer was given at once, at most.
        order: the layers in the order of their first call.
        batches: how many batches there were, over all ranks.
    """

    moments: dict[int, Moments]
    sizes: dict[int, int]
    order: tuple[NamedModule, ...]
    batches: int


@contextmanager
def as_in_evaluation(model: nn.Module, group: ProcessGroup | None = None) -> Iterator[nn.Module]:
    """Run what is inside in eval mode and without gradients; then put everything back.

    Training flags, buffers and the random state of torch, NumPy and Python are afterwards what they
    were, bit for bit. Inside, all ranks of `group` have the statistics of its first: each rank's
    last training step has left others, as DDP sends buffers before a step and not after it.

    Yields:
        the model to call: without what would synchronise ranks, or skip hooks.
    """
    modules = list(model.modules())
    numpy = sys.modules.get("numpy.random")
    state = random.getstate(), numpy.get_state() if numpy is not None else None
    devices = list({t.device for t in model.parameters() if t.device.type == "cuda"})
    inner = model
    while type(inner).__name__ in _RUNNERS:
        inner = getattr(inner, _RUNNERS[type(inner).__name__])
    try:
        with (
            modes_put_back(modules, False, buffers=True),
            torch.random.fork_rng(devices),
            torch.no_grad(),
            _hooks_called(modules),
        ):
            if group is not None:
                stored = [
                    b
                    for module in modules
                    for name, b in module._buffers.items()
                    if b is not None and name in STATISTICS and not b.is_meta
                ]
                _take_from_first_rank(stored, group)
            model.eval()
            yield inner
    finally:
        random.setstate(state[0])
        if numpy is not None:
            numpy.set_state(state[1])


def _hooks_called(modules: Sequence[nn.Module]) -> AbstractContextManager[object]:
    """Compiled code calls no hooks that came later, so what is compiled runs as it was written."""
    compiled = any(m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in modules)
    eager: AbstractContextManager[object] = nullcontext()
    return torch.compiler.set_stance("force_eager") if compiled else eager


def _take_from_first_rank(tensors: Sequence[Tensor], group: ProcessGroup) -> None:
    sent: list[Any] = [[tensor.cpu() for tensor in tensors]]
    dist.broadcast_object_list(sent, src=dist.get_global_rank(group, 0), group=group)
    for tensor, value in zip(tensors, sent[0], strict=True):
        tensor.copy_(value)


def measure(
    model: nn.Module,
    layers: Sequence[NamedModule],
    batches: Batches,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    normalize_with_batch: Sequence[NamedModule] = (),
    exact: bool = False,
    progress: Callable[[], object] | None = None,
) -> Measured:
    """Run the model over the batches and measure the inputs of `layers`.

    Call it inside `as_in_evaluation`.

    Args:
        model: what to run; in eval mode, whatever a `score` has left.
        layers: the norm layers to measure.
        batches: what to run.
        forward: how to call the model on a batch, where it is not ``model(inputs)``.
        normalize_with_batch: those of the layers that are to normalise with each batch's own
            statistics while they are measured. A batch with one value per channel is normalised
            with the stored ones.
        exact: reduce in fp64.
        progress: called after each batch.

    Raises:
        CalibrationError: a layer was given NaN or infinity, or there are no batches.
    """
    found = {id(e.module): Moments.empty(e.module.get_buffer(_MEAN)) for e in layers}
    sizes = dict.fromkeys(found, 0)
    by_id = {id(e.module): e for e in layers}
    order: dict[int, NamedModule] = {}
    with_batch = {id(e.module) for e in normalize_with_batch}
    stored: dict[int, dict[str, Tensor | None]] = {}
    finite: list[tuple[str, Tensor]] = []
    place = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.unsqueeze(0) if x.dim() == _unbatched_rank(module) else x
        key = id(module)
        moments = Moments.of(x, found[key].reference, exact=exact)
        order.setdefault(key, by_id[key])
        if not moments.samples:
            return
        finite.append((by_id[key].name, torch.isfinite(moments.m2.sum())))
        found[key] = found[key].merged(moments)
        sizes[key] = max(sizes[key], moments.samples)
        if key in with_batch and moments.elements > 1:
            own = module._buffers
            stored[key] = {_MEAN: own[_MEAN], _VAR: own[_VAR]}
            mean, var = running_statistics(module, moments, biased=True)
            own[_MEAN], own[_VAR] = mean.to(own[_MEAN]), var.to(own[_VAR])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._buffers.update(stored.pop(id(module), {}))

    hooks: list[Any] = []
    model.eval()
    try:
        for entry in layers:
            hooks.append(entry.module.register_forward_pre_hook(before, with_kwargs=True))
            if id(entry.module) in with_batch:
                hooks.append(entry.module.register_forward_hook(after, always_call=True))
        device = _device(model)
        for batch in batches:
            finite.clear()
            call(model, batch, forward, device)
            # Asked when the batch is done, so that a GPU is waited for once and not in each layer.
            for name, one in finite:
                if not bool(one):
                    raise CalibrationError(
                        f"batch {place}: the input of {name or 'the model'} has NaN or infinity "
                        f"in it. Nothing was changed. Look at this batch (counted from 0), and "
                        f"at the parameters and statistics of the layers before it."
                    )
            place += 1
            if progress is not None:
                progress()
    finally:
        for hook in hooks:
            hook.remove()
        for entry in layers:
            entry.module._buffers.update(stored.pop(id(entry.module), {}))
    if not place:
        raise CalibrationError("batches: there are none, so nothing was measured.")
    return Measured(found, sizes, tuple(order.values()), place)


def pooled_over_ranks(
    run: Callable[[], Measured], layers: Sequence[NamedModule], group: ProcessGroup | None
) -> Measured:
    """Measure on each rank, and pool what all have measured; the same on every rank.

    Args:
        run: measures on this rank, with as many batches as it has.
        layers: the layers that are measured.
        group: the process group; every rank of it has to call this. None for this process alone.

    Raises:
        CalibrationError: on every rank, if `run` failed on another.
        Exception: what `run` raised on this rank.
    """
    if group is None:
        return run()
    error: Exception | None = None
    sent: Any = None
    keys = [id(entry.module) for entry in layers]
    try:
        own = run()
        place = {id(entry.module): number for number, entry in enumerate(layers)}
        sent = (
            [own.moments[key].on_cpu() for key in keys],
            [own.sizes[key] for key in keys],
            [place[id(entry.module)] for entry in own.order],
            own.batches,
        )
    except Exception as caught:  # the other ranks wait for this one
        error, sent = caught, f"{type(caught).__name__}: {caught}"
    gathered: list[Any] = [sent] * dist.get_world_size(group)
    dist.all_gather_object(gathered, sent, group=group)
    if error is not None:
        raise error
    for rank, other in enumerate(gathered):
        if isinstance(other, str):
            raise CalibrationError(f"rank {rank}: {other}")
    moments, sizes = {}, {}
    for number, key in enumerate(keys):
        moments[key] = reduce(Moments.merged, (parts[number] for parts, *_ in gathered))
        sizes[key] = max(other[1][number] for other in gathered)
    order = dict.fromkeys(number for *_, order, _ in gathered for number in order)
    return Measured(
        moments, sizes, tuple(layers[n] for n in order), sum(other[3] for other in gathered)
    )


def running_statistics(
    module: nn.Module, moments: Moments, *, biased: bool = False
) -> tuple[Tensor, Tensor]:
    """What the layer's running mean and variance would be for this data: (C,) each, fp64."""
    if isinstance(module, _InstanceNorm):
        return moments.centre[0], moments.sample_variance
    return moments.mean, moments.m2 / moments.elements if biased else moments.variance


def _unbatched_rank(module: nn.Module) -> int | None:
    """The rank of a single sample, where the layer takes one without its batch dimension."""
    rank = getattr(module, "_get_no_batch_dim", None)
    return int(rank()) if rank is not None else None


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
