"""The options of a run: the device, the size, and which arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.measure import Effort

_T = TypeVar("_T")

PRECISIONS = ("fp32", "bf16", "autocast")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """The options of a run.

    Attributes:
        device: the device that is measured.
        size: ``"tiny"`` runs everything once, for the tests; ``"quick"`` takes minutes; ``"full"``.
        arms: patterns of arms; all of them if empty.
        tell: called with a line on what is being measured.
        notes: lines that readers of the results must see are added here.
    """

    device: torch.device
    size: str = "full"
    arms: Sequence[str] = ()
    tell: Callable[[str], None] = print
    notes: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, *, tiny: _T, quick: _T, full: _T, gpu: _T | None = None) -> _T:
        """Choose by size; on a GPU ``gpu`` instead of ``full``."""
        if self.size == "full" and self.on_gpu and gpu is not None:
            return gpu
        return {"tiny": tiny, "quick": quick, "full": full}[self.size]

    def effort(self, quick: float, full: float, gpu: float, turns: int = 1) -> Effort:
        """Return how long one comparison may take, from the seconds for each size.

        With several ``turns`` the fastest counts. On a GPU there is one turn: little disturbs it.
        """
        return self.pick(
            tiny=Effort(1, 0.0, least=1, sample=0.0),
            quick=Effort(9, quick, least=3, turns=turns),
            full=Effort(20, full, least=4, turns=turns),
            gpu=Effort(20, gpu, least=5),
        )

    def prepared(self, makers: Mapping[str, Callable[[], _T]], what: str = "") -> dict[str, _T]:
        """Call each maker; return the results. One that fails is noted and left out."""
        made = {}
        for arm, make in makers.items():
            try:
                made[arm] = make()
            except Exception as error:  # a peer, a compiler or a driver may raise anything
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                where = f" {what}" if what else ""
                self.notes.append(f"{arm} failed{where} and was left out: {reason}")
        return made


def in_precision(module: nn.Module, precision: str, layout: str, device: torch.device) -> nn.Module:
    """Return the module on the device, in a precision of `PRECISIONS` and a layout of `LAYOUTS`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return module.to(device=device, dtype=dtype, memory_format=LAYOUTS[layout])


def activations(shape: Sequence[int], precision: str, layout: str, device: torch.device) -> Tensor:
    """Return random feature maps; under autocast bf16, as a convolution returns."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    x = torch.randn(*shape, device=device, dtype=dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for a precision."""
    if precision != "autocast":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
