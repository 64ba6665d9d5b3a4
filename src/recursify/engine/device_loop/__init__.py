"""Device-side decode loop, captured in CUDA graphs on a GPU."""
