"""Freezing a model, all or nothing, and undoing it."""
