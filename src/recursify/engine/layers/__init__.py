"""Model execution: the KV cache, batches of rows at mixed depths, and the layers that run them."""
