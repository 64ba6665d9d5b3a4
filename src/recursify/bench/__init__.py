"""Throughput and latency of the engine beside transformers and the dense model."""
