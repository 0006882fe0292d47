"""What follows each frozen norm layer in a block's graph, and the graph with these steps fused.

Nothing here knows where a graph comes from, or what becomes of it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn

from bnfreeze.fusion.folded import conv_norm_add, why_not_folded
from bnfreeze.fusion.sums import is_drop, norm_add
from bnfreeze.fusion.tracing import IN_PLACE_ADD
from bnfreeze.nn.activations import (
    ACTIVATION_FUNCTIONS,
    ACTIVATION_METHODS,
    FROM_OUTPUT,
    TORCH_KEEPS_OUTPUT,
    activation_of,
)
from bnfreeze.policies.fused import has_hooks, own_activation
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of

# Modules whose output is a new tensor, which they do not keep.
_MAKERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FORWARDS = frozenset(kind.forward for kind in (*_MAKERS, nn.Sequential))
_SUMS = (operator.add, torch.add, IN_PLACE_ADD)


@dataclass(frozen=True)
class Fusion:
    """What a norm layer fuses.

    Attributes:
        fuses: what runs in its kernel: an activation (``"relu"``), ``"add"``, ``"add+relu"``, or
            with another norm layer that it is added to ``"affine+add+relu"``; that other layer
            says ``"fused"``. Folded into a convolution it says ``"conv"``, ``"conv+add+relu"``;
            into a linear layer ``"linear"``. Empty if it fuses nothing.
        note: why it fuses nothing, when it does not, or why it is not folded.
        last: whether its output is the block's output, so that something may follow outside.
    """

    fuses: str = ""
    note: str = ""
    last: bool = False


def fuse_calls(
    graph: fx.Graph, block: nn.Module, layers: Collection[nn.Module], training: bool
) -> list[tuple[nn.Module, Fusion]]:
    """Fuse into each call of a norm layer what follows it. The graph is changed.

    Args:
        graph: of the block.
        block: what the graph's names are names in.
        layers: the norm layers whose forward takes a residual and an activation.
        training: the mode for which the graph was made.

    Returns:
        Each call of one of the layers, in the graph's order, and what is fused into it.
    """
    for node in graph.nodes:
        # Pass over modules that return their input as it is.
        if node.op == "call_module" and node.all_input_nodes == [*node.args]:
            module = block.get_submodule(str(node.target))
            identity = type(module) is nn.Identity or (not training and is_drop(module))
            if identity and _is_plain_call(node) and not has_hooks(module):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
    view = _View(graph, block, layers)
    chains = {norm: _Chain(view, norm) for norm in view.before}
    # Two norm layers may meet in one sum, which only one of them computes: the one that is folded,
    # or else the left one, which can take the other's place too.
    sums: dict[fx.Node, list[_Chain]] = {}
    for chain in chains.values():
        if chain.total is not None:
            sums.setdefault(chain.total, []).append(chain)
    for total, rivals in sums.items():
        rivals.sort(key=lambda chain: (chain.conv is None, chain.norm is not total.args[0]))
        for chain in rivals[1:]:
            chain.total = chain.branch = chain.activation = None
            chain.note = "the other summand fuses the add"
    branches = {chain.branch for chain in chains.values()}
    found: list[tuple[nn.Module, Fusion]] = []
    for norm, chain in chains.items():
        fusion = Fusion("fused") if norm in branches else chain.result()
        if fusion.fuses and norm not in branches:
            chain.rewrite(graph)
        found.append((view.modules[norm], fusion))
    return found


class _View:
    """What all chains look at: the order of a graph's nodes, the modules that they call."""

    def __init__(self, graph: fx.Graph, block: nn.Module, layers: Collection[nn.Module]) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.modules = {
            node: block.get_submodule(str(node.target))
            for node in self.nodes
            if node.op == "call_module"
        }
        # The convolution that each norm layer can be folded into, or why it cannot be.
        self.before: dict[fx.Node, fx.Node | str] = {
            node: "" for node, module in self.modules.items() if module in layers
        }
        for norm in self.before:
            self.before[norm] = self.convolution(norm)

    def convolution(self, norm: fx.Node) -> fx.Node | str:
        record = record_of(self.modules[norm])
        if record is None or Policy.FOLDED not in record.policy:
            return ""
        node = norm.args[0] if _is_plain_call(norm) else None
        if not isinstance(node, fx.Node) or node not in self.modules:
            return "not folded: no convolution comes before it"
        if why := why_not_folded(self.modules[node], self.modules[norm]):
            return f"not folded: {why}"
        if len(node.users) > 1 or not _is_plain_call(node):
            return "not folded: the convolution's output is used elsewhere too"
        try:
            self.check_later(node, norm)
        except _End as end:
            return f"not folded: {end}"
        return node

    def check_hooks(self, node: fx.Node) -> None:
        if node in self.modules and any(map(has_hooks, self.modules[node].modules())):
            raise _End(f"{node.target} has a hook")

    def check_later(self, early: fx.Node, late: fx.Node) -> None:
        """Refuse to compute a layer at a later place if its input may change until then."""
        for node in self.nodes[self.order[early] + 1 : self.order[late]]:
            reads = node.op == "get_attr" or node in self.before or self.is_maker(node, 0)
            if not reads and not self.is_new(early.all_input_nodes[0]):
                raise _End("its input may be changed before it is computed")

    def is_maker(self, node: fx.Node, place: int = -1) -> bool:
        """Whether the module that the node calls is a maker, or has one first (0) or last (-1)."""
        module = self.modules.get(node)
        while isinstance(module, nn.Sequential) and _is_plain(module) and len(module):
            module = module[place]
        # A subclass with a forward of its own may return its input.
        return isinstance(module, _MAKERS) and _is_plain(module)

    def is_new(self, node: fx.Node) -> bool:
        """Whether the value is a new tensor that nobody but its one user has."""
        return len(node.users) == 1 and (self.is_maker(node) or node.target is torch.cat)

    def name(self, node: fx.Node) -> str:
        """How a person calls what the node does."""
        if node in self.modules:
            return layer_class(self.modules[node]).__name__
        return node.target if isinstance(node.target, str) else node.target.__name__

    def activation(self, node: fx.Node | None) -> str | None:
        """The name of the activation that the node is, if it is one that can be fused."""
        if node is None or set(node.kwargs) - {"inplace"}:
            return None
        if node.op == "call_module" and len(node.args) == 1:
            return activation_of(self.modules[node])
        if node.op == "call_function" and len(node.args) <= 2:  # the second one is inplace
            return ACTIVATION_FUNCTIONS.get(node.target)
        if node.op == "call_method" and len(node.args) == 1:
            return ACTIVATION_METHODS.get(str(node.target))
        return None


class _Chain:
    """A call of a norm layer, and what follows it as far as it can be fused.

    Attributes:
        norm: the call.
        conv: the convolution that the layer is folded into.
        total: the sum.
        branch: the norm layer of the other summand, if its place is taken too.
        activation: what follows last.
        note: why there is not more.
        last: whether it is at the end of the block.
    """

    def __init__(self, view: _View, norm: fx.Node) -> None:
        self.view, self.norm = view, norm
        self.conv: fx.Node | None = None
        self.total: fx.Node | None = None
        self.branch: fx.Node | None = None
        self.activation: fx.Node | None = None
        self.own = own_activation(view.modules[norm])
        self.note, self.last = "", False
        try:
            self._follow()
        except _End as end:
            if self.total is None:
                self.last, self.note = end.last, self.note or str(end)

    def result(self) -> Fusion:
        """What it comes to."""
        parts: list[str | None] = []
        if self.conv is not None:
            linear = type(self.view.modules[self.conv]) is nn.Linear
            parts += ["linear" if linear else "conv", self.own]
        parts += ["affine"] if self.branch is not None else []
        parts += ["add"] if self.total is not None else []
        parts.append(self.view.activation(self.activation))
        note = self.note if self.conv is None else ""
        return Fusion("+".join(filter(None, parts)), note, self.last)

    def _follow(self) -> None:
        if not _is_plain_call(self.norm):
            raise _End("it is called with more than its input")
        self.view.check_hooks(self.norm)
        conv = self.view.before[self.norm]
        if isinstance(conv, fx.Node):
            self.conv = conv
        else:
            self.note = conv
        if self.own:
            raise _End("its own activation follows")
        user = _sole_user(self.norm)
        if self._take_activation(user, self.norm):
            return
        self._take_sum(user)
        self._take_activation(_sole_user(user), user)

    def _take_activation(self, node: fx.Node, before: fx.Node) -> bool:
        activation = self.view.activation(node)
        if activation is None or node.args[0] is not before:
            return False
        self.view.check_hooks(node)
        self._check_backward(node, activation)
        self.activation = node
        return True

    def _take_sum(self, node: fx.Node) -> None:
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not method and not (node.op == "call_function" and node.target in _SUMS):
            self.view.check_hooks(node)
            raise _End(f"{self.view.name(node)} follows")
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            raise _End("what is added to it is no tensor, or is scaled")
        left, right = node.args
        if left is right:
            raise _End("it is added to itself")
        if _is_in_place(node) and left is not self.norm:
            raise _End("it is added in place onto another tensor")
        self.view.check_later(self.conv or self.norm, node)
        self.total = node
        # Take the other summand's norm layer in, if it has one that nobody else reads.
        other = right if left is self.norm else left
        assert isinstance(other, fx.Node)
        foldable = self.conv is not None or isinstance(self.view.before.get(other), fx.Node)
        if other not in self.view.before or foldable or len(other.users) != 1:
            return
        if _is_plain_call(other):
            try:
                self.view.check_hooks(other)
                self.view.check_later(other, node)
            except _End:
                return
            self.branch = other

    def _check_backward(self, node: fx.Node, activation: str) -> None:
        """Refuse to keep for backward a tensor that may be changed in place until then."""
        if activation in FROM_OUTPUT:
            # torch keeps relu's output as well, but relu6's only if it works in place.
            inplace = node.kwargs.get("inplace") or node.args[1:] == (True,)
            inplace = inplace or getattr(self.view.modules.get(node), "inplace", False)
            read = all(self.view.is_maker(user, 0) for user in node.users)
            if activation not in TORCH_KEEPS_OUTPUT and not (inplace or read):
                raise _End(f"the output of {activation}, kept for backward, may be changed")
        elif self.total is self.conv is None and not self.view.is_new(self.norm.all_input_nodes[0]):
            raise _End(f"its input, from which {activation} goes backward, may be changed")

    def rewrite(self, graph: fx.Graph) -> None:
        """Put one node in the place of all of the chain's."""
        first, total = self.conv or self.norm, self.total
        parts = self.conv, self.norm, self.branch, total, self.activation
        nodes = sorted((node for node in parts if node), key=self.view.order.__getitem__)
        activation = self.view.activation(self.activation)
        # Where the sum was, and not where the activation is: what is added may change in between.
        with graph.inserting_before(total or self.norm):
            if first is self.norm and total is None:
                args = first.args[0], None, activation
                new = graph.call_module(str(first.target), args)
            else:
                conv, layer, branch = (
                    node and graph.create_node("get_attr", node.target)
                    for node in (self.conv, self.norm, self.branch)
                )
                residual = None
                if total is not None:
                    residual = total.args[1 if total.args[0] is self.norm else 0]
                    residual = residual if self.branch is None else self.branch.args[0]
                in_place = total is not None and _is_in_place(total)
                swapped = total is not None and total.args[0] is not self.norm
                rest = layer, first.args[0], residual, activation, in_place, swapped
                if conv is not None:
                    new = graph.call_function(conv_norm_add, (conv, *rest))
                else:
                    new = graph.call_function(norm_add, (*rest, branch))
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            graph.erase_node(node)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class in torch, and nothing else."""
    return layer_class(module).forward in _FORWARDS and not has_hooks(module)


def _is_plain_call(node: fx.Node) -> bool:
    """Whether a module is called with one argument."""
    return len(node.args) == 1 and not node.kwargs


def _sole_user(node: fx.Node) -> fx.Node:
    if not node.users:
        raise _End("its output is not used")
    if len(node.users) > 1:
        raise _End("its output is used elsewhere too")
    user = next(iter(node.users))
    if user.op == "output":
        raise _End("nothing follows it", last=user.args[0] is node)
    return user


def _is_in_place(node: fx.Node) -> bool:
    return node.target in (IN_PLACE_ADD, "add_")


class _End(Exception):  # noqa: N818 - an answer, not a failure
    """Why nothing is fused from here on."""

    def __init__(self, why: str, last: bool = False) -> None:
        super().__init__(why)
        self.last = last
