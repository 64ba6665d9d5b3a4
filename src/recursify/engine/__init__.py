"""Inference engine: many requests at once, every token at its own depth."""

from .checks import KV_MODES
from .config import EngineConfig
from .engine import Engine
from .request import RequestOutput, SamplingParams
from .stats import EngineStats

__all__ = ["KV_MODES", "Engine", "EngineConfig", "EngineStats", "RequestOutput", "SamplingParams"]
