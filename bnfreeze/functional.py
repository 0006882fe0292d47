"""Frozen batch norm as a function: `frozen_batch_norm`, and `backend`, which says what runs it."""

from bnfreeze.nn.functional import Backend, backend, frozen_batch_norm

__all__ = ["Backend", "backend", "frozen_batch_norm"]
