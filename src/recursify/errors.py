"""Errors that a user can cause, as one tree.

::

    RecursifyError                 the command line prints the message and exits with 1
    ├── CheckpointError            a missing or damaged checkpoint, or one of another kind
    ├── UnsupportedModelError      a model family, or a part of one, that cannot be converted
    ├── PlanError                  a layout, rank or strategy that does not fit the model
    ├── TextError                  calibration or evaluation text that cannot be used
    ├── SettingsError              an unknown setting, or a value of the wrong type or out of range
    ├── OutputError                an output that exists, is inside the source, or cannot be written
    ├── TrainingError              a training run that cannot start, continue or be resumed
    ├── EngineError                a request or a setting that the engine does not support
    │   └── ContextLengthError     a request with more tokens than the engine allows
    ├── HubError                   a Hub repository that cannot be created, read or written, or an unsuitable folder
    └── ParityError                two models whose logits must be equal and differ

Every message contains what happened, the values, and what to do.
"""


class RecursifyError(Exception):
    """Base of all errors that a user can cause."""


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
