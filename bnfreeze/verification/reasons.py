"""Causes that follow from the kind of a drift alone. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BY_KIND", "TRACE", "UNKNOWN", "Reason"]


class Reason(NamedTuple):
    """Why something changed: a stable code, a sentence, and what to do about it."""

    code: str
    cause: str
    remedy: str


# The remedy if only a trace would tell more.
TRACE = "Train under guard(model, trace=True): it names the line that writes."
UNKNOWN = Reason("unknown", "The two states do not show the cause.", TRACE)

# Kinds that are their own cause.
BY_KIND: dict[str, Reason] = {
    "dtype": Reason(
        "converted",
        "The tensor was converted, as model.half(), .bfloat16() and .double() do.",
        "Convert first, then freeze and take the snapshot.",
    ),
    "shape": Reason(
        "resized",
        "The tensor was resized or replaced, or this is another model.",
        "Freeze the model in its final form.",
    ),
    "device": Reason(
        "moved",
        "The tensor was moved to another device.",
        "Move first, then take the snapshot; or save it, and verify against the file.",
    ),
    "added": Reason(
        "added",
        "The snapshot does not have this tensor, so it cannot be compared.",
        "Take the snapshot when the model is complete and frozen.",
    ),
    "removed": Reason(
        "removed",
        "No tensor has this name any more.",
        "Take the snapshot of the model in its final form; save all of it.",
    ),
    "aliasing": Reason(
        "retied",
        "Names that had their own memory now share it, or names that shared it do not: an "
        "assignment, a .data, a copy or load_state_dict(assign=True).",
        "Tie weights first, then freeze.",
    ),
    "replaced": Reason(
        "replaced",
        "Something else is registered under its name: load_state_dict(assign=True), an assignment, "
        "register_buffer, or fully_shard.",
        "Optimizers still have the old parameter: replace first, then build the optimizer and "
        "freeze.",
    ),
    "requires-grad": Reason(
        "flag-set",
        "Something set the flag: requires_grad_() on the model or on the parameter.",
        "Set flags first, then freeze.",
    ),
    "optimizer": Reason(
        "regrouped",
        "The optimizer's groups changed: add_param_group, or a parameter was replaced.",
        "Give the optimizer only what trains.",
    ),
    "grad": Reason(
        "grad-left",
        "A backward ran while it required a gradient, or .grad was assigned: the next optimizer "
        "step moves it.",
        "Clear it with .grad = None; freeze(model, optimizer=…) does that.",
    ),
    "unverified": Reason(
        "unverified",
        "A tensor that cannot be compared does not count as unchanged.",
        "Leave it out with a pattern. For sharded tensors, pass process_group=…, and each rank "
        "checks its own shards.",
    ),
}
