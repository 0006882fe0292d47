"""The classes that keep the promise.

A held norm layer stays the very object it was; only its class is swapped, for a subclass of its
own class that cannot leave eval (`ForceEval`) or whose forward cannot write to the running
statistics (`_BatchAlone`, `_KeepStatistics`). Against the alternatives:

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
from typing import Any, ClassVar, NoReturn, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfreeze.errors import PolicyError
from bnfreeze.norms import STATISTICS
from bnfreeze.policy import Policy
from bnfreeze.record import layer_class, record_of, set_record

__all__ = ["ForceEval", "Held", "Swapped", "held_class", "make_class"]


class Swapped(nn.Module):
    """What every module does whose class was swapped: it is copied and pickled as itself."""

    # The class whose forward takes the place of the module's own; None where that stays.
    replaces: ClassVar[type[nn.Module] | None] = None
    # What a class made of the module's own is called by, in front of that one's name.
    prefix: ClassVar[str] = "Held"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """End here: a registry that the user's class keeps of its subclasses is not for ours."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """What a class made of the class `base` has beyond those two."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by name. Let the layer's own
        # class say how it is rebuilt, and swap the class again afterwards.
        base, kind = layer_class(self), type(self)
        behaviour = kind.__dict__["_bnfreeze_behaviour"]
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        args = tuple(base if arg is kind else arg for arg in args)
        return (_rebuild, (base, behaviour, make, args), *rest)


class Held(Swapped):
    """What every held norm layer does: it prints readably, and keeps what its policy holds."""

    def extra_repr(self) -> str:
        """As before, and the policy."""
        record = record_of(self)
        return ", ".join(
            filter(None, [super().extra_repr(), f"held={record.policy}" if record else ""])
        )

    def reset_running_stats(self) -> None:
        """As before, unless the statistics are held."""
        record = record_of(self)
        if record is None or not record.policy.holds_statistics:
            super().reset_running_stats()  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """As before, but for what is held."""
        record = record_of(self)
        if record is None or not record.policy.holds_affine:
            super().reset_parameters()  # type: ignore[misc]
        else:
            self.reset_running_stats()


class ForceEval(Held):
    """Normalises with the running statistics, whatever mode is asked for."""

    # torch.jit.script must read the flag in the instance's dict, which is always False, and not
    # compile the property. The scripted copy is a model of its own: its train() does thaw it.
    __jit_unused_properties__: tuple[str, ...] = ("training",)

    @property
    def training(self) -> bool:
        """Always False."""
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        # train() and eval() of any module above arrive here, and so does a tool that sets the
        # flag itself. It is remembered for the way back.
        record = record_of(self)
        if record is not None:
            set_record(self, replace(record, training=mode))


class _BatchAlone(Held, _BatchNorm):
    """Torch's own batch norm, which in train mode is not given its statistics at all."""

    def forward(self, input: Tensor) -> Tensor:
        """As before; the statistics are read in eval mode, and never written."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean = None if self.training else self.running_mean
        var = None if self.training else self.running_var
        batch = self.training or (mean is None and var is None)
        return nn.functional.batch_norm(
            input, mean, var, self.weight, self.bias, batch, 0.0, self.eps
        )


class _OnCopies(Held):
    """Runs the layer's own forward on copies of its statistics.

    That holds them whatever this forward does with them: write in place, assign, pass over
    ``track_running_stats``. Not meant for several threads that run one and the same layer at once.
    """

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse, for torch.jit.script, which asks here, cannot compile such a forward.

        Raises:
            PolicyError: what to do instead.
        """
        raise PolicyError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script. Use torch.jit.trace or "
            f"torch.export.export; or unfreeze first, for what is scripted is not frozen anyway."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before, with the statistics out of reach."""
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


class _KeepStatistics(_OnCopies):
    """Normalises with the batch in train mode, as before, and leaves the statistics alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before; in eval mode nothing but an instance norm writes to its statistics."""
        if self.training or isinstance(self, _InstanceNorm):
            return super().forward(*args, **kwargs)
        return super(_OnCopies, self).forward(*args, **kwargs)


class _ForceEvalInstance(_OnCopies, ForceEval):
    """Forced to eval, for instance norm.

    It uses its running statistics only while it tracks them; and torch 2.10, for one, writes them
    back in eval mode too, rounded.
    """

    __jit_unused_properties__ = ("training", "track_running_stats")

    @property
    def track_running_stats(self) -> bool:
        return True

    @track_running_stats.setter
    def track_running_stats(self, value: bool) -> None:
        self.__dict__["track_running_stats"] = value


def held_class(base: type[nn.Module], policy: Policy) -> type[nn.Module]:
    """The subclass of a norm layer's class that keeps the policy's promise; one for each."""
    behaviour: type[Held] = Held
    if policy.forces_eval:
        behaviour = _ForceEvalInstance if issubclass(base, _InstanceNorm) else ForceEval
    elif policy.holds_statistics:
        behaviour = _BatchAlone if base.forward is _BatchNorm.forward else _KeepStatistics
    return make_class(base, behaviour)


_made: dict[tuple[type, type], type[nn.Module]] = {}


def make_class(base: type[nn.Module], behaviour: type[Swapped]) -> type[nn.Module]:
    """The class that a module of the class `base` gets to behave so; one for each pair."""
    if (base, behaviour) not in _made:
        fused = behaviour.replaces
        name = fused.__name__ if fused else f"{behaviour.prefix}{base.__name__}"
        namespace = {
            # torch.fx and others take a layer for a leaf by the module that its class stands in.
            "__module__": base.__module__,
            "__doc__": fused.__doc__ if fused else base.__doc__,
            "_bnfreeze_base": base,
            "_bnfreeze_behaviour": behaviour,
            **behaviour.members(base),
        }
        bases = (behaviour,) if fused else (behaviour, base)
        made = types.new_class(name, bases, exec_body=lambda body: body.update(namespace))
        # Where two threads were here at once, both take the first one's.
        _made.setdefault((base, behaviour), cast("type[nn.Module]", made))
    return _made[base, behaviour]


def _rebuild(
    base: type[nn.Module],
    behaviour: type[Swapped],
    make: Callable[..., nn.Module],
    args: tuple[Any, ...],
) -> nn.Module:
    layer = make(*args)
    layer.__class__ = make_class(base, behaviour)
    return layer
