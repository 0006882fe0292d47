"""Frozen models where people take their models; each test is a cell of docs/ecosystem.md."""
