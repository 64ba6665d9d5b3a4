"""Operations of the engine's hot paths that no library has, on tensors alone; nothing here knows of models.

A folder per operation: ``reference.py`` defines it in plain PyTorch, ``triton.py`` is the same in one launch or two,
and ``__init__.py`` has the function to call, which checks its arguments and picks between them (:mod:`.dispatch`).
"""
