"""The policies: what is promised not to change. Pure; knows nothing of torch."""

from __future__ import annotations

import difflib
import enum

from bnfreeze.errors import PolicyError

__all__ = ["Policy"]


class Policy(enum.Flag):
    """What freezing does to a norm layer. Members combine: ``Policy.EVAL | Policy.AFFINE``.

    A string with the members' names joined by ``+`` means the same: ``"eval+affine"``.

    ========= ================== =============================== ================
    name      running statistics normalises in train mode with   weight and bias
    ========= ================== =============================== ================
    stats     held               the batch, as before            train
    affine    update             as before                       held
    eval      held               the running statistics, always  train
    fused     held               the running statistics, always  held
    fused-act held               the running statistics, always  held
    weights   as before          as before                       every parameter held
    none      as before          as before                       as before
    ========= ================== =============================== ================
    """

    NONE = 0
    STATS = enum.auto()
    AFFINE = enum.auto()
    EVAL = enum.auto()
    FUSED = enum.auto()
    FUSED_ACT = enum.auto()
    WEIGHTS = enum.auto()

    @classmethod
    def parse(cls, text: Policy | str) -> Policy:
        """Read a policy from a string such as ``"eval+affine"``; a `Policy` is returned as it is.

        Raises:
            PolicyError: a name that does not exist, or ``none`` joined to another.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise PolicyError(
                f"A policy is a string such as 'eval+affine' or a bnfreeze.Policy, "
                f"not {type(text).__name__}: {text!r:.80}."
            )
        words = [word.strip().lower().replace("_", "-") for word in text.split("+")]
        if "none" in words and len(words) > 1:
            raise PolicyError(
                f"Policy {text!r}: 'none' means leave alone and stands by itself; drop it."
            )
        policy = cls.NONE
        for word in words:
            if word not in _BY_NAME:
                near = difflib.get_close_matches(word, _BY_NAME, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise PolicyError(
                    f"Policy {text!r}: there is no policy {word!r}. {hint}"
                    f"There are: {', '.join(_BY_NAME)}; join several with '+'."
                )
            policy |= _BY_NAME[word]
        return policy

    @property
    def freezes_statistics(self) -> bool:
        """Whether running_mean, running_var and num_batches_tracked are held."""
        return bool(self & (Policy.STATS | Policy.EVAL | Policy.FUSED | Policy.FUSED_ACT))

    @property
    def forces_eval(self) -> bool:
        """Whether the layer normalises with its running statistics, whatever ``train()`` says."""
        return bool(self & (Policy.EVAL | Policy.FUSED | Policy.FUSED_ACT))

    @property
    def freezes_affine(self) -> bool:
        """Whether a norm layer's weight and bias are held."""
        return bool(self & (Policy.AFFINE | Policy.FUSED | Policy.FUSED_ACT | Policy.WEIGHTS))

    def __str__(self) -> str:
        names = [name for name, member in _BY_NAME.items() if member and member in self]
        return "+".join(names) or "none"


# The order is the one in which a combination is written: what it does to the norm layer, then
# what it adds.
_BY_NAME = {
    "none": Policy.NONE,
    "stats": Policy.STATS,
    "eval": Policy.EVAL,
    "fused": Policy.FUSED,
    "fused-act": Policy.FUSED_ACT,
    "affine": Policy.AFFINE,
    "weights": Policy.WEIGHTS,
}
