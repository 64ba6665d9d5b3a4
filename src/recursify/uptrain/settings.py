"""What a user may decide about uptraining, read strictly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from recursify.errors import SettingsError
from recursify.settings import check_keys

TRAINABLE = ("all", "lora", "shared", "heads", "routers")
"""What is trained: everything; residuals, per-depth norms and biases; the shared weights; or exit heads or routers
alone. A stage that trains exit heads or routers trains them beside any of these."""

ROUTER_FIELDS = (
    "router",
    "router_width",
    "router_activation",
    "router_temperature",
    "router_alpha",
    "router_gate",
    "router_capacities",
    "router_kv",
    "router_decision",
)
"""What the settings say of routers by the names that a model's config has for them."""

ExitLoss = Literal["aggressive", "weighted", "free"]
LayerDistillation = Literal["kd_last", "kd_unif", "kd_dyna"]
RouterBalance = Literal["loss", "bias", "none"]

SHARDING = ("none", "fsdp2", "zero2")
"""What is cut over processes: nothing; weights, gradients and optimizer; or gradients and optimizer, by DeepSpeed."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of a model that is only read; ``auto`` is that of its checkpoint."""

PRECISIONS = ("auto", "float32", "bfloat16")
"""Of matrix products."""

LossBackend = Literal["auto", "torch", "liger"]


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
    """Held-out text; None keeps back one packed sequence in twenty of ``data``."""
    eval_sequences: int = 64
    """Held-out sequences at most."""

    max_tokens: int = 1_000_000
    """Tokens to train on, rounded up to whole steps; the data is repeated if it is shorter."""
    batch_size: int = 4
    """Sequences per device and micro-batch."""
    accumulate: int = 1
    """Micro-batches per step."""
    learning_rate: float = 1e-4
    """Peak, of everything but residuals, norms and biases."""
    lora_learning_rate: float | None = None
    """Peak, of residuals, per-depth norms and biases; None takes ``learning_rate``."""
    head_learning_rate: float = 1e-3
    """Peak, of exit heads."""
    router_learning_rate: float = 1e-3
    """Peak, of routers."""
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
    trainable: Literal["all", "lora", "shared", "heads", "routers"] = "all"
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
    sharding: Literal["none", "fsdp2", "zero2"] = "none"
    """With several processes, what is cut into parts, one each; see ``SHARDING``."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights, optimizer and losses are float32. auto: bfloat16 where a GPU has it."""
    layer_tokens: int = 32_768
    """Stage ``layers``: tokens whose hidden states are held at a time, for a sweep over all layers."""
    layer_passes: int = 4
    """Stage ``layers``: how often a layer is shown the tokens of its sweep; ``max_tokens`` counts each time."""
    seed: int = 0
    """Of data order, recursion counts and dropout."""

    teacher: str | None = None
    """Dense model to distil from; None takes the one that ``recursify.json`` names."""
    teacher_dtype: str = "auto"
    """Dtype of the teacher."""
    teacher_device: str | None = None
    """Where the teacher is (``cuda:1``, ``cpu``); None puts it beside the model."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy."""
    kl_weight: float = 1.0
    """Weight of ``KL(teacher ‖ model)``; 0 does without a teacher."""
    temperature: float = 1.0
    """Of both distributions in the KL term, which is scaled by its square."""
    loss_chunk: int = 512
    """Tokens whose logits are held at a time."""
    loss_backend: LossBackend = "auto"
    """What computes cross-entropy and KL: ``torch``; Liger's Triton kernels (``liger``), which hold fewer copies of the
    logits; or those on a GPU if liger-kernel is installed, else torch (``auto``). Stage ``layers`` only measures them,
    in torch."""

    exit_head: str | None = None
    """What an exit reads out with: the model's final norm and head (``shared``); its own norm (``norm``); that and a
    low-rank residual on the head (``low_rank``); its own norm and head (``full``). None keeps the heads that the
    model has, else ``shared``."""
    exit_rank: int | None = None
    """Rank of a ``low_rank`` exit head; None keeps the model's, else 64."""
    exit_through_coda: bool | None = None
    """Whether a token that exits still runs the coda; None keeps what the model does, else yes."""
    exit_loss: ExitLoss = "aggressive"
    """How exits weigh beside the last recursion: ``exit_weight`` each beside 1; by depth; or FREE's, by layers run."""
    exit_weight: float = 0.1
    """Coefficient of each exit in the aggressive loss."""
    exit_kl_weight: float = 1.0
    """Weight of ``KL(last recursion ‖ exit)`` beside an exit's cross-entropy; FREE's loss has none."""
    free_distillation: LayerDistillation | None = "kd_dyna"
    """Which deep layers teach which shallow ones in FREE's loss."""
    free_distillation_weight: float = 0.5
    """Weight of that distillation."""
    test_weight: float = 1.0
    """Weight of the cross-entropy of the exit test, whose gradient reaches nothing else."""

    router: str | None = None
    """Who chooses: every recursion its tokens (``expert_choice``), or every token the number of its recursions
    (``token_choice``). This and the next eight are fields of the model's config; None keeps what the model has, else
    takes ``expert_choice`` and the config's defaults."""
    router_width: str | None = None
    """What a router is: ``linear``, ``mlp``, ``wide_mlp``, or chance (``random``), as a control."""
    router_activation: str | None = None
    """``sigmoid`` or ``softmax``."""
    router_temperature: float | None = None
    """Divides what a router sees."""
    router_alpha: float | None = None
    """Scales gates."""
    router_gate: str | None = None
    """How a recursion's result comes back: ``residual``, which starts as the model without routers, or ``mor``."""
    router_capacities: tuple[float, ...] | None = None
    """With ``expert_choice``: the part of the tokens that goes into each recursion."""
    router_kv: str | None = None
    """Which keys a recursion attends to: its own (``recursion_wise``), or the first one's (``shared``)."""
    router_decision: str | None = None
    """Whose score decides in inference: the router's ``own``, or that of an ``auxiliary`` one."""
    router_warmup_fraction: float = 0.0
    """With ``expert_choice``: part of the steps over which capacities fall from 1, along a cosine."""
    router_calibrate: bool = True
    """With ``expert_choice``: when the weights stand, choose on training text the scores from which on a token goes in,
    so that every recursion takes the part that it was trained for. Otherwise that score is 0.5, and loads are what
    comes of it: few tokens teach scores which tokens are the better ones, and not yet which are the best half."""
    router_weight: float = 0.001
    """With ``expert_choice``: weight of the cross-entropy that has scores say who is among the best ``k``."""
    router_balance: RouterBalance = "loss"
    """What evens out the depths that tokens choose: a loss, a bias on the choice that follows the loads, or nothing."""
    router_balance_weight: float = 0.1
    """Weight of the balancing loss."""
    router_bias_rate: float = 0.001
    """By how much the bias moves after a step."""
    router_z_weight: float = 0.0
    """Weight of the squared size of a router's logits."""

    eval_every: int = 100
    """Steps between evaluations; one more comes at the end."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, besides the best."""
    report_to: tuple[str, ...] = ()
    """Trackers that are installed: tensorboard, trackio, wandb, ..."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further fields of transformers' ``TrainingArguments`` (``deepspeed``, ``torch_compile``, ...)."""

    def __post_init__(self) -> None:
        self._check_ranges()
        choices = {
            "trainable": TRAINABLE,
            "sharding": SHARDING,
            "precision": PRECISIONS,
            "teacher_dtype": DTYPES,
            "loss_backend": get_args(LossBackend),
            "exit_loss": get_args(ExitLoss),
            "free_distillation": (None, *get_args(LayerDistillation)),
            "router_balance": get_args(RouterBalance),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values)
                raise SettingsError(f"Unknown {name} '{getattr(self, name)}'. Use one of: {listed}.")
        self._check_combinations()

    def _check_ranges(self) -> None:
        positive = ("length", "max_tokens", "batch_size", "accumulate", "learning_rate", "temperature", "loss_chunk")
        counts = ("exit_rank", "eval_sequences", "eval_every", "save_every", "keep", "layer_tokens", "layer_passes")
        for name in (*positive, "head_learning_rate", "router_learning_rate", *counts):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise SettingsError(f"{name} must be above 0, got {getattr(self, name)}.")
        not_negative = ("ce_weight", "kl_weight", "weight_decay", "max_grad_norm")
        exits = ("exit_weight", "exit_kl_weight", "free_distillation_weight", "test_weight")
        routers = ("router_weight", "router_balance_weight", "router_bias_rate", "router_z_weight")
        for name in (*not_negative, *exits, *routers):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} cannot be negative, got {getattr(self, name)}.")
        for name in ("warmup_fraction", "recursion_curriculum", "tie_noise", "router_warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if not 0 <= self.tie_fraction < 1:
            raise SettingsError(
                f"tie_fraction must be at least 0 and below 1, got {self.tie_fraction}: the last steps train the mean."
            )
        if self.length < 2:
            raise SettingsError(
                "length must be at least 2: the first token of a sequence predicts, it is not predicted."
            )

    def _check_combinations(self) -> None:
        if self.trainable == "heads" and self.stage != "exits":
            raise SettingsError(
                f"Stage '{self.stage}' has no heads to train. Use --stage exits, or another --trainable."
            )
        if self.trainable == "routers" and self.stage != "routers":
            raise SettingsError(
                f"Stage '{self.stage}' has no routers to train. Use --stage routers, or another --trainable."
            )
        if self.stage in ("heal", "tie", "routers") and self.ce_weight == self.kl_weight == 0:
            raise SettingsError("ce_weight and kl_weight are both 0, so there is nothing to learn. Raise one of them.")
        if "fsdp" in self.trainer:
            raise SettingsError("trainer: fsdp would shard a shared layer like any other. Use sharding: fsdp2 instead.")
        if self.sharding != "none" and self.optimizer in ("hfac", "adafactor"):
            raise SettingsError(
                f"optimizer '{self.optimizer}' factorizes whole matrices, and sharding '{self.sharding}' cuts them "
                f"into parts. Use another optimizer, or sharding none."
            )
        if self.sharding != "none" and self.stage == "tie":
            raise SettingsError(f"Stage 'tie' does not work with sharding '{self.sharding}'. Use sharding none.")
        if self.stage == "layers":
            unused = {
                "random_recursions": self.random_recursions,
                "sharding": self.sharding != "none",
                "precision": self.precision == "bfloat16",
                "gradient_checkpointing": self.gradient_checkpointing,
                "report_to": self.report_to,
            }
            if ignored := [name for name, given in unused.items() if given]:
                raise SettingsError(
                    f"{', '.join(ignored)}: without meaning in stage 'layers', which fits one layer at a time, all "
                    f"depths at once, in float32 and in one process. Leave out what is named."
                )

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], where: str) -> UptrainSettings:
        """Settings from a mapping read from ``where``.

        Raises:
            SettingsError: An unknown key (the nearest is named) or a value out of range.
        """
        check_keys(mapping, [entry.name for entry in fields(cls)], where)
        values = dict(mapping)
        for key in ("data", "eval_data", "report_to", "router_capacities"):
            if values.get(key) is not None:
                values[key] = (values[key],) if isinstance(values[key], str | float) else tuple(values[key])
        # YAML reads 3e-4, without a dot, as a string.
        for entry in fields(cls):
            if entry.type in ("float", "float | None") and isinstance(values.get(entry.name), str):
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
