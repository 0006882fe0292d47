"""Running a model over data and measuring what its norm layers are given, with nothing changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnfreeze.calibration.batches import call, samples_in
from bnfreeze.calibration.gathered import Gathered
from bnfreeze.calibration.moments import Moments, by_row
from bnfreeze.errors import BnfreezeError
from bnfreeze.inspection.modes import modes_put_back
from bnfreeze.norm_layers import STATISTICS, NamedModule
from bnfreeze.torch_private import _InstanceNorm

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
        moments: by the layer's name, in the order of the first calls, on the CPU; without those
            that were never given a sample.
        batches: how many batches there were, over all ranks.
    """

    moments: dict[str, Moments]
    batches: int


@contextmanager
def as_in_evaluation(
    model: nn.Module, group: dist.ProcessGroup | None = None
) -> Iterator[nn.Module]:
    """Run what is inside in eval mode and without gradients; then put everything back.

    Training flags, buffers and the random state of torch, NumPy and Python are afterwards what they
    were, bit for bit. Inside, all ranks of `group` have the statistics of its first: each rank's
    last training step has left others, as DDP sends buffers before a step and not after it.

    Yields:
        the model to call: without what would synchronise ranks, or skip hooks.
    """
    modules = list(model.modules())
    devices = list({t.device for t in model.parameters() if t.device.type == "cuda"})
    inner = model
    while type(inner).__name__ in _RUNNERS:
        inner = getattr(inner, _RUNNERS[type(inner).__name__])
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        # Compiled code calls no hooks that came later, so what is compiled runs as it was written.
        if any(m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in modules):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(modes_put_back(modules, False, buffers=True))
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        if group is not None:
            stored = [
                b
                for module in modules
                for name, b in module._buffers.items()
                if b is not None and name in STATISTICS and not b.is_meta
            ]
            sent: list[Any] = [[tensor.cpu() for tensor in stored]]
            dist.broadcast_object_list(sent, src=dist.get_global_rank(group, 0), group=group)
            for tensor, value in zip(stored, sent[0], strict=True):
                tensor.copy_(value)
        model.eval()
        yield inner


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[NamedModule],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    group: dist.ProcessGroup | None = None,
    with_batch: bool = False,
    exact: bool = False,
    first: Callable[[], object] = lambda: None,
) -> Measured:
    """Run a model once over data and measure the inputs of layers, inside `as_in_evaluation`.

    Args:
        model: what to run.
        batches: what to run it on, on this rank.
        layers: the norm layers to measure.
        forward: how to call the model on a batch, where it is not ``model(inputs)``.
        group: pool what its ranks have measured, which is the same on every rank then; every rank
            has to ask for the same. None for this process alone.
        with_batch: normalise with each batch's own statistics in these layers meanwhile. A
            batch with one value per channel is normalised with the stored ones.
        exact: reduce in fp64.
        first: called before; of what it raises, all ranks are told.

    Raises:
        CalibrationError: a layer was given NaN, infinity or other channels than it has
            statistics of; there are no batches; or another rank failed.
        Exception: what the model or `first` raised on this rank.
    """
    here = partial(_on_this_rank, model, batches, layers, forward, with_batch, exact, first)
    if group is None:
        return here()
    error: Exception | None = None
    sent: Any = None
    try:
        sent = here()
    except Exception as caught:  # the other ranks wait for this one
        error, sent = caught, f"{type(caught).__name__}: {caught}"
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, sent, group=group)
    if error is not None:
        raise error
    moments: dict[str, Moments] = {}
    for rank, other in enumerate(gathered):
        if isinstance(other, str):
            raise CalibrationError(f"rank {rank}: {other}")
        for name, there in other.moments.items():
            moments[name] = moments[name].merged(there) if name in moments else there
    return Measured(moments, sum(other.batches for other in gathered))


def _on_this_rank(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[NamedModule],
    forward: Callable[[nn.Module, Any], Any] | None,
    with_batch: bool,
    exact: bool,
    first: Callable[[], object],
) -> Measured:
    first()
    found = Gathered(layers)
    stored: dict[nn.Module, dict[str, Tensor | None]] = {}

    def before(name: str, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        within = isinstance(module, _InstanceNorm)
        if within and x.dim() == module._get_no_batch_dim():
            x = x.unsqueeze(0)  # instance norm takes a single sample, too
        if not x.numel():
            return
        channels = found.references[name].numel()
        if x.dim() > 1 and x.shape[1] != channels:
            raise CalibrationError(
                f"{name or 'The model'}: its statistics have {channels} elements, and its "
                f"input has {x.shape[1]} channels. Such a layer cannot be measured."
            )
        rows = a, v = by_row(x, exact=exact)
        size = x.numel() // a.numel()
        found.add(name, rows, size, within)
        if with_batch and (size if within else len(a) * size) > 1:
            own = module._buffers
            stored[module] = {_MEAN: own[_MEAN], _VAR: own[_VAR]}
            variance = v.mean(0) if within else v.mean(0) + a.var(0, correction=0)
            own[_MEAN], own[_VAR] = a.mean(0).to(own[_MEAN]), variance.to(own[_VAR])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._buffers.update(stored.pop(module, {}))

    model.eval()  # whatever `first` has left
    for entry in layers:
        # A train() of the user's own may leave a layer in train mode, where it would update the
        # statistics that the next pass is compared with.
        if entry.module.training:
            entry.module.training = False
    tensors = chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    count = 0
    with ExitStack() as hooks:
        for entry in layers:
            hook = partial(before, entry.name)
            hooks.enter_context(entry.module.register_forward_pre_hook(hook, with_kwargs=True))
            if with_batch:
                hooks.enter_context(entry.module.register_forward_hook(after, always_call=True))
        for batch in batches:
            found.items = samples_in(batch) or None
            call(model, batch, forward, device)
            if name := found.merge():
                raise CalibrationError(
                    f"batch {count}: the input of {name} has NaN or infinity in it. Nothing was "
                    f"changed. Look at this batch (counted from 0), and at the parameters and "
                    f"statistics of the layers before it."
                )
            count += 1
    if not count:
        raise CalibrationError("batches: there are none, so nothing was measured.")
    return Measured(found.by_name(), count)
