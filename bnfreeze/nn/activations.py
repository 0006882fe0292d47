"""The activations that a frozen layer can compute: one table, and what is derived from it.

To add an activation, change two files:

1. Here: add an entry to `TABLE`. If the module has settings (GELU's ``approximate``), list those
   that the kernel supports in `Activation.settings`; if its function has no ``inplace``, set
   ``in_place=False``.
2. ``cuda/frozen_bn.cu``: add its name in capitals to the end of ``enum Activation``, its formula
   to ``activate`` and its derivative to ``deactivate``, and, if its backward needs the input, its
   name to ``from_input``.

Then run ``tests/nn`` and ``tests/shim``: they take the activations from the table, and compare
each entry with torch and the CUDA source with each entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it


@dataclass(frozen=True)
class Activation:
    """One activation, and all that differs between activations.

    Attributes:
        name: what ``activation=`` takes.
        module: its class in torch.nn.
        functions: the functions that compute it, as they stand in the graph of a traced model.
            Their first argument is the tensor; a second one can only be ``inplace``.
        gradient: takes the gradient of the output, and the output or the input (``from_output``);
            returns the gradient of the input. It is differentiable where autograd records.
        from_output: whether ``gradient`` needs the output. Otherwise it needs the input.
        exact: whether rounding before the activation gives the same result as rounding after it.
        in_place: whether the first function and the module take ``inplace``.
        torch_keeps_output: whether torch's own backward, too, needs the output: then the output
            must not be changed in place, with or without bnfreeze.
        methods: as `functions`, the names of tensor methods.
        settings: attributes of the module that decide what it computes, with the values that they
            must have.
    """

    name: str
    module: type[nn.Module]
    functions: tuple[Callable[..., Tensor], ...]
    gradient: Callable[[Tensor, Tensor], Tensor]
    from_output: bool
    exact: bool
    in_place: bool = True
    torch_keeps_output: bool = False
    methods: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


def _silu_gradient(grad: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)  # type: ignore[no-any-return]
    # ATen's has no derivative.
    sigmoid = z.sigmoid()
    return grad * sigmoid * (1 + z * (1 - sigmoid))


TABLE = (
    Activation(
        name="relu",
        module=nn.ReLU,
        functions=(F.relu, F.relu_, torch.relu, torch.relu_),
        methods=("relu", "relu_"),
        gradient=lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
        from_output=True,
        exact=True,
        torch_keeps_output=True,
    ),
    Activation(
        name="relu6",
        module=nn.ReLU6,
        functions=(F.relu6,),
        gradient=lambda grad, y: torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0),
        from_output=True,
        exact=True,
        # A ReLU6 is a Hardtanh, whose bounds can be changed.
        settings=(("min_val", 0.0), ("max_val", 6.0)),
    ),
    Activation(
        name="silu",
        module=nn.SiLU,
        functions=(F.silu,),
        gradient=_silu_gradient,
        from_output=False,
        exact=False,
    ),
    Activation(
        name="hardswish",
        module=nn.Hardswish,
        functions=(F.hardswish,),
        gradient=lambda grad, z: torch.ops.aten.hardswish_backward(grad, z),
        from_output=False,
        exact=False,
    ),
)


def _callable(entry: Activation) -> Callable[..., Tensor]:
    function = entry.functions[0]
    return function if entry.in_place else lambda z, inplace=False: function(z)


# Derived from the table, for quick access by name. None means no activation. All take ``inplace``;
# one that has no form in place gives a new tensor nevertheless.
ACTIVATIONS: dict[str | None, Callable[..., Tensor]] = {
    None: lambda z, inplace=False: z,
    **{each.name: _callable(each) for each in TABLE},
}
GRADIENTS = {each.name: each.gradient for each in TABLE}
FROM_OUTPUT = frozenset(each.name for each in TABLE if each.from_output)
TORCH_KEEPS_OUTPUT = frozenset(each.name for each in TABLE if each.torch_keeps_output)
FROM_INPUT = frozenset(each.name for each in TABLE if not each.from_output)
EXACT = frozenset({None, *(each.name for each in TABLE if each.exact)})

# What calls an activation in the graph of a traced model: functions, and methods of a tensor.
ACTIVATION_FUNCTIONS: dict[Any, str] = {f: each.name for each in TABLE for f in each.functions}
ACTIVATION_METHODS = {method: each.name for each in TABLE for method in each.methods}

_BY_MODULE: dict[type, Activation] = {each.module: each for each in TABLE}


def settings_of(module: object) -> tuple[tuple[str, Any], ...]:
    """The attributes that decide what this activation computes, and the values they must have.

    Empty for what has none, and for what is not in the table.
    """
    entry = _BY_MODULE.get(type(module))
    return entry.settings if entry is not None else ()


def activation_of(module: object) -> str | None:
    """Return the name of the activation that ``module`` computes; None if it is not in the table.

    Subclasses do not count, for their forward may do something else.
    """
    entry = _BY_MODULE.get(type(module))
    right = all(getattr(module, name) == value for name, value in settings_of(module))
    return entry.name if entry is not None and right else None
