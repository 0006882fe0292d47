"""The classes that keep the promise.

A held norm layer stays the very object it was; only its class is swapped, for a subclass of its
own class that cannot leave eval (`_ForceEval`) or whose forward cannot write to the running
statistics (`_KeepStatistics`). Against the alternatives:

* forward hooks are dropped by some tools and cannot stop ``model.train()`` from changing the flag;
* methods patched onto the instance stay bound to the original after a deepcopy, and cannot be
  pickled;
* a replacement module breaks aliases, references and optimizer groups.

What the layer was is kept on it, as a `bnfreeze.record.Record`, so that the way back is exact,
after a deepcopy or a save as well.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfreeze.norms import STATISTICS
from bnfreeze.policy import Policy
from bnfreeze.record import layer_class, record_of, set_record

__all__ = ["held_class"]


class _Held(nn.Module):
    """What every held norm layer does: it prints readably, is copied and pickled as itself."""

    def extra_repr(self) -> str:
        record = record_of(self)
        return ", ".join(
            filter(None, [super().extra_repr(), f"held={record.policy}" if record else ""])
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by name. Let the layer's own
        # class say how it is rebuilt, and swap the class again afterwards.
        base, kind = layer_class(self), type(self)
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        args = tuple(base if arg is kind else arg for arg in args)
        mixin = kind.__dict__["_bnfreeze_mixin"]
        return (_rebuild, (base, mixin, make, args), *rest)

    def reset_running_stats(self) -> None:
        record = record_of(self)
        if record is None or not record.policy.holds_statistics:
            super().reset_running_stats()  # type: ignore[misc]

    def reset_parameters(self) -> None:
        record = record_of(self)
        if record is None or not record.policy.holds_affine:
            super().reset_parameters()  # type: ignore[misc]
        else:
            self.reset_running_stats()


class _ForceEval(_Held):
    """Normalises with the running statistics, whatever mode is asked for."""

    # torch.jit.script must read the flag in the instance's dict, which is always False, and not
    # compile the property. The scripted copy is a model of its own: its train() does thaw it.
    __jit_unused_properties__: tuple[str, ...] = ("training",)

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        # train() and eval() of any module above arrive here, and so does a tool that sets the
        # flag itself. It is remembered for the way back.
        record = record_of(self)
        if record is not None:
            set_record(self, replace(record, training=mode))


class _ForceEvalInstance(_ForceEval):
    """The same for instance norm, which uses its running statistics only while it tracks them."""

    __jit_unused_properties__ = ("training", "track_running_stats")

    @property
    def track_running_stats(self) -> bool:
        return True

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        self.__dict__["track_running_stats"] = value


class _KeepStatistics(_Held):
    """Normalises with the batch in train mode, as before, and leaves the statistics alone.

    The layer's own forward runs on copies of the statistics. That holds them whatever this
    forward does with them: write in place, assign, skip ``track_running_stats``. Not meant for
    several threads that run one and the same layer at once.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        held = {}
        for name in STATISTICS:
            buffer = self._buffers.get(name)
            if buffer is not None:
                held[name] = buffer
        try:
            for name, buffer in held.items():
                self._buffers[name] = buffer.clone()
            return super().forward(*args, **kwargs)
        finally:
            for name, buffer in held.items():
                self._buffers[name] = buffer


def held_class(base: type[nn.Module], policy: Policy) -> type[nn.Module]:
    """The subclass of a norm layer's class that keeps the policy's promise; one for each."""
    mixin: type[_Held] = _Held
    if policy.forces_eval:
        mixin = _ForceEvalInstance if issubclass(base, _InstanceNorm) else _ForceEval
    elif policy.holds_statistics:
        mixin = _KeepStatistics
    return _make(base, mixin)


_made: dict[tuple[type, type], type[nn.Module]] = {}


def _make(base: type[nn.Module], mixin: type[_Held]) -> type[nn.Module]:
    if (base, mixin) not in _made:
        name = f"Held{base.__name__}"
        namespace = {
            # torch.fx and others take a layer for a leaf by the module that its class stands in.
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "_bnfreeze_base": base,
            "_bnfreeze_mixin": mixin,
        }
        made = types.new_class(name, (mixin, base), exec_body=lambda body: body.update(namespace))
        # Where two threads were here at once, both take the first one's.
        _made.setdefault((base, mixin), cast("type[nn.Module]", made))
    return _made[base, mixin]


def _rebuild(
    base: type[nn.Module],
    mixin: type[_Held],
    make: Callable[..., nn.Module],
    args: tuple[Any, ...],
) -> nn.Module:
    layer = make(*args)
    layer.__class__ = _make(base, mixin)
    return layer
