"""Which blocks of a model get a generated forward, and what each norm layer fuses in them.

Each block with frozen layers inside gets one, from the innermost to the model itself. The blocks
inside become part of the graph where they can be traced: what follows a block's last layer may
stand in the block around it, and one large function frees each value as soon as it is used. Where
it may not run, because a module deep inside has got a hook, say, the block's own forward calls the
next smaller blocks, which have theirs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from bnfreeze.fusion.generated import Forward, Generated, Key, compiled, generate
from bnfreeze.fusion.matching import Fusion, fuse_calls
from bnfreeze.fusion.tracing import UntraceableError, trace, why_not_traced
from bnfreeze.policies.fused import has_hooks, own_activation
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of

_MODES = (True, False)


def survey(model: nn.Module) -> tuple[list[tuple[nn.Module, Generated]], dict[int, Fusion]]:
    """Look at every block of a model; nothing of it is changed.

    Returns:
        The blocks that get generated forwards, with these; and by identity of each norm layer
        under ``fused-act`` or ``folded`` what it fuses.
    """
    records = {m: record for m in model.modules() if (record := record_of(m))}
    walk = _Walk(model, {name for record in records.values() for name in record.traceable})
    if walk.layers:
        walk.visit(model)
    fusing = [m for m, record in records.items() if Policy.FUSED_ACT in record.policy]
    return walk.blocks, {id(m): walk.result(m) for m in fusing}


class _Walk:
    def __init__(self, model: nn.Module, traceable: Collection[str]) -> None:
        self.traceable = traceable
        # The layers that may fuse more than their own activation.
        self.layers = {m for m in model.modules() if _may_fuse_more(m)}
        self.blocks: list[tuple[nn.Module, Generated]] = []
        self.visited: set[nn.Module] = set()
        # By mode the blocks that can be a part of the graph of the block around them.
        self.traced: dict[bool, set[nn.Module]] = {mode: set() for mode in _MODES}
        # By layer and mode what its calls fuse, with the block in whose graph each stands.
        self.calls: dict[tuple[nn.Module, bool], list[tuple[nn.Module, Fusion]]] = {}

    def visit(self, block: nn.Module) -> None:
        """Look at the blocks inside, and then at the block itself."""
        if block in self.visited or block in self.layers:
            return
        self.visited.add(block)
        for child in block.children():
            self.visit(child)
        kind = layer_class(block)
        inside = [m for m in block.modules() if m in self.layers]
        if not inside or kind.forward is nn.Module.forward:
            return
        refused = why_not_traced(block, self.traceable)
        if "forward" in block.__dict__:
            refused = f"a forward is set on the {kind.__name__}"
        forwards: dict[Key, Forward] = {}
        called: set[nn.Module] = set()
        opened: set[nn.Module] = set()
        fuses = False
        for mode in _MODES:
            inner = {m for m in block.modules() if m in self.traced[mode] and not has_hooks(m)}
            found: list[tuple[nn.Module, Fusion]] = []
            why = refused
            # With the blocks inside as parts of its graph; if that fails, without.
            for inlined in () if refused else (inner, set()) if inner else (inner,):
                try:
                    graph, types = trace(block, inlined, mode)
                    nodes = [node for node in graph.nodes if node.op == "call_module"]
                    called |= {block.get_submodule(str(node.target)) for node in nodes}
                    fusions = fuse_calls(graph, block, self.layers, mode)
                    forward = compiled(graph, kind.__name__)
                except UntraceableError as error:
                    why = why or f"{kind.__name__} cannot be traced: {error}"
                    continue
                found, opened = fusions, opened | inlined
                forwards.update(((mode, each), forward) for each in types)
                break
            if not why:
                self.traced[mode].add(block)
            fuses = fuses or any(fusion.fuses for _, fusion in found)
            for layer in inside:
                mine = [fusion for each, fusion in found if each is layer]
                self.record(block, inner if not why else set(), (layer, mode), mine, why)
        if fuses:
            self.blocks.append((block, generate(block, forwards, called - opened)))

    def record(
        self,
        block: nn.Module,
        inlined: set[nn.Module],
        key: tuple[nn.Module, bool],
        found: list[Fusion],
        why: str,
    ) -> None:
        """Remember what a layer fuses in a block, and why that may not be all."""
        # A larger graph has the calls of a smaller one in it.
        known = [
            (b, fusion) for b, fusion in self.calls.get(key, []) if not (found and b in inlined)
        ]
        for fusion in found:
            if fusion.last and has_hooks(block):
                note = "" if fusion.fuses else f"{layer_class(block).__name__} has a hook"
                fusion = replace(fusion, note=note, last=False)
            known.append((block, fusion))
        if why and all(fusion.last for _, fusion in known):
            known.append((block, Fusion(note=why)))
        self.calls[key] = known

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
        if layer not in self.layers:
            return Fusion(own or "", "" if own else "its activation has a hook")
        calls = [fusion for _, fusion in self.calls.get((layer, mode), [])]
        # The block around one that ends in the layer knows better.
        calls = [fusion for fusion in calls if not fusion.last] or calls
        if not calls:
            return Fusion(own or "", "no traced forward calls it")
        most = next((fusion for fusion in calls if fusion.fuses), calls[-1])
        if most.fuses and any(fusion != most for fusion in calls):
            return Fusion(most.fuses, "not each time that it is called")
        return Fusion(most.fuses or own or "", most.note)


def _may_fuse_more(module: nn.Module) -> bool:
    """Whether the layer may fuse more than an activation of its own."""
    record, own = record_of(module), own_activation(module)
    if record is None or not hasattr(module, "_ranks") or own is None:
        return False
    return Policy.FOLDED in record.policy or (not own and Policy.FUSED_ACT in record.policy)
