"""OpenAI-compatible HTTP server over the engine: needs the extra ``serve``."""
