"""Running a model over data and measuring what its norm layers are given, with nothing changed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnfreeze.calibration.batches import call
from bnfreeze.calibration.moments import Moments
from bnfreeze.errors import BnfreezeError
from bnfreeze.inspection.modes import modes_put_back
from bnfreeze.norm_layers import STATISTICS, NamedModule
from bnfreeze.torch_private import _InstanceNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CalibrationError", "Measured", "Runs", "as_in_evaluation"]

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
        moments: by the layer's name, in the order of the first calls; without those that were
            never given a sample.
        batches: how many batches there were, over all ranks.
    """

    moments: dict[str, Moments]
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
    # Compiled code calls no hooks that came later, so what is compiled runs as it was written.
    compiled = any(m._compiled_call_impl or type(m).__name__ == "OptimizedModule" for m in modules)
    eager: AbstractContextManager[object] = nullcontext()
    if compiled:
        eager = torch.compiler.set_stance("force_eager")
    try:
        with (
            modes_put_back(modules, False, buffers=True),
            torch.random.fork_rng(devices),
            torch.no_grad(),
            eager,
        ):
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
    finally:
        random.setstate(state[0])
        if numpy is not None:
            numpy.set_state(state[1])


@dataclass(frozen=True)
class Runs:
    """Runs a model over data, as often as it is asked to, inside `as_in_evaluation`.

    Attributes:
        model: what to run.
        batches: what to run it on, on this rank.
        forward: how to call the model on a batch, where it is not ``model(inputs)``.
        group: pool what its ranks have measured, which is the same on every rank then; every rank
            has to ask for the same. None for this process alone.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Callable[[nn.Module, Any], Any] | None = None
    group: ProcessGroup | None = None

    def measure(
        self,
        layers: Sequence[NamedModule],
        *,
        with_batch: bool = False,
        exact: bool = False,
        first: Callable[[], object] = lambda: None,
    ) -> Measured:
        """Run the model once over the data and measure the inputs of `layers`.

        Args:
            layers: the norm layers to measure.
            with_batch: normalise with each batch's own statistics in these layers meanwhile. A
                batch with one value per channel is normalised with the stored ones.
            exact: reduce in fp64.
            first: called before; of what it raises, all ranks are told.

        Raises:
            CalibrationError: a layer was given NaN, infinity or other channels than it has
                statistics of; there are no batches; or another rank failed.
            Exception: what the model or `first` raised on this rank.
        """
        if self.group is None:
            first()
            return self._on_this_rank(layers, with_batch, exact)
        error: Exception | None = None
        sent: Any = None
        try:
            first()
            own = self._on_this_rank(layers, with_batch, exact)
            sent = replace(own, moments={name: m.on_cpu() for name, m in own.moments.items()})
        except Exception as caught:  # the other ranks wait for this one
            error, sent = caught, f"{type(caught).__name__}: {caught}"
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, sent, group=self.group)
        if error is not None:
            raise error
        moments: dict[str, Moments] = {}
        for rank, other in enumerate(gathered):
            if isinstance(other, str):
                raise CalibrationError(f"rank {rank}: {other}")
            for name, found in other.moments.items():
                moments[name] = moments[name].merged(found) if name in moments else found
        return Measured(moments, sum(other.batches for other in gathered))

    def _on_this_rank(
        self, layers: Sequence[NamedModule], with_batch: bool, exact: bool
    ) -> Measured:
        found: dict[str, Moments] = {}
        empty = {
            entry.name: Moments.empty(
                entry.module.get_buffer(_MEAN), within=isinstance(entry.module, _InstanceNorm)
            )
            for entry in layers
        }
        stored: dict[nn.Module, dict[str, Tensor | None]] = {}

        def before(name: str, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if empty[name].within and x.dim() == module._get_no_batch_dim():
                x = x.unsqueeze(0)  # instance norm takes a single sample, too
            if not x.numel():
                return
            channels = empty[name].reference.numel()
            if x.dim() > 1 and x.shape[1] != channels:
                raise CalibrationError(
                    f"{name or 'The model'}: its statistics have {channels} elements, and its "
                    f"input has {x.shape[1]} channels. Such a layer cannot be measured."
                )
            moments = empty[name].of_batch(x, exact=exact)
            found[name] = found[name].merged(moments) if name in found else moments
            if with_batch and moments.has_variance:
                own = module._buffers
                stored[module] = {_MEAN: own[_MEAN], _VAR: own[_VAR]}
                own[_MEAN] = moments.mean.to(own[_MEAN])
                own[_VAR] = moments.biased_variance.to(own[_VAR])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            module._buffers.update(stored.pop(module, {}))

        self.model.eval()  # whatever `first` has left
        tensors = chain(self.model.parameters(), self.model.buffers())
        device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
        count = 0
        with ExitStack() as hooks:
            for name, module in ((entry.name, entry.module) for entry in layers):
                hook = module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
                hooks.enter_context(hook)
                if with_batch:
                    hooks.enter_context(module.register_forward_hook(after, always_call=True))
            for batch in self.batches:
                call(self.model, batch, self.forward, device)
                _check_finite(found, count)
                count += 1
        if not count:
            raise CalibrationError("batches: there are none, so nothing was measured.")
        return Measured(found, count)


def _check_finite(found: dict[str, Moments], batch: int) -> None:
    # Asked when the batch is done, so that a GPU is waited for once and not in each layer.
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.m2.sum())):
            raise CalibrationError(
                f"batch {batch}: the input of {name or 'the model'} has NaN or infinity in it. "
                f"Nothing was changed. Look at this batch (counted from 0), and at the parameters "
                f"and statistics of the layers before it."
            )
