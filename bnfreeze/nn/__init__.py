"""The frozen layer: its modules, its function, and the CUDA kernel."""
