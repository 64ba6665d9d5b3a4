"""The engine: many requests at once, every token at its own depth."""

from .checks import KV_MODES
from .engine import Engine, EngineStats
from .request import RequestOutput, SamplingParams

__all__ = ["KV_MODES", "Engine", "EngineStats", "RequestOutput", "SamplingParams"]
