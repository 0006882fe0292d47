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
    activation_of,
)
from bnfreeze.policies.fused import has_hooks, own_activation
from bnfreeze.policies.policy import Policy
from bnfreeze.policies.record import layer_class, record_of

__all__ = ["FusedCall", "fuse_calls"]

# Modules whose output is a new tensor, which they do not keep.
_MAKERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FORWARDS = frozenset(kind.forward for kind in (*_MAKERS, nn.Sequential))
_SUMS = (operator.add, torch.add, IN_PLACE_ADD)


@dataclass(frozen=True)
class FusedCall:
    """One call of a norm layer in a graph.

    Attributes:
        layer: the norm layer.
        fuses: what runs in its kernel or convolution, in the words of `Fusion.fuses`.
        note: why it fuses nothing, or is not folded, as a sentence's end.
        last: whether its output is the block's output, so that something may follow outside.
        passed: the modules on which this rests: they are no longer called, or called in another
            way, or must go on making new tensors.
    """

    layer: nn.Module
    fuses: str = ""
    note: str = ""
    last: bool = False
    passed: tuple[nn.Module, ...] = ()


def fuse_calls(
    graph: fx.Graph, block: nn.Module, layers: Collection[nn.Module], training: bool
) -> list[FusedCall]:
    """Fuse into each call of a norm layer what follows it. The graph is changed.

    Args:
        graph: of the block.
        block: what the graph's names are names in.
        layers: the norm layers whose forward takes a residual and an activation.
        training: the mode for which the graph was made.

    Returns:
        Each call of one of the layers, in the graph's order.
    """
    view = _View(graph, block, {id(layer) for layer in layers}, training)
    chains = {node: _Chain(view, node) for node in view.modules if node in view.norms}
    calls = {node: chain.call for node, chain in chains.items()}
    # Two norm layers may meet in one sum, which only one of them computes: the one that can take
    # the other's place too or is folded, or else the left one.
    sums: dict[fx.Node, list[_Chain]] = {}
    for chain in chains.values():
        if chain.total is not None and chain.call.fuses:
            sums.setdefault(chain.total, []).append(chain)
    for total, rivals in sums.items():
        first = min(
            rivals,
            key=lambda c: (c.branch is None, c.conv is None, c.before is not total.args[0]),
        )
        for other in rivals:
            if other is not first:
                calls[other.norm] = other.without_sum()
        if first.branch is not None:
            branch = view.modules[first.branch]
            calls[first.branch] = FusedCall(branch, "fused", passed=first.call.passed)
    for node, chain in chains.items():
        if calls[node] is chain.call and chain.call.fuses:
            chain.rewrite(graph)
    return list(calls.values())


class _View:
    """What all chains look at: the order of a graph's nodes, the modules that they call."""

    def __init__(self, graph: fx.Graph, block: nn.Module, layers: set[int], training: bool) -> None:
        self.training = training
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.modules = {
            node: block.get_submodule(str(node.target))
            for node in graph.nodes
            if node.op == "call_module"
        }
        self.norms = {node for node, module in self.modules.items() if id(module) in layers}
        # The convolution that each norm layer can be folded into, or why it cannot be.
        self.before = {node: self.convolution(node) for node in self.norms}

    def convolution(self, norm: fx.Node) -> fx.Node | str:
        record = record_of(self.modules[norm])
        if record is None or Policy.FOLDED not in record.policy:
            return ""
        node = norm.args[0] if len(norm.args) == 1 and not norm.kwargs else None
        if not isinstance(node, fx.Node) or node not in self.modules:
            return "not folded: no convolution comes before it"
        module = self.modules[node]
        if why := why_not_folded(module, self.modules[norm]):
            return f"not folded: {why}"
        if len(node.users) > 1 or len(node.args) != 1 or node.kwargs:
            return "not folded: the convolution's output is used elsewhere too"
        return node

    def refuse_hooks(self, node: fx.Node) -> None:
        if node in self.modules and any(map(has_hooks, self.modules[node].modules())):
            raise _End(f"{node.target} has a hook")

    def is_identity(self, node: fx.Node) -> bool:
        """Whether the node returns its one input as it is."""
        module = self.modules.get(node)
        if module is None or len(node.all_input_nodes) != 1:
            return False
        return type(module) is nn.Identity or (not self.training and is_drop(module))

    def name(self, node: fx.Node) -> str:
        """How a person calls what the node does."""
        if node in self.modules:
            return layer_class(self.modules[node]).__name__
        return node.target if isinstance(node.target, str) else node.target.__name__

    def activation(self, node: fx.Node) -> str | None:
        """The name of the activation that the node is, if it is one that can be fused."""
        if set(node.kwargs) - {"inplace"}:
            return None
        if node.op == "call_module" and len(node.args) == 1:
            return activation_of(self.modules[node])
        if node.op == "call_function" and len(node.args) <= 2:  # the second one is inplace
            return ACTIVATION_FUNCTIONS.get(node.target)
        if node.op == "call_method" and len(node.args) == 1:
            return ACTIVATION_METHODS.get(str(node.target))
        return None


class _Chain:
    """A call of a norm layer, and what follows it as far as it can be fused."""

    def __init__(self, view: _View, norm: fx.Node) -> None:
        self.view, self.norm = view, norm
        self.nodes = [norm]  # the nodes that one new node replaces
        self.makers: list[nn.Module] = []  # the modules that must go on making new tensors
        self.total: fx.Node | None = None
        self.before = norm  # the summand that is the norm layer's output
        self.branch: fx.Node | None = None
        self.activation: str | None = None
        self.conv: fx.Node | None = None
        self.own = own_activation(view.modules[norm])
        last, fuses, note = False, "", ""
        try:
            note = self._fold()
            fuses = self._follow()
        except _End as end:
            last, note = end.last, note or str(end)
        self.call = self._called(fuses, note, last)

    def _called(self, fuses: str, note: str = "", last: bool = False) -> FusedCall:
        """What the chain comes to."""
        modules = self.view.modules
        if self.conv is not None:
            kind = "linear" if type(modules[self.conv]) is nn.Linear else "conv"
            fuses, note = "+".join(filter(None, (kind, self.own, fuses))), ""
        replaced = [modules[node] for node in self.nodes if node in modules] if fuses else []
        rests_on = [m for module in (*replaced, *self.makers) for m in module.modules()]
        return FusedCall(modules[self.norm], fuses, note, last, tuple(rests_on))

    def without_sum(self) -> FusedCall:
        """Leave the sum to the other summand's chain."""
        self.total = self.activation = None
        self.nodes = [self.norm] if self.conv is None else [self.conv, self.norm]
        self.call = self._called("", "the other summand fuses the add")
        return self.call

    def _fold(self) -> str:
        """Take the convolution in; return why that cannot be done."""
        if len(self.norm.args) != 1 or self.norm.kwargs:
            raise _End("it is called with more than its input")
        self.view.refuse_hooks(self.norm)
        conv = self.view.before[self.norm]
        if isinstance(conv, str):
            return conv
        try:
            self._check_later(conv, self.norm)
        except _End as end:
            return f"not folded: {end}"
        self.conv = conv
        self.nodes.append(conv)
        return ""

    def _follow(self) -> str:
        if self.own:
            raise _End("its own activation follows")
        node = self._through(self.norm)
        user = _sole_user(node)
        if self._take_activation(user, node):
            return str(self.activation)
        self._take_sum(user, node)
        fuses = "add" if self.branch is None else "affine+add"
        try:
            node = self._through(user)
            if self._take_activation(_sole_user(node), node):
                fuses += f"+{self.activation}"
        except _End:
            pass  # the sum is where it ends
        return fuses

    def _through(self, node: fx.Node) -> fx.Node:
        """Pass the modules that return their input as it is."""
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.args != (node,) or user.kwargs or not self.view.is_identity(user):
                break
            self.view.refuse_hooks(user)
            self.nodes.append(user)
            node = user
        return node

    def _take_activation(self, node: fx.Node, before: fx.Node) -> bool:
        activation = self.view.activation(node)
        if activation is None or node.args[0] is not before:
            return False
        self.view.refuse_hooks(node)
        self._check_backward(node, activation)
        self.activation = activation
        self.nodes.append(node)
        return True

    def _take_sum(self, node: fx.Node, before: fx.Node) -> None:
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not method and not (node.op == "call_function" and node.target in _SUMS):
            raise _End(f"{self.view.name(node)} follows")
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            raise _End("what is added to it is no tensor, or is scaled")
        left, right = node.args
        if left is right:
            raise _End("it is added to itself")
        if _is_in_place(node) and left is not before:
            raise _End("it is added in place onto another tensor")
        self._check_later(self.conv or self.norm, node)
        self.total, self.before = node, before
        self.nodes.append(node)
        self._take_branch()

    def _take_branch(self) -> None:
        """Take the other summand's norm layer in, if it has one that nobody else reads."""
        assert self.total is not None
        node, passed = self._other(), []
        while self.view.is_identity(node) and len(node.users) == 1:
            passed.append(node)
            (node,) = node.all_input_nodes
        if node not in self.view.norms or len(node.users) != 1:
            return
        if self.conv is not None or isinstance(self.view.before[node], fx.Node):
            return
        if len(node.args) != 1 or node.kwargs:
            return
        try:
            for each in (node, *passed):
                self.view.refuse_hooks(each)
            self._check_later(node, self.total)
        except _End:
            return
        self.branch = node
        self.nodes += [node, *passed]

    def _other(self) -> fx.Node:
        """What is added to the norm layer's output."""
        assert self.total is not None
        left, right = self.total.args
        other = right if left is self.before else left
        assert isinstance(other, fx.Node)
        return other

    def _check_later(self, early: fx.Node, late: fx.Node) -> None:
        """Refuse to compute a layer at a later place if its input may change until then."""
        view = self.view
        start, end = view.order[early], view.order[late]
        for node, place in view.order.items():
            if not start < place < end or node.op == "get_attr":
                continue
            if readers := _ends(view.modules.get(node), 0):
                self.makers += readers
            elif node not in view.norms and not view.is_identity(node):
                if self._is_own(early.all_input_nodes[0]):
                    break
                raise _End("its input may be changed before it is computed")

    def _check_backward(self, node: fx.Node, activation: str) -> None:
        """Refuse to keep for backward a tensor that may be changed in place until then."""
        if activation in FROM_OUTPUT:
            # relu by itself keeps its output as well, and relu6 only if it works in place.
            inplace = node.kwargs.get("inplace") or node.args[1:] == (True,)
            inplace = inplace or getattr(self.view.modules.get(node), "inplace", False)
            read = all(_is_maker(self.view.modules.get(user)) for user in node.users)
            if activation == "relu6" and not (inplace or read):
                raise _End("the output of relu6, from which it goes backward, may be changed")
        elif self.total is self.conv is None and not self._is_own(self.norm.all_input_nodes[0]):
            raise _End(f"its input, from which {activation} goes backward, may be changed")

    def _is_own(self, node: fx.Node) -> bool:
        """Whether the value is a new tensor that nobody but its one user has."""
        makers = _ends(self.view.modules.get(node), -1)
        if len(node.users) != 1 or not (makers or node.target is torch.cat):
            return False
        self.makers += makers
        return True

    def rewrite(self, graph: fx.Graph) -> None:
        """Put one node in the place of all of the chain's."""
        nodes = sorted(self.nodes, key=self.view.order.__getitem__)
        # Where the sum was, and not where the activation is: what is added may change in between.
        with graph.inserting_before(self.total or self.norm):
            x = (self.conv or self.norm).args[0]
            if self.conv is None and self.total is None:
                new = graph.call_module(str(self.norm.target), (x, None, self.activation))
            else:
                conv, layer, branch = (
                    node and graph.create_node("get_attr", node.target)
                    for node in (self.conv, self.norm, self.branch)
                )
                residual, in_place, swapped = None, False, False
                if self.total is not None:
                    residual = self._other() if self.branch is None else self.branch.args[0]
                    in_place = _is_in_place(self.total)
                    swapped = self.total.args[0] is not self.before
                args = (layer, x, residual, self.activation, branch, in_place, swapped)
                if conv is None:
                    new = graph.call_function(norm_add, args)
                else:
                    new = graph.call_function(conv_norm_add, (conv, *args))
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            graph.erase_node(node)


def _is_maker(module: nn.Module | None) -> bool:
    """Whether the module only reads its input, and its output is a new tensor."""
    return isinstance(module, _MAKERS) and _is_plain(module)


def _ends(module: nn.Module | None, place: int) -> list[nn.Module]:
    """The module and what is in it first (0) or last (-1), if that is a maker; else nothing."""
    found = [module] if module is not None else []
    while isinstance(module, nn.Sequential) and _is_plain(module) and len(module):
        module = module[place]
        found.append(module)
    return found if _is_maker(module) else []


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class in torch, and nothing else."""
    # A subclass with a forward of its own may return its input.
    return layer_class(module).forward in _FORWARDS and not has_hooks(module)


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
