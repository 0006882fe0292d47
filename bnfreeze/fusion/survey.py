"""Which blocks of a model get a generated forward, and what each norm layer fuses in them.

Blocks are looked at from the innermost on. If a block's output is a norm layer's, the block is
open: what follows may be in the block around it. That one is traced with the forward of the open
block inlined, and keeps it inlined if the norm layer finds something there. So a generated forward
covers as few modules as it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from bnfreeze.fusion.generated import Forward, Generated, Key, compiled, generate, keys
from bnfreeze.fusion.matching import FusedCall, fuse_calls
from bnfreeze.fusion.tracing import UntraceableError, trace, visible, why_not_traced
from bnfreeze.policies.fused import has_hooks, own_activation, takes_more
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of

__all__ = ["Fusion", "Survey", "is_fused_act", "survey"]

_MODES = (True, False)


@dataclass(frozen=True)
class Fusion:
    """What a norm layer fuses.

    Attributes:
        fuses: what runs in its kernel: an activation (``"relu"``), ``"add"``, ``"add+relu"``, or
            with another norm layer that it is added to ``"affine+add+relu"``; that other layer
            says ``"fused"``. Empty if nothing does.
        note: why nothing does, or when it does not.
    """

    fuses: str
    note: str


@dataclass(frozen=True)
class Survey:
    """What can be fused in a model as it is now.

    Attributes:
        blocks: the blocks that get generated forwards, with these.
        layers: by identity of each norm layer under the policy ``fused-act`` what it fuses.
    """

    blocks: list[tuple[nn.Module, Generated]]
    layers: dict[int, Fusion]


def survey(model: nn.Module, traceable: Sequence[str]) -> Survey:
    """Look at every block of a model; nothing of it is changed.

    Args:
        model: the model.
        traceable: full names of classes and packages that may be traced besides the known ones.
    """
    walk = _Walk(model, traceable)
    if walk.layers:
        walk.visit(model)
    layers = {id(m): walk.result(m) for m in model.modules() if is_fused_act(m)}
    return Survey(walk.blocks, layers)


def is_fused_act(module: nn.Module) -> bool:
    """Whether the module is frozen by the policy ``fused-act``."""
    record = record_of(module)
    return record is not None and Policy.FUSED_ACT in record.policy


@dataclass
class _Attempt:
    """A block traced in both modes, with some modules inlined.

    Attributes:
        calls: by mode the calls of norm layers, those for lists behind those for tensors.
        forwards: what was generated.
        called: the names of the modules that the graphs call or look up.
        failures: by mode why it could not be traced in it.
    """

    calls: dict[bool, list[FusedCall]] = field(default_factory=dict)
    forwards: dict[Key, Forward] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    failures: dict[bool, UntraceableError] = field(default_factory=dict)

    @property
    def fusing(self) -> set[int]:
        return {id(call.layer) for calls in self.calls.values() for call in calls if call.fuses}


class _Walk:
    def __init__(self, model: nn.Module, traceable: Sequence[str]) -> None:
        self.traceable = traceable
        # The layers that may fuse what follows them.
        self.layers = {id(m): m for m in model.modules() if is_fused_act(m) and takes_more(m)}
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
        pending = {id(m) for m in module.modules() if id(m) in self.layers} - self.settled
        if pending and layer_class(module).forward is not nn.Module.forward:
            why = why_not_traced(module, self.traceable)
            if "forward" in module.__dict__:
                why = f"a forward is set on the {layer_class(module).__name__}"
            if why:
                self.settle(pending, why)
            else:
                self.look(module, pending)

    def look(self, block: nn.Module, pending: set[int]) -> None:
        inner = [
            m for m in block.modules() if id(m) in self.open and id(self.open[id(m)]) in pending
        ]
        try:
            attempt = self.attempt(block, inner)
            found = attempt.calls
            needed = [m for m in inner if id(self.open[id(m)]) in attempt.fusing]
            if attempt.fusing and len(needed) < len(inner):
                # The layers whose blocks are not inlined any more fuse nothing here.
                dropped = {id(self.open[id(m)]) for m in inner if m not in needed}
                inner, attempt = needed, self.attempt(block, needed)
                found = {
                    mode: [
                        *attempt.calls.get(mode, ()),
                        *(call for call in calls if id(call.layer) in dropped),
                    ]
                    for mode, calls in found.items()
                }
        except UntraceableError as error:
            self.settle(pending - self.settled, _cannot(block, error))
            return
        if attempt.fusing:
            self.blocks.append((block, _generated(block, inner, attempt)))
        self.note(block, found, attempt.failures)

    def attempt(self, block: nn.Module, inlined: Sequence[nn.Module]) -> _Attempt:
        """Generate the block's forwards for both modes; without inlining where that fails."""
        attempt = _Attempt()
        for mode in _MODES:
            try:
                try:
                    self.add(attempt, block, inlined, mode)
                except UntraceableError as error:
                    if not inlined:
                        raise
                    self.add(attempt, block, (), mode)
                    lost = [self.open[id(module)] for module in inlined]
                    attempt.calls[mode] += [
                        FusedCall(each, note=_cannot(block, error)) for each in lost
                    ]
            except UntraceableError as error:
                attempt.failures[mode] = error
        if not attempt.forwards:
            raise attempt.failures[True]
        return attempt

    def add(
        self, attempt: _Attempt, block: nn.Module, inlined: Sequence[nn.Module], mode: bool
    ) -> None:
        """Generate the forwards for one mode: for tensors and, if it asks for that, for lists."""
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
                return
            attempt.called |= names
            attempt.calls[mode] = [*attempt.calls.get(mode, ()), *calls]
            attempt.forwards |= dict.fromkeys(keys(traced, mode, kind), forward)
            if not traced.asked:
                return

    def note(
        self,
        block: nn.Module,
        found: dict[bool, list[FusedCall]],
        failures: dict[bool, UntraceableError],
    ) -> None:
        """Remember what was found in a block."""
        seen = {id(call.layer): call.layer for calls in found.values() for call in calls}
        last = {id(call.layer) for calls in found.values() for call in calls if call.last}
        for mode, error in failures.items():
            found = {
                **found,
                mode: [FusedCall(layer, note=_cannot(block, error)) for layer in seen.values()],
            }
        if last and has_hooks(block):
            note = f"{layer_class(block).__name__} has a hook"
            found = {
                mode: [FusedCall(c.layer, note=note) if c.last else c for c in calls]
                for mode, calls in found.items()
            }
            last = set()
        for mode, calls in found.items():
            for call in calls:
                self.calls.setdefault((id(call.layer), mode), []).append(call)
        self.open |= {id(block): seen[key] for key in last}
        self.settled |= seen.keys() - last

    def settle(self, layers: set[int], note: str) -> None:
        for key in layers:
            for mode in _MODES:
                self.calls.setdefault((key, mode), []).append(
                    FusedCall(self.layers[key], note=note)
                )
        self.settled |= layers

    def result(self, layer: nn.Module) -> Fusion:
        """What all calls of a layer in both modes come to."""
        if id(layer) not in self.layers:
            own = own_activation(layer)
            return Fusion(own or "", "" if own else "its activation has a hook")
        train, evaluate = (self._in_mode(layer, mode) for mode in _MODES)
        if train.fuses == evaluate.fuses:
            note = train.note or evaluate.note
            return Fusion(train.fuses, note if train.fuses else f"fuses nothing: {note}")
        if not train.fuses:
            return Fusion(evaluate.fuses, f"not in train mode: {train.note}")
        if not evaluate.fuses:
            return Fusion(train.fuses, f"not in eval mode: {evaluate.note}")
        return Fusion(train.fuses, f"in eval mode {evaluate.fuses}")

    def _in_mode(self, layer: nn.Module, mode: bool) -> Fusion:
        calls = self.calls.get((id(layer), mode), [])
        # The block around an open one knows better.
        calls = [call for call in calls if not call.last] or calls
        if not calls:
            return Fusion("", "no traced forward calls it")
        fusing = [call for call in calls if call.fuses]
        if not fusing:
            return Fusion("", calls[-1].note)
        if len({(call.fuses, call.note) for call in calls}) > 1:
            return Fusion(fusing[0].fuses, "not each time that it is called")
        return Fusion(fusing[0].fuses, fusing[0].note)


def _generated(block: nn.Module, inlined: Sequence[nn.Module], attempt: _Attempt) -> Generated:
    calls = [call for calls in attempt.calls.values() for call in calls if call.fuses]
    passed = [module for call in calls for module in call.passed]
    looked_into = visible(block, inlined, attempt.called)
    return generate(block, attempt.forwards, looked_into, passed)


def _cannot(block: nn.Module, error: UntraceableError) -> str:
    return f"{layer_class(block).__name__} cannot be traced: {error}"
