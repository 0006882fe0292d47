"""Frozen models in the trainers, compilers, exporters and model libraries that people use."""
