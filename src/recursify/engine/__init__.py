"""The engine: many requests at once, every token at its own depth."""

from .engine import KV_MODES, Engine, EngineStats
from .request import RequestOutput, SamplingParams
from .stream import EngineThread, StreamChunk

__all__ = ["KV_MODES", "Engine", "EngineStats", "EngineThread", "RequestOutput", "SamplingParams", "StreamChunk"]
