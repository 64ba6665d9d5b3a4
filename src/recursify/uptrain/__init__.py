"""Training of recursive models after conversion: healing, exit heads and routers."""
