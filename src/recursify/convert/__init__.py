"""Dense checkpoint to recursive checkpoint, and back. Read :mod:`recursify.convert.converter` first."""
