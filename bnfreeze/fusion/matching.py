"""What follows each frozen norm layer in a block's graph, and the graph that computes it along.

Nothing here knows where a graph comes from, or what becomes of it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain as concat
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from torch.nn.modules.conv import _ConvNd

from bnfreeze.fusion.sums import is_drop, norm_add
from bnfreeze.fusion.tracing import IN_PLACE_ADD
from bnfreeze.fusion.vouching import is_known
from bnfreeze.nn.reference import FROM_OUTPUT
from bnfreeze.policies.fused import activation_of, has_hooks
from bnfreeze.policies.record import layer_class

__all__ = ["Call", "absorb"]

_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu"}
_COPIES = (_ConvNd, nn.Linear)
_SUMS = (operator.add, torch.add, IN_PLACE_ADD)


@dataclass(frozen=True)
class Call:
    """One call of a norm layer in a graph.

    Attributes:
        layer: the norm layer.
        absorbs: what it computes along, in the words of `LayerRow.absorbs`.
        note: why it absorbs nothing, or not always, as a sentence's end.
        last: whether its output is the block's output, so that something may follow outside.
        passed: the modules that are not called any more, that give other tensors than before, or
            of which it matters that they give new ones.
    """

    layer: nn.Module
    absorbs: str = ""
    note: str = ""
    last: bool = False
    passed: tuple[nn.Module, ...] = ()


def absorb(graph: fx.Graph, block: nn.Module, layers: Collection[nn.Module]) -> list[Call]:
    """Let the calls of norm layers compute what follows them; the graph is changed.

    Args:
        graph: of the block.
        block: what the graph's names are names in.
        layers: the norm layers that may absorb: their forward takes a residual and an activation.

    Returns:
        Each call of one of the layers, in the graph's order.
    """
    wanted = {id(layer) for layer in layers}
    view = _View(
        {node: index for index, node in enumerate(graph.nodes)},
        {n: block.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"},
    )
    view.norms.update(node for node, module in view.modules.items() if id(module) in wanted)
    chains = {node: _Chain(view, node) for node in view.modules if node in view.norms}
    calls = {node: chain.call for node, chain in chains.items()}
    # Two norm layers may meet in one sum, which only one of them computes: the one that can take
    # the other's place too, or else the left one.
    sums: dict[fx.Node, list[_Chain]] = {}
    for chain in chains.values():
        if chain.total is not None and chain.call.absorbs:
            sums.setdefault(chain.total, []).append(chain)
    for total, rivals in sums.items():
        first = min(rivals, key=lambda c: (c.branch is None, c.before is not total.args[0]))
        for other in rivals:
            if other is not first:
                calls[other.norm] = Call(other.call.layer, note="the layer it is added to absorbs")
        if first.branch is not None:
            branch = view.modules[first.branch]
            calls[first.branch] = Call(branch, "absorbed", passed=first.call.passed)
    for node, chain in chains.items():
        if calls[node] is chain.call and chain.call.absorbs:
            chain.rewrite(graph)
    return list(calls.values())


class _View:
    """What all chains look at: the order of a graph's nodes, the modules that they call."""

    def __init__(self, order: dict[fx.Node, int], modules: dict[fx.Node, nn.Module]) -> None:
        self.order, self.modules = order, modules
        self.norms: set[fx.Node] = set()
        # The modules that were taken to make new tensors, and must go on doing so.
        self.makers: list[nn.Module] = []

    def refuse_hooks(self, node: fx.Node) -> None:
        if node in self.modules and any(map(has_hooks, self.modules[node].modules())):
            raise _End(f"a hook stands on {node.target}")

    def is_identity(self, node: fx.Node) -> bool:
        return type(self.modules.get(node)) is nn.Identity and len(node.all_input_nodes) == 1

    def check_later(self, norm: fx.Node, total: fx.Node) -> None:
        """Refuse to compute a norm layer later than it was, if its input may change until then."""
        if any(n.op == "get_attr" and _owner(n) == norm.target for n in self.order):
            raise _End("its own tensors are used besides")
        start, end = self.order[norm], self.order[total]
        for node, place in self.order.items():
            harmless = node in self.norms or node.op == "get_attr" or self.is_identity(node)
            if start < place < end and not (harmless or self.is_drop(node)):
                if self.is_own(norm.all_input_nodes[0]):
                    break
                raise _End("its input may be changed before the sum is computed")

    def check_draws(self, drop: fx.Node, total: fx.Node) -> None:
        """Refuse to drop later than it was, if random numbers may be drawn until then."""
        for node, place in self.order.items():
            harmless = node in self.norms or node.op == "get_attr" or self.is_identity(node)
            if self.order[drop] < place < self.order[total] and not harmless:
                raise _End(f"{self.name(drop)} follows, and what may draw random numbers too")

    def is_own(self, node: fx.Node) -> bool:
        """Whether the value is a new tensor that nobody but its one user has."""
        module = self.modules.get(node)
        if len(node.users) != 1 or not (node.target is torch.cat or _is_new(module)):
            return False
        if module is not None:
            self.makers.extend(module.modules())
        return True

    def check_backward(self, norm: fx.Node | None, node: fx.Node, activation: str) -> None:
        """Refuse to keep a tensor for backward that may be changed in place until then.

        Args:
            norm: the call whose input is kept for the activation, if its sum is not.
            node: the activation's.
            activation: its name.
        """
        if activation in FROM_OUTPUT:
            # relu by itself keeps its output as well, and relu6 only if it works in place.
            inplace = node.kwargs.get("inplace") or node.args[1:] == (True,)
            inplace = inplace or getattr(self.modules.get(node), "inplace", False)
            read = all(_copies(self.modules.get(user)) for user in node.users)
            if activation == "relu6" and not (inplace or read):
                raise _End("the output of relu6, from which it goes backward, may be changed")
        elif norm is not None and not self.is_own(norm.all_input_nodes[0]):
            raise _End(f"its input, from which {activation} goes backward, may be changed")

    def is_drop(self, node: fx.Node) -> bool:
        return node in self.modules and is_drop(self.modules[node])

    def name(self, node: fx.Node) -> str:
        """How a person calls what the node does."""
        if node in self.modules:
            return layer_class(self.modules[node]).__name__
        return node.target if isinstance(node.target, str) else node.target.__name__

    def activation(self, node: fx.Node) -> str | None:
        """The name of the activation that the node is, if it is one that can be absorbed."""
        if set(node.kwargs) - {"inplace"}:
            return None
        if node.op == "call_module" and len(node.args) == 1:
            return activation_of(self.modules[node])
        if node.op == "call_function" and len(node.args) <= 2:  # the second one is inplace
            return _ACTIVATION_FUNCTIONS.get(node.target)
        if node.op == "call_method" and len(node.args) == 1:
            return _ACTIVATION_METHODS.get(str(node.target))
        return None


class _Chain:
    """A call of a norm layer, and what follows it as far as it can be absorbed."""

    def __init__(self, view: _View, norm: fx.Node) -> None:
        self.view, self.norm = view, norm
        view.makers.clear()
        self.nodes = [norm]  # what one new node takes the place of
        self.drop: fx.Node | None = None
        self.total: fx.Node | None = None
        self.before = norm  # the summand that is the norm layer's output
        self.branch: fx.Node | None = None
        self.activation: str | None = None
        layer = view.modules[norm]
        try:
            absorbs, note = self._follow()
        except _End as end:
            self.call = Call(layer, note=str(end), last=end.last)
        else:
            passed = [view.modules[node].modules() for node in self.nodes if node in view.modules]
            rests = (*concat.from_iterable(passed), *view.makers)
            self.call = Call(layer, absorbs, note, passed=rests)

    def _follow(self) -> tuple[str, str]:
        if len(self.norm.args) != 1 or self.norm.kwargs:
            raise _End("it is called with more than its input")
        self.view.refuse_hooks(self.norm)
        node = self._through(self.norm)
        user = _sole_user(node)
        if self.drop is None and self._take_activation(user, node):
            return str(self.activation), ""
        self._take_sum(user, node)
        absorbs = "add" if self.branch is None else "affine+add"
        try:
            node = self._through(user)
            if self._take_activation(_sole_user(node), node):
                absorbs += f"+{self.activation}"
        except _End:
            pass  # the sum is where it ends
        if self.drop is None:
            return absorbs, ""
        return absorbs, f"not in train mode, where {self.view.name(self.drop)} stands between"

    def _through(self, node: fx.Node) -> fx.Node:
        """Pass by what gives back what it is given; before the sum, also by what drops."""
        passed = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.args != (node,) or user.kwargs:
                break
            if self.view.is_drop(user) and self.total is None and self.drop is None:
                self.drop = user
            elif not self.view.is_identity(user):
                break
            self.view.refuse_hooks(user)
            passed.append(user)
            node = user
        self.nodes += passed
        return node

    def _take_activation(self, node: fx.Node, before: fx.Node) -> bool:
        activation = self.view.activation(node)
        if activation is None or node.args[0] is not before:
            return False
        self.view.refuse_hooks(node)
        self.view.check_backward(self.norm if self.total is None else None, node, activation)
        self.activation = activation
        self.nodes.append(node)
        return True

    def _take_sum(self, node: fx.Node, before: fx.Node) -> None:
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not method and not (node.op == "call_function" and node.target in _SUMS):
            raise _End(f"{self.view.name(self.drop or node)} follows")
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            raise _End("what is added to it is no tensor, or is scaled")
        left, right = node.args
        if left is right:
            raise _End("it is added to itself")
        if _is_in_place(node) and left is not before:
            raise _End("it is added in place onto another tensor")
        self.view.check_later(self.norm, node)
        if self.drop is not None:
            self.view.check_draws(self.drop, node)
        self.total, self.before = node, before
        self.nodes.append(node)
        self._take_branch()

    def _take_branch(self) -> None:
        """Take the other summand's norm layer in, if it has one that nobody else looks at."""
        assert self.total is not None
        node, passed = self._other(), []
        while self.view.is_identity(node) and len(node.users) == 1:
            passed.append(node)
            (node,) = node.all_input_nodes
        if node not in self.view.norms or len(node.users) != 1:
            return
        if len(node.args) != 1 or node.kwargs:
            return
        try:
            for each in (node, *passed):
                self.view.refuse_hooks(each)
            self.view.check_later(node, self.total)
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

    def rewrite(self, graph: fx.Graph) -> None:
        """Put one node in the place of all of the chain's."""
        nodes = sorted(self.nodes, key=self.view.order.__getitem__)
        # Where the sum was, and not where the activation is: what is added may change in between.
        with graph.inserting_before(self.total or self.norm):
            x = self.norm.args[0]
            if self.total is None:
                new = graph.call_module(str(self.norm.target), (x, None, self.activation))
            else:
                layer, branch, drop = (
                    node and graph.create_node("get_attr", node.target)
                    for node in (self.norm, self.branch, self.drop)
                )
                residual = self._other() if self.branch is None else self.branch.args[0]
                in_place = _is_in_place(self.total)
                swapped = self.total.args[0] is not self.before
                args = (layer, x, residual, self.activation, branch, drop, in_place, swapped)
                new = graph.call_function(norm_add, args)
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            graph.erase_node(node)


def _is_new(module: Any) -> bool:
    """Whether the module's output is a new tensor, which it keeps no hold of."""
    while isinstance(module, nn.Sequential) and len(module) and not has_hooks(module):
        if layer_class(module).forward is not nn.Sequential.forward:
            return False
        module = module[-1]
    return _copies(module) and not has_hooks(module)


def _copies(module: nn.Module | None) -> bool:
    """Whether the module reads its input only, and makes a new tensor."""
    # A subclass of one's own may pass its input on.
    owner = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), object)
    return isinstance(module, _COPIES) and is_known(owner)


def _owner(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0]


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
    """Why nothing is absorbed from here on."""

    def __init__(self, why: str, last: bool = False) -> None:
        super().__init__(why)
        self.last = last
