"""The causes that are known: for each code a sentence, and what to do. Needs no torch."""

from __future__ import annotations

from dataclasses import replace

from bnfreeze.verification.drift import Drift

__all__ = ["TRACE", "because"]

# The remedy if only a trace would tell more.
TRACE = "Train under guard(model, trace=True): it names the line that writes."
_FREEZE = 'Use freeze(model, "eval").'
_CLEAR_GRAD = (
    "Clear it with .grad = None; freeze(model, optimizer=…) does that. If it comes back, leave the "
    "parameter out of the optimizer."
)

# A kind of drift that is its own cause has its own name here.
_REASONS = {
    # Values.
    "reset": (
        "Every mean of the layer is 0 and every variance is 1: reset_running_stats(), a new "
        "initialisation, or a tool that assigns new ones (Lightning's StochasticWeightAveraging).",
        'Use freeze(model, "fused"): a frozen layer refuses a reset, and tools do not find it.',
    ),
    "thawed": (
        "The layer was frozen by policy {was!r}, and is now a {kind} with policy {now!r}: "
        "unfreeze() was called, or something replaced the layer.",
        "Freeze it again, or unfreeze after the check.",
    ),
    "forward-in-training": ("{sentences}", _FREEZE),
    "other-tensor": (
        "Another tensor has its name now: load_state_dict(assign=True), an assignment, or a "
        "conversion there and back, as half() and float().",
        "Copy into the existing tensor, or convert, before freezing.",
    ),
    "other-storage": (
        "Its storage was replaced: something assigned to .data, or moved the tensor.",
        "Do not assign to .data of a frozen tensor.",
    ),
    "trained": (
        "Its requires_grad is True{where}: it trains.",
        'Freeze it, too: with "affine" in the policy, such as "eval+affine", or with "weights" for '
        "what is not a norm layer.",
    ),
    "affine-thawed": (
        "Policy {policy!r} froze it, but its requires_grad is True again{where}: it trains.",
        "Call freeze again, with the same policy, after whatever sets the flag. Often that is "
        "requires_grad_(True) on the whole model.",
    ),
    "leftover-grad": (
        "Its requires_grad is False, but it has a {grad} and is in {optimizer}, which applies it.",
        _CLEAR_GRAD,
    ),
    "averaging": (
        "No element moved by more than {ulps} units of its last place. That is rounding, as an "
        "average (EMA, SWA) of equal numbers has.",
        "Leave frozen tensors out of the average: copy them instead.",
    ),
    "loaded": (
        "All {count} {where} were written in place, as load_state_dict() and EMA do.",
        "Load before freezing; leave frozen tensors out of the EMA's copy.",
    ),
    "in-place": (
        "It was written in place {times}, by an operation that autograd sees: copy_, an EMA, a "
        "broadcast, an optimizer.",
        TRACE,
    ),
    "hidden-write": (
        "It was written without autograd noticing: through .data, a numpy or dlpack view, or by a "
        "kernel that does not report its writes.",
        TRACE,
    ),
    "eps": (
        "Something set the layer's eps. No tensor changed, but the layer's output does.",
        "Set eps first, then freeze.",
    ),
    "unknown": ("The two states do not show the cause.", TRACE),
    # Tensors.
    "dtype": (
        "The tensor was converted, as model.half(), .bfloat16() and .double() do.",
        "Convert first, then freeze and take the snapshot.",
    ),
    "shape": (
        "The tensor was resized or replaced, or this is another model.",
        "Freeze the model in its final form.",
    ),
    "device": (
        "The tensor was moved to another device.",
        "Move first, then take the snapshot; or save it, and verify against the file.",
    ),
    "added": (
        "The snapshot does not have this tensor, so it cannot be compared.",
        "Take the snapshot when the model is complete and frozen.",
    ),
    "removed": (
        "No tensor has this name any more.",
        "Take the snapshot of the model in its final form; save all of it.",
    ),
    "aliasing": (
        "Names share memory that did not, or no longer do: an assignment, a .data, a copy, "
        "load_state_dict(assign=True).",
        "Tie weights first, then freeze.",
    ),
    "replaced": (
        "Something else has its name now: load_state_dict(assign=True), an assignment, "
        "register_buffer, or fully_shard. Optimizers still have the old parameter.",
        "Replace first, then build the optimizer and freeze.",
    ),
    "requires-grad": (
        "Something set the flag: requires_grad_() on the model or on the parameter.",
        "Set flags first, then freeze.",
    ),
    "optimizer": (
        "The optimizer's groups changed: add_param_group, or a parameter was replaced.",
        "Give the optimizer only what trains.",
    ),
    "grad": (
        "A backward ran before it was frozen, or .grad was assigned: the next step applies it.",
        _CLEAR_GRAD,
    ),
    "unverified": (
        "A tensor that cannot be compared does not count as unchanged.",
        "Leave it out with a pattern. If it is sharded, pass process_group=… on every rank.",
    ),
    # Layers.
    "sync-batchnorm": (
        "convert_sync_batchnorm rebuilt the layer, which is not frozen any more.",
        "Convert first, then freeze.",
    ),
    "parametrized": (
        "A parametrization was registered on the layer.",
        "Parametrize first, then freeze.",
    ),
    "unfrozen": ("unfreeze() was called, or something replaced the layer.", "Freeze it again."),
    "class-changed": (
        "Something changed the layer's class, or replaced the layer.",
        "Change the layer first, then freeze.",
    ),
    "train-called": ("model.train() was called after an eval() that does not last.", _FREEZE),
    "frozen-again": ("freeze() was called again.", "Take the snapshot afterwards."),
    # The whole model.
    "other-model": (
        "{gone} of {all} names are missing and {reshaped} have another shape: this is another "
        "model, or its names begin differently.",
        "Compare one model with itself. For one of several state_dicts in a file, use --key.",
    ),
    "other-objects": (
        "All {count} parameters are other objects: this is another model or a copy, or "
        "load_state_dict(assign=True) ran.",
        "Check the model of the snapshot itself. For a copy, save the snapshot and load it.",
    ),
    "ranks-differ": (
        "The ranks have different models, each unchanged since its snapshot: they started apart.",
        "Broadcast the model, or load it on every rank, before the snapshot.",
    ),
    # What only a trace sees.
    "undispatched": (
        "It was written before {operation} saw it, by something that torch does not dispatch: an "
        "assignment to .data, numpy, a raw pointer, compiled code.",
        TRACE,
    ),
    "operation": ("{operation} wrote to it.", "Leave frozen tensors out of it, or freeze later."),
}


def because(drift: Drift, code: str, **details: object) -> Drift:
    """The drift with the cause of this code; `details` fill in its sentence."""
    code = code if code in _REASONS else "unknown"
    cause, remedy = _REASONS[code]
    return replace(drift, cause_code=code, cause=cause.format(**details), remedy=remedy)
