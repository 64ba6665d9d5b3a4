"""Model execution: KV cache, attention batches of rows at mixed depths, and the layers that run them."""
