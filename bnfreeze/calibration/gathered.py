"""The moments of all layers, gathered while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bnfreeze.calibration.moments import Moments, Rows
from bnfreeze.norm_layers import STATISTICS, NamedModule

# Larger inputs are not merged with those of other layers: there the arithmetic takes its time, and
# memory, which all layers would take at once.
_LARGE = 1 << 17
_Call = tuple[Rows, int, bool]


class Gathered:
    """The moments of all layers.

    Those of one batch are merged when it is done, and inputs of the same size as if one layer had
    them: a model has hundreds of layers, and on a GPU it takes longer to launch the arithmetic for
    each than to do it.

    Attributes:
        references: each layer's running mean, in fp64.
        items: how many samples the model is given in this batch; None if that cannot be seen.
    """

    def __init__(self, layers: Sequence[NamedModule]) -> None:
        self.references: dict[str, Tensor] = {}
        self.items: int | None = None
        for entry in layers:
            mean = entry.module.get_buffer(STATISTICS[0])
            where = mean.device if mean.is_cuda else "cpu"  # not every accelerator has fp64
            self.references[entry.name] = mean.detach().to(where, torch.float64, copy=True)
        self._now: dict[str, _Call | Moments] = {}
        self._merged: dict[tuple[str, ...], Moments] = {}
        self._order: dict[str, None] = {}

    def add(self, name: str, rows: Rows, size: int, within: bool) -> None:
        """Add what the layer `name` was given, with so many values per row and channel."""
        self._order.setdefault(name)
        one: _Call | Moments = rows, size, within
        if name in self._now:
            one = self._alone(name, self._now[name]).again(self._alone(name, one), self.items)
        elif rows[0].numel() > _LARGE or (self.items and len(rows[0]) > self.items):
            one = self._alone(name, one)
        self._now[name] = one

    def merge(self) -> str:
        """End a batch; return the first layer that was given NaN or infinity in it, or nothing."""
        groups: dict[object, list[str]] = {}
        for name, one in self._now.items():
            if isinstance(one, Moments):
                groups[name] = [name]
            else:
                (means, _), size, within = one
                groups.setdefault((len(means), means.device, size, within), []).append(name)
        merged = {tuple(names): self._of_group(names) for names in groups.values()}
        broken = [
            name
            for names, new in merged.items()
            if not bool(torch.isfinite(new.m2.sum()))
            for name, one in zip(names, self._split(names, new), strict=True)
            if not bool(torch.isfinite(one.m2.sum()))
        ]
        if broken:
            return next(name for name in self._now if name in broken) or "the model"
        self._now.clear()
        for names, new in merged.items():
            if names in self._merged or len(self._merged) < len(self.references):
                self._keep(names, new)
            else:  # where the data choose the layers, nearly every batch has other groups
                for name, one in zip(names, self._split(names, new), strict=True):
                    self._keep((name,), one)
        return ""

    def _keep(self, names: tuple[str, ...], new: Moments) -> None:
        old = self._merged.get(names)
        self._merged[names] = old.merged(new) if old else replace(new, each=None)

    def by_name(self) -> dict[str, Moments]:
        """The moments of each layer, on the CPU, in the order of the first calls."""
        found: dict[str, Moments] = {}
        for names, merged in self._merged.items():
            for name, one in zip(names, self._split(names, merged.on_cpu()), strict=True):
                found[name] = found[name].merged(one) if name in found else one
        return {name: found[name] for name in self._order}

    def _alone(self, name: str, one: _Call | Moments) -> Moments:
        if isinstance(one, Moments):
            return one
        rows, size, within = one
        reference = self.references[name]
        return Moments.of_rows(rows, reference, size=size, items=self.items, within=within)

    def _of_group(self, names: Sequence[str]) -> Moments:
        calls = [self._now[name] for name in names]
        if len(calls) == 1:
            return self._alone(names[0], calls[0])
        all_rows, sizes, within = zip(*calls, strict=True)
        means, variances = (torch.cat(each, 1) for each in zip(*all_rows, strict=True))
        reference = torch.cat([self.references[name] for name in names])
        return Moments.of_rows((means, variances), reference, size=sizes[0], within=within[0])

    def _split(self, names: Sequence[str], merged: Moments) -> list[Moments]:
        return merged.split([len(self.references[name]) for name in names])
