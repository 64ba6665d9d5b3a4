"""Errors that a user can cause. Every message contains what happened, the values, and what to do."""


class RecursifyError(Exception):
    """Base of all errors that a user can cause; the command line prints the message and exits with 1."""


class CheckpointError(RecursifyError):
    """A checkpoint is missing, damaged, or of another kind."""


class UnsupportedModelError(RecursifyError):
    """A model family, or a part of one, cannot be converted."""


class PlanError(RecursifyError):
    """A layout, rank or strategy does not fit the model."""


class TextError(RecursifyError):
    """Calibration or evaluation text is empty, too short, or unreadable."""


class SettingsError(RecursifyError):
    """A setting is unknown, of the wrong type, or out of range."""


class OutputError(RecursifyError):
    """The output exists, is inside the source, or cannot be written."""


class TrainingError(RecursifyError):
    """A training run cannot start, continue, or be resumed."""


class EngineError(RecursifyError):
    """The engine does not support a request or a setting."""


class ContextLengthError(EngineError):
    """A request has more tokens than the engine allows."""


class HubError(RecursifyError):
    """A Hub repository cannot be created, read or written, or a folder is unsuitable for one."""


class ParityError(RecursifyError):
    """Two models whose logits must be equal differ."""
