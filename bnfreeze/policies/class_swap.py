"""How a frozen layer gets its behaviour: it stays the same object, and its class is swapped.

The new class is a subclass of the layer's own that cannot leave eval (`bnfreeze.policies.eval`) or
whose forward cannot write to the running statistics (`bnfreeze.policies.stats`). Alternatives that
were tried, and what is wrong with them:

* forward hooks: some tools drop them, and they cannot stop ``model.train()`` from setting the flag;
* methods set on the instance: after a deepcopy they stay bound to the original, and they cannot be
  pickled;
* a new module in the layer's place: it breaks aliases, references and optimizer groups.

What the layer was is stored on it, as a `bnfreeze.policies.record.Record`. So undo is exact, also
after a deepcopy or a save.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import nn

from bnfreeze.policies.record import layer_class, record_of

__all__ = ["FrozenLayer", "Swapped", "make_class"]


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


class FrozenLayer(Swapped):
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
        if record is None or not record.policy.freezes_statistics:
            super().reset_running_stats()  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """As before, but for what is held."""
        record = record_of(self)
        if record is None or not record.policy.freezes_affine:
            super().reset_parameters()  # type: ignore[misc]
        else:
            self.reset_running_stats()


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
