"""Kernels that the engine does not call: measurement has not shown that they pay."""
