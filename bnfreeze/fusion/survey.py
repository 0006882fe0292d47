"""Which blocks of a model get a generated forward, and what each norm layer fuses in them.

Blocks are looked at from the innermost on. If a block's output is a norm layer's, the block is
open: what follows may be in the block around it. That one is traced with the forward of the open
block inlined, and keeps it inlined if the norm layer finds something there. So a generated forward
covers as few modules as it must.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from bnfreeze.fusion.generated import Forward, Generated, Key, compiled, generate
from bnfreeze.fusion.matching import FusedCall, fuse_calls
from bnfreeze.fusion.tracing import UntraceableError, trace, visible, why_not_traced
from bnfreeze.policies.fused import has_hooks, own_activation
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of

__all__ = ["Fusion", "fuses_more", "survey"]

_MODES = (True, False)


@dataclass(frozen=True)
class Fusion:
    """What a norm layer fuses.

    Attributes:
        fuses: what runs in its kernel: an activation (``"relu"``), ``"add"``, ``"add+relu"``, or
            with another norm layer that it is added to ``"affine+add+relu"``; that other layer
            says ``"fused"``. Folded into a convolution it says ``"conv"``, ``"conv+add+relu"``;
            into a linear layer ``"linear"``. Empty if it fuses nothing.
        note: why it fuses nothing, when it does not, or why it is not folded.
    """

    fuses: str
    note: str


def fuses_more(module: nn.Module) -> bool:
    """Whether the module is frozen by a policy that fuses what is around it."""
    record = record_of(module)
    return record is not None and Policy.FUSED_ACT in record.policy


def survey(
    model: nn.Module, traceable: Sequence[str]
) -> tuple[list[tuple[nn.Module, Generated]], dict[int, Fusion]]:
    """Look at every block of a model; nothing of it is changed.

    Args:
        model: the model.
        traceable: full names of classes and packages that may be traced besides the known ones.

    Returns:
        The blocks that get generated forwards, with these; and by identity of each norm layer
        that `fuses_more` what it fuses.
    """
    walk = _Walk(model, traceable)
    if walk.layers:
        walk.visit(model)
    return walk.blocks, {id(m): walk.result(m) for m in model.modules() if fuses_more(m)}


@dataclass
class _Attempt:
    """A block traced in both modes, with some modules inlined.

    Attributes:
        calls: by mode the calls of norm layers, those for lists behind those for tensors.
        forwards: what was generated.
        called: the names of the modules that the graphs call or look up.
    """

    calls: dict[bool, list[FusedCall]] = field(default_factory=dict)
    forwards: dict[Key, Forward] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def fusing(self) -> list[FusedCall]:
        return [call for calls in self.calls.values() for call in calls if call.fuses]


class _Walk:
    def __init__(self, model: nn.Module, traceable: Sequence[str]) -> None:
        self.traceable = traceable
        # The layers that may fuse more than their own activation.
        self.layers = {id(m): m for m in model.modules() if _may_fuse_more(m)}
        # By identity of the layer and mode.
        self.calls: dict[tuple[int, bool], list[FusedCall]] = {}
        self.settled: set[int] = set()
        self.blocks: list[tuple[nn.Module, Generated]] = []
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
        inside = {id(m): m for m in module.modules() if id(m) in self.layers}
        pending = [layer for key, layer in inside.items() if key not in self.settled]
        if pending and layer_class(module).forward is not nn.Module.forward:
            why = why_not_traced(module, self.traceable)
            if "forward" in module.__dict__:
                why = f"a forward is set on the {layer_class(module).__name__}"
            if why:
                refused = [FusedCall(layer, note=why) for layer in pending]
                self.record(module, dict.fromkeys(_MODES, refused))
            else:
                self.look(module, pending)

    def look(self, block: nn.Module, pending: Sequence[nn.Module]) -> None:
        keys = set(map(id, pending))
        inner = [m for m in block.modules() if id(self.open.get(id(m))) in keys]
        attempt = self.attempt(block, inner, pending)
        found = attempt.calls
        gaining = {
            id(call.layer)
            for mode, calls in found.items()
            for call in calls
            if call.fuses and call.fuses not in self.known(call.layer, mode)
        }
        needed = [m for m in inner if id(self.open[id(m)]) in gaining]
        if attempt.fusing() and len(needed) < len(inner):
            dropped = {id(self.open[id(m)]) for m in inner if m not in needed}
            attempt = self.attempt(block, needed, pending)
            found = {
                mode: [
                    *attempt.calls[mode],
                    *(call for call in found[mode] if id(call.layer) in dropped),
                ]
                for mode in _MODES
            }
        if fusing := attempt.fusing():
            passed = [module for call in fusing for module in call.passed]
            looked_into = visible(block, needed, attempt.called)
            self.blocks.append((block, generate(block, attempt.forwards, looked_into, passed)))
        self.record(block, found)

    def known(self, layer: nn.Module, mode: bool) -> list[str]:
        return [call.fuses for call in self.calls.get((id(layer), mode), [])]

    def attempt(
        self, block: nn.Module, inlined: Sequence[nn.Module], pending: Sequence[nn.Module]
    ) -> _Attempt:
        """Generate the block's forwards for both modes; without inlining where that fails."""
        attempt = _Attempt()
        for mode in _MODES:
            refused: list[FusedCall] = []
            for tried in (inlined, ()) if inlined else ((),):
                try:
                    attempt.calls[mode] = [*self.add(attempt, block, tried, mode), *refused]
                    break
                except UntraceableError as error:
                    note = f"{layer_class(block).__name__} cannot be traced: {error}"
                    lost = [self.open[id(m)] for m in tried] or pending
                    refused = [FusedCall(layer, note=note) for layer in lost]
            else:
                attempt.calls[mode] = refused
        return attempt

    def add(
        self, attempt: _Attempt, block: nn.Module, inlined: Sequence[nn.Module], mode: bool
    ) -> list[FusedCall]:
        """Generate the forwards for one mode: for tensors and, if it asks for that, for lists."""
        found: list[FusedCall] = []
        for kind in (Tensor, list):
            try:
                traced = trace(block, inlined, mode, kind)
                nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
                names = {str(node.target) for node in nodes}
                calls = fuse_calls(traced.graph, block, list(self.layers.values()), mode)
                forward = compiled(traced.graph, layer_class(block).__name__)
            except UntraceableError:
                if kind is Tensor:
                    raise
                break
            attempt.called |= names
            found += calls
            for kinds in itertools.product((Tensor, list), repeat=traced.arguments):
                if all(kinds[index] is kind for index in traced.asked):
                    attempt.forwards[mode, kinds] = forward
            if not traced.asked:
                break
        return found

    def record(self, block: nn.Module, found: dict[bool, list[FusedCall]]) -> None:
        """Remember what was found in a block."""
        hooked = f"{layer_class(block).__name__} has a hook" if has_hooks(block) else ""
        seen, last = set(), set()
        for mode, calls in found.items():
            for call in calls:
                if call.last and hooked:
                    call = replace(call, note="" if call.fuses else hooked, last=False)
                self.calls.setdefault((id(call.layer), mode), []).append(call)
                seen.add(id(call.layer))
                if call.last:
                    last.add(id(call.layer))
                    self.open[id(block)] = call.layer
        self.settled |= seen - last

    def result(self, layer: nn.Module) -> Fusion:
        """What all calls of a layer in both modes come to."""
        train, evaluate = (self.in_mode(layer, mode) for mode in _MODES)
        if train.fuses == evaluate.fuses:
            note = train.note or evaluate.note
            return Fusion(train.fuses, note if train.fuses else f"fuses nothing: {note}")
        if not train.fuses:
            return Fusion(evaluate.fuses, f"not in train mode: {train.note}")
        if not evaluate.fuses:
            return Fusion(train.fuses, f"not in eval mode: {evaluate.note}")
        return Fusion(train.fuses, f"in eval mode {evaluate.fuses}")

    def in_mode(self, layer: nn.Module, mode: bool) -> Fusion:
        own = own_activation(layer)
        if id(layer) not in self.layers:
            return Fusion(own or "", "" if own else "its activation has a hook")
        calls = self.calls.get((id(layer), mode), [])
        # The block around an open one knows better.
        calls = [call for call in calls if not call.last] or calls
        if not calls:
            return Fusion(own or "", "no traced forward calls it")
        call = next((call for call in calls if call.fuses), calls[-1])
        if call.fuses and len({(call.fuses, call.note) for call in calls}) > 1:
            return Fusion(call.fuses, "not each time that it is called")
        return Fusion(call.fuses or own or "", call.note)


def _may_fuse_more(module: nn.Module) -> bool:
    """Whether the layer may fuse more than an activation of its own."""
    record, own = record_of(module), own_activation(module)
    if record is None or not hasattr(module, "_ranks") or own is None:
        return False
    return Policy.FOLDED in record.policy or (not own and Policy.FUSED_ACT in record.policy)
