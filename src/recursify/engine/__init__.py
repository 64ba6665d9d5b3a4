"""Inference engine: many requests at once, every token at its own depth."""

from typing import TYPE_CHECKING

from recursify.lazy import lazy_names

if TYPE_CHECKING:
    from .checks import KV_MODES
    from .config import EngineConfig
    from .engine import Engine
    from .request import RequestOutput, SamplingParams
    from .stats import EngineStats

__all__ = ["KV_MODES", "Engine", "EngineConfig", "EngineStats", "RequestOutput", "SamplingParams"]

# The command line imports EngineConfig for --help, which must not load torch.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        f"{__name__}.checks": ["KV_MODES"],
        f"{__name__}.config": ["EngineConfig"],
        f"{__name__}.engine": ["Engine"],
        f"{__name__}.request": ["RequestOutput", "SamplingParams"],
        f"{__name__}.stats": ["EngineStats"],
    },
)
