"""Which blocks of a model get a generated forward, and what each norm layer absorbs in them.

Blocks are looked at from the innermost on. One whose output is a norm layer's, with nothing behind
it, is open: what follows may stand in the block around it. That one is traced with the forward of
the open block inlined, and keeps it inlined if the norm layer finds something there. So a
generated forward reaches across as few modules as it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from bnfreeze.fusion.bytecode import Untraceable
from bnfreeze.fusion.matching import Call, absorb
from bnfreeze.fusion.program import Program, Programs, program
from bnfreeze.fusion.tracing import trace
from bnfreeze.policies.fused import has_hooks, own_activation, takes_more
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of

__all__ = ["Absorption", "Survey", "survey"]


@dataclass(frozen=True)
class Absorption:
    """What a norm layer absorbs, in the words of `LayerRow.absorbs`, and a note on it."""

    absorbs: str
    note: str


@dataclass(frozen=True)
class Survey:
    """What can be absorbed in a model as it is now.

    Attributes:
        programs: the blocks that get a generated forward, with it.
        layers: by identity of the norm layer what it absorbs; all those that the policy
            ``fused-act`` holds.
    """

    programs: list[tuple[nn.Module, Programs]]
    layers: dict[int, Absorption]


def survey(model: nn.Module) -> Survey:
    """Look at every block of a model; nothing of it is changed."""
    walk = _Walk(model)
    if walk.layers:
        walk.visit(model)
    return Survey(
        walk.programs,
        {id(module): walk.result(module) for module in model.modules() if _is_held(module)},
    )


def _is_held(module: nn.Module) -> bool:
    record = record_of(module)
    return record is not None and Policy.FUSED_ACT in record.policy


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        # The layers that may absorb what follows them.
        self.layers = {id(m): m for m in model.modules() if _is_held(m) and takes_more(m)}
        self.calls: dict[int, list[Call]] = {}
        self.settled: set[int] = set()
        self.programs: list[tuple[nn.Module, Programs]] = []
        # By identity the open blocks, and the layer that each ends in.
        self.open: dict[int, nn.Module] = {}
        self.visited: set[int] = set()

    def visit(self, module: nn.Module) -> None:
        """Look at the blocks inside, and then at the block itself."""
        if id(module) in self.visited or id(module) in self.layers:
            return
        self.visited.add(id(module))
        for child in module.children():
            self.visit(child)
        pending = {id(m) for m in module.modules() if id(m) in self.layers} - self.settled
        if pending and layer_class(module).forward is not nn.Module.forward:
            self.look(module, pending)

    def look(self, block: nn.Module, pending: set[int]) -> None:
        inner = [
            m for m in block.modules() if id(m) in self.open and id(self.open[id(m)]) in pending
        ]
        try:
            try:
                calls, programs = self.attempt(block, inner)
            except Untraceable as error:
                if not inner:
                    raise
                self.settle({id(self.open[id(m)]) for m in inner}, _cannot(block, error))
                inner = []
                calls, programs = self.attempt(block, inner)
            absorbing = {id(call.layer) for call in calls if call.absorbs}
            needed = [m for m in inner if id(self.open[id(m)]) in absorbing]
            if absorbing and len(needed) < len(inner):
                final, programs = self.attempt(block, needed)
                told = {id(call.layer) for call in final}
                calls = [*final, *(call for call in calls if id(call.layer) not in told)]
                absorbing = {id(call.layer) for call in final if call.absorbs}
        except Untraceable as error:
            self.settle(pending - self.settled, _cannot(block, error))
            return
        if programs and absorbing:
            self.programs.append((block, programs))
        for call in calls:
            if call.last and not has_hooks(block):
                self.open[id(block)] = call.layer
            else:
                self.settled.add(id(call.layer))
            if call.last and has_hooks(block):
                call = Call(call.layer, note=f"a hook stands on its {layer_class(block).__name__}")
            self.calls.setdefault(id(call.layer), []).append(call)

    def attempt(
        self, block: nn.Module, inlined: Sequence[nn.Module]
    ) -> tuple[list[Call], Programs]:
        """Generate the block's forward for a tensor and, if it asks for that, for a list."""
        traced = trace(block, inlined)
        layers = list(self.layers.values())
        calls = absorb(traced.graph, block, layers)
        programs: list[Program] = [program(block, traced, "tensor", calls)]
        if traced.asked:
            try:
                other = trace(block, inlined, "list")
            except Untraceable:
                pass  # it knows what to do with tensors
            else:
                also = absorb(other.graph, block, layers)
                programs.append(program(block, other, "list", also))
        return calls, Programs(programs)

    def settle(self, layers: set[int], note: str) -> None:
        for key in layers:
            self.calls.setdefault(key, []).append(Call(self.layers[key], note=note))
        self.settled |= layers

    def result(self, layer: nn.Module) -> Absorption:
        """What all calls of a layer come to."""
        if id(layer) not in self.layers:
            own = own_activation(layer)
            return Absorption(own or "", "" if own else "a hook stands on its activation")
        calls = self.calls.get(id(layer), [])
        # The block around an open one knows better.
        calls = [call for call in calls if not call.last] or calls
        if not calls:
            return Absorption("", "absorbs nothing: no block's forward was seen to call it")
        absorbing = [call for call in calls if call.absorbs]
        if not absorbing:
            return Absorption("", f"absorbs nothing: {calls[-1].note}")
        if len({(call.absorbs, call.note) for call in calls}) > 1:
            return Absorption(absorbing[0].absorbs, "not each time that it is called")
        return Absorption(absorbing[0].absorbs, absorbing[0].note)


def _cannot(block: nn.Module, error: Untraceable) -> str:
    return f"{layer_class(block).__name__} cannot be traced: {error}"
