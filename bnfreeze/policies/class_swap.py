"""How a frozen layer gets its behaviour: it stays the same object, and its class is swapped.

The new class is a subclass of the layer's own that cannot leave eval (`bnfreeze.policies.eval`) or
whose forward cannot write to the running statistics (`bnfreeze.policies.stats`). Other ways, and
what is wrong with them:

* forward hooks: some tools drop them, and they cannot stop ``model.train()`` from setting the flag;
* methods set on the instance: they cannot be pickled, and in a deepcopy they still belong to the
  original;
* a new module in the layer's place: it breaks aliases, references and optimizer groups.

What the layer was before is stored on it (`FreezeRecord`), so undo is exact,
also after a deepcopy or a save.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import nn

from bnfreeze.policies.record import layer_class, record_of


class Swapped(nn.Module):
    """A module whose class was swapped. It can be copied and pickled like any other."""

    # The class whose forward replaces the module's own; None if the own forward stays.
    replaces: ClassVar[type[nn.Module] | None] = None
    # The new class is named by this and the name of the module's own class. No prefix may end in
    # "Frozen": by that word `norm_layers.is_lookalike` knows the layers of other libraries.
    prefix: ClassVar[str] = "FixedAffine"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not call the user's ``__init_subclass__``: our classes must not enter a registry."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Further attributes of a class that is made from the class `base`."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle cannot find it by name. The layer's own class
        # says how the layer is rebuilt; afterwards its class is swapped again.
        base, kind = layer_class(self), type(self)
        behaviour = kind.__dict__["_bnfreeze_behaviour"]
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        args = tuple(base if arg is kind else arg for arg in args)
        return (_rebuild, (base, behaviour, make, args), *rest)


class FrozenLayer(Swapped):
    """A frozen norm layer: it prints its policy, and a reset leaves alone what is frozen."""

    def extra_repr(self) -> str:
        """As before, and the policy."""
        record = record_of(self)
        frozen = f'frozen="{record.policy}"' if record else ""
        return ", ".join(filter(None, [super().extra_repr(), frozen]))

    def reset_running_stats(self) -> None:
        """As before, unless the statistics are frozen."""
        record = record_of(self)
        if record is None or not record.policy.freezes_statistics:
            super().reset_running_stats()  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """As before, except for what is frozen."""
        record = record_of(self)
        if record is None or not record.policy.freezes_affine:
            super().reset_parameters()  # type: ignore[misc]
        else:
            self.reset_running_stats()


_made: dict[tuple[type, type], type[nn.Module]] = {}


def make_class(base: type[nn.Module], behaviour: type[Swapped]) -> type[nn.Module]:
    """The subclass of `base` with the given behaviour; the same one for the same pair."""
    if (base, behaviour) not in _made:
        fused = behaviour.replaces
        name = fused.__name__ if fused else f"{behaviour.prefix}{base.__name__}"
        namespace = {
            # torch.fx and others decide by the module of a class whether a layer is a leaf.
            "__module__": base.__module__,
            "__doc__": fused.__doc__ if fused else base.__doc__,
            "_bnfreeze_base": base,
            "_bnfreeze_behaviour": behaviour,
            **behaviour.members(base),
        }
        bases = (behaviour,) if fused else (behaviour, base)
        made = types.new_class(name, bases, exec_body=lambda body: body.update(namespace))
        # If two threads come here at once, both take the first one's class.
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
