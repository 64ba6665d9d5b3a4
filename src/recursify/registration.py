"""Registration of recursive models with transformers' Auto classes, once transformers is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.configuration_auto"


def register_on_import() -> None:
    """Register now if the Auto classes are loaded, else as soon as they are."""
    if AUTO_CLASSES in sys.modules:
        import_module("recursify.modeling")
    else:
        sys.meta_path.insert(0, AutoClassesHook())


class AutoClassesHook(MetaPathFinder):
    """Import hook that registers recursive models and removes itself.

    The modules of transformers import each other in circles, so the hook waits until the outermost one is complete:
    ``recursify.modeling`` imports from several of them.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of transformers as usual, and count when it starts and ends."""
        if name.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self.execute(execute, module)  # type: ignore[method-assign]
        return spec

    def execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Run the code of a module; after the outermost one, register if the Auto classes are loaded."""
        self.depth += 1
        try:
            execute(module)
        finally:
            self.depth -= 1
        if self.depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module("recursify.modeling")
