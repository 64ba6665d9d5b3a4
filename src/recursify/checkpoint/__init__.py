"""Models on disk, dense and recursive: reading by name, writing atomically, walking one layer at a time."""
