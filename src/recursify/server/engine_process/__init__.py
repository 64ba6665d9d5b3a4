"""An engine in a process of its own: the client, the process, and the protocol between them."""

from .client import EngineClient
from .protocol import Accepted, EngineFailure, EngineInfo, OutputChunk
from .snapshot import EngineSnapshot

__all__ = ["Accepted", "EngineClient", "EngineFailure", "EngineInfo", "EngineSnapshot", "OutputChunk"]
