"""What a user can cause, as one tree.

::

    RecursifyError                 the command line prints the message and exits with 1
    ├── CheckpointError            a dense or recursive checkpoint that is missing, damaged or not what it says
    ├── UnsupportedModelError      a family, or a part of one, that cannot be made recursive
    ├── PlanError                  a layout, rank or strategy that does not fit the model
    ├── TextError                  calibration or evaluation text that cannot be used
    ├── SettingsError              a settings file with an unknown key or a value out of range
    ├── OutputError                a target that exists, lies inside the source, or has no room
    ├── TrainingError              a training run that cannot start, go on or be resumed
    ├── EngineError                a request or a setting that the engine cannot serve
    ├── HubError                   a repository that cannot be made, read or written, or a folder not fit for one
    └── ParityError                a converted or exported model whose logits differ where they must not

Each message says what happened, with which values, and what to do.
"""


class RecursifyError(Exception):
    """Base of every error that a user can cause."""


class CheckpointError(RecursifyError):
    """A checkpoint is missing, damaged, or not what it says it is."""


class UnsupportedModelError(RecursifyError):
    """A model family, or a part of one, cannot be made recursive."""


class PlanError(RecursifyError):
    """The asked layout, rank or strategy does not fit the model."""


class TextError(RecursifyError):
    """Calibration or evaluation text is empty, too short, or unreadable."""


class SettingsError(RecursifyError):
    """A settings file has an unknown key or a value out of range."""


class OutputError(RecursifyError):
    """The output cannot be written where it was asked for."""


class TrainingError(RecursifyError):
    """A training run cannot start, go on, or be resumed."""


class EngineError(RecursifyError):
    """A request cannot be answered, or an engine cannot be set up as asked."""


class HubError(RecursifyError):
    """A Hub repository cannot be made, read or written, or a folder is not fit for one."""


class ParityError(RecursifyError):
    """Two models whose logits must be equal differ."""
