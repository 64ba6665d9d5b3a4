"""An OpenAI-compatible server over the engine: needs the extra ``serve``."""

from .app import create_app
from .engine_supervisor import EngineSupervisor
from .run import serve
from .settings import ExitChoice, ServerSettings

__all__ = ["EngineSupervisor", "ExitChoice", "ServerSettings", "create_app", "serve"]
