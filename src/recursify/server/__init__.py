"""An OpenAI-compatible server over the engine: needs the extra ``serve``."""

from .app import create_app
from .host import EngineHost
from .serving import serve
from .settings import ExitChoice, ServerSettings

__all__ = ["EngineHost", "ExitChoice", "ServerSettings", "create_app", "serve"]
