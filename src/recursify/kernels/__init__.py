"""Operations of the engine's hot paths that no library offers. They work on tensors and know nothing of models.

One folder per operation: ``reference.py`` defines it in plain PyTorch, ``triton.py`` does the same in one or two
launches, and ``__init__.py`` holds the function to call, which checks its arguments and selects one of the two
(:mod:`.dispatch`).
"""
