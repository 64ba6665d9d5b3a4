"""The engine: many requests at once, every token at its own depth."""

from .checks import KV_MODES
from .engine import Engine, EngineStats
from .link import EngineLink
from .messages import Accepted, EngineFailure
from .request import RequestOutput, SamplingParams
from .snapshot import EngineSnapshot
from .stream import EngineThread, StreamChunk

__all__ = [
    "KV_MODES",
    "Accepted",
    "Engine",
    "EngineFailure",
    "EngineLink",
    "EngineSnapshot",
    "EngineStats",
    "EngineThread",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
]
