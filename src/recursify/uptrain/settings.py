"""What a user may decide about uptraining, read strictly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from recursify.errors import SettingsError
from recursify.settings import check_keys

TRAINABLE = ("all", "lora", "shared")
"""What is trained: everything; residuals, per-depth norms and biases; or the shared weights."""


@dataclass(frozen=True, kw_only=True)
class UptrainSettings:
    """Options of ``recursify uptrain``; a YAML file given with ``--config`` has the same names."""

    stage: str = "heal"
    """What is trained for; one of ``STAGES``."""

    data: tuple[str, ...] | None = None
    """Files, folders or Hub data sets; None takes the text in Python's own ``pydoc_data``."""
    data_split: str = "train"
    """Split of a Hub data set."""
    streaming: bool = False
    """Read and pack rows as they are needed, instead of preparing (and caching) all of them first."""
    completions_only: bool = False
    """Of prompt/completion and chat rows, learn what the assistant says and nothing else."""
    length: int = 512
    """Tokens per packed sequence."""
    eval_data: tuple[str, ...] | None = None
    """Held-out text; None keeps back one packed sequence in twenty of ``data`` (at most 64)."""

    max_tokens: int = 1_000_000
    """Tokens to train on, rounded up to whole steps; the data is repeated if it is shorter."""
    batch_size: int = 4
    """Sequences per device and micro-batch."""
    accumulate: int = 1
    """Micro-batches per step."""
    learning_rate: float = 3e-4
    """Peak, of everything but residuals, norms and biases."""
    lora_learning_rate: float | None = None
    """Peak, of residuals, per-depth norms and biases; None takes ``learning_rate``."""
    schedule: str = "cosine"
    """Any scheduler of transformers (``cosine``, ``linear``, ``constant_with_warmup``, ...)."""
    warmup_fraction: float = 0.05
    """Part of the steps over which the learning rate rises."""
    optimizer: str = "adamw_torch"
    """Any optimizer of transformers (``adamw_torch``, ``adafactor``, ``adamw_8bit``, ...), or ``hfac``."""
    weight_decay: float = 0.0
    """Of matrices; never of norms and biases."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    trainable: Literal["all", "lora", "shared"] = "all"
    """What is trained; see ``TRAINABLE``."""
    random_recursions: bool = False
    """Draw each step's number of recursions, the same on all ranks."""
    recursion_curriculum: float = 0.5
    """With ``random_recursions``: part of the steps over which the fewest allowed falls from all to one."""
    tie_fraction: float = 0.75
    """Stage ``tie``: part of the steps over which a slot's weights move to their mean; the rest trains the mean."""
    tie_noise: float = 1.0
    """Stage ``tie``: how far a step's mixture is drawn from what it is on average; 0 draws nothing, at most 1."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, per block layer and depth."""
    seed: int = 0
    """Of data order, recursion counts and dropout."""

    teacher: str | None = None
    """Dense model to distil from; None takes the one that ``recursify.json`` names."""
    teacher_dtype: str = "auto"
    """Dtype of the teacher."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy."""
    kl_weight: float = 1.0
    """Weight of ``KL(teacher ‖ model)``; 0 does without a teacher."""
    temperature: float = 1.0
    """Of both distributions in the KL term, which is scaled by its square."""
    loss_chunk: int = 512
    """Tokens whose logits are held at a time."""

    eval_every: int = 100
    """Steps between evaluations; one more comes at the end."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, besides the best."""
    report_to: tuple[str, ...] = ()
    """Trackers that are installed: tensorboard, trackio, wandb, ..."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further fields of transformers' ``TrainingArguments`` (``fsdp``, ``deepspeed``, ``bf16``, ...)."""

    def __post_init__(self) -> None:
        positive = ("length", "max_tokens", "batch_size", "accumulate", "learning_rate", "temperature", "loss_chunk")
        for name in (*positive, "eval_every", "save_every", "keep"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("ce_weight", "kl_weight", "weight_decay", "warmup_fraction", "recursion_curriculum"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} cannot be negative, got {getattr(self, name)}.")
        if self.length < 2:
            raise SettingsError(
                "length must be at least 2: the first token of a sequence predicts, it is not predicted."
            )
        if not 0 <= self.tie_fraction < 1:
            raise SettingsError(
                f"tie_fraction must be at least 0 and below 1, got {self.tie_fraction}: the last steps train the mean."
            )
        if not 0 <= self.tie_noise <= 1:
            raise SettingsError(f"tie_noise must be between 0 and 1, got {self.tie_noise}.")
        if self.stage in ("heal", "tie") and self.ce_weight == self.kl_weight == 0:
            raise SettingsError("ce_weight and kl_weight are both 0, so there is nothing to learn. Raise one of them.")
        if self.trainable not in TRAINABLE:
            raise SettingsError(f"Unknown trainable '{self.trainable}'. Use one of: {', '.join(TRAINABLE)}.")

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], where: str) -> UptrainSettings:
        """Settings from a mapping read from ``where``.

        Raises:
            SettingsError: An unknown key (the nearest is named) or a value out of range.
        """
        check_keys(mapping, [entry.name for entry in fields(cls)], where)
        values = dict(mapping)
        for key in ("data", "eval_data", "report_to"):
            if values.get(key) is not None:
                values[key] = (values[key],) if isinstance(values[key], str) else tuple(values[key])
        # YAML reads 3e-4, without a dot, as a string.
        for entry in fields(cls):
            if isinstance(entry.default, float) and isinstance(values.get(entry.name), str):
                values[entry.name] = _number(entry.name, values[entry.name], where)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: tuples are lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _number(key: str, value: str, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise SettingsError(f"{key} in {where} must be a number, got '{value}'.") from error
