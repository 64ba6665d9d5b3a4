"""Dense and recursive models on disk: lazy reading, atomic writing, layer-by-layer execution."""
