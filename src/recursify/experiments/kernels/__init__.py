"""Kernels that the engine does not call."""
