"""The blocks of a model whose forward is generated, so that norm layers fuse what follows them.

A block stays the same object. Its class is swapped, as a norm layer's is, for one that chooses at
each call: the generated forward if nothing has changed since it was made, otherwise the block's
own. Both compute the same. The block's own forward is also what torch.compile, export and tracing
see, and what runs if a hook, a mode or a replaced submodule could tell the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnfreeze.fusion.generated import Generated
from bnfreeze.fusion.matching import Fusion
from bnfreeze.fusion.survey import survey
from bnfreeze.nn.eager import observer
from bnfreeze.norm_layers import NamedModule
from bnfreeze.policies.class_swap import Swapped, make_class
from bnfreeze.policies.fused import has_hooks
from bnfreeze.policies.record import layer_class
from bnfreeze.torch_private import _has_any_global_hook

# Where a block keeps its generated forwards; in place of them an empty dict if it comes out of a
# file, and they have to be generated again.
GENERATED = "_bnfreeze_generated"
_NEVER = Generated({}, [])


class _FusedBlock(Swapped):
    """Runs the block's generated forward if that can make no difference."""

    # Some libraries write the name of a model's class into its checkpoint.
    prefix: ClassVar[str] = ""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)  # tools look at its signature
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not kwargs and not torch.compiler.is_compiling():
                generated = self.__dict__.get(GENERATED, _NEVER)
                if not generated and all(type(each) is Tensor for each in args):
                    generated = _generated_again(self)
                run = generated.choose(self, args) if generated else None
                if run is not None:
                    return run(self, *args)
            # As it is now: it may be set on the class.
            return base.forward(self, *args, **kwargs)

        return {"forward": forward}


def _generated_again(block: nn.Module) -> Generated | None:
    """Generate the forwards of a block that came out of a file, and of those inside, at a call.

    Not as it is read: there a block could not know that one around it comes, and do all for both.
    """
    if observer() or _has_any_global_hook() or getattr(block, "_is_replica", False):  # type: ignore[no-untyped-call]
        return None
    if any(map(has_hooks, block.modules())):
        return None  # They may be gone at a later call.
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("not traced"):
            pass
    except RuntimeError:
        return None  # Activation checkpointing is on; it may be off at a later call.
    blocks, _ = survey(block)
    for each in (m for m in block.modules() if GENERATED in m.__dict__):
        each.__dict__[GENERATED] = _NEVER
    for each, generated in blocks:
        if GENERATED in each.__dict__:
            each.__dict__[GENERATED] = generated
    return block.__dict__[GENERATED]  # type: ignore[no-any-return]


def fuse_blocks(modules: Sequence[NamedModule]) -> dict[int, Fusion]:
    """Generate the forward of every block of a model in which a norm layer can fuse something.

    Args:
        modules: all of the model's, the first one being the model; none has such a forward yet.

    Returns:
        By identity of each norm layer under ``fused-act`` or ``folded`` what it fuses.
    """
    blocks, layers = survey(modules[0].module)
    for block, generated in blocks:
        block.__class__ = make_class(layer_class(block), _FusedBlock)
        block.__dict__[GENERATED] = generated
    return layers


def release(modules: Sequence[NamedModule]) -> None:
    """Give every block its own forward back."""
    for entry in modules:
        if issubclass(type(entry.module), _FusedBlock):
            entry.module.__dict__.pop(GENERATED, None)
            # If something else has derived a class from ours, that has nothing to choose from now.
            entry.module.__class__ = layer_class(entry.module)
