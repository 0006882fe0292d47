"""The table of policies: what each of them freezes. Pure Python; knows nothing of torch."""

from __future__ import annotations

import difflib
import enum
import re

from bnfreeze.errors import PolicyError


class Policy(enum.Flag):
    """What freezing does to a norm layer. Members combine: ``Policy.EVAL | Policy.AFFINE``.

    A string with the names joined by ``+`` means the same: ``"eval+affine"``. A policy contains
    what it implies: ``Policy.EVAL in Policy.FUSED`` is true.
    """

    # The one table. A policy's name is its member's, in lower case; its bits are those of the
    # policies that it implies, and one of its own. A combination is written in this order.

    NONE = 0b0000000
    """Leave alone: an exception in a mapping."""

    STATS = 0b0000001
    """The running statistics are frozen. Train mode normalises with the batch, as before."""

    EVAL = 0b0000011
    """The layer always normalises with its running statistics, which are frozen."""

    FUSED = 0b0001111
    """As ``eval+affine``, and the layer becomes a `FrozenBatchNorm1d/2d/3d`, in place."""

    FUSED_ACT = 0b0011111
    """As ``fused``, and the activation and the addition that follow run in the same kernel."""

    FOLDED = 0b1011111
    """As ``fused-act``, and the layer is folded into the convolution before it, at each call."""

    AFFINE = 0b0000100
    """Weight and bias are frozen."""

    WEIGHTS = 0b0100100
    """Every parameter of the selected modules is frozen, those of convolutions too."""

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
                f"A policy is a string such as 'eval+affine' or a bnfreeze.Policy, not "
                f"{type(text).__name__}: {text!r:.80}. To freeze a part of a model, pass a "
                f"mapping such as {{'layer1': 'eval'}}."
            )
        words = [word.strip().lower().replace("_", "-") for word in text.split("+")]
        if "none" in words and len(words) > 1:
            raise PolicyError(
                f"Policy {text!r}: 'none' means leave alone and stands by itself; drop it."
            )
        policy = cls.NONE
        for word in words:
            if word not in _BY_NAME:
                parts = re.split(r"\W+", word)
                near = difflib.get_close_matches(word, _BY_NAME, n=1)
                if len(parts) > 1 and all(part in _BY_NAME for part in parts):
                    near = ["+".join(parts)]
                hint = f"Did you mean {near[0]!r}? " if near else ""
                inside = f" (in {text!r})" if text != word else ""
                raise PolicyError(
                    f"There is no policy {word!r}{inside}. {hint}"
                    f"There are: {', '.join(_BY_NAME)}; join several with '+'."
                )
            policy |= _BY_NAME[word]
        return policy

    @property
    def freezes_statistics(self) -> bool:
        """Whether running_mean, running_var and num_batches_tracked are frozen."""
        return Policy.STATS in self

    @property
    def forces_eval(self) -> bool:
        """Whether the layer normalises with its running statistics, whatever ``train()`` says."""
        return Policy.EVAL in self

    @property
    def freezes_affine(self) -> bool:
        """Whether a norm layer's weight and bias are frozen."""
        return Policy.AFFINE in self

    def __str__(self) -> str:
        """The shortest name: what another part of it implies is left out."""
        parts = {name: member for name, member in _BY_NAME.items() if member and member in self}
        return (
            "+".join(
                name
                for name, member in parts.items()
                if not any(member in other for other in parts.values() if other is not member)
            )
            or "none"
        )


_BY_NAME = {name.lower().replace("_", "-"): member for name, member in Policy.__members__.items()}
