"""Settings of uptraining: options of ``recursify uptrain`` and keywords of ``uptrain_model``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Lt
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from recursify.errors import SettingsError
from recursify.settings import Dtype, Fraction, Fractions, Option, Settings, Strings

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
"""Fields with the names of the model's config; None keeps the model's value."""

Trainable = Literal["all", "lora", "shared", "heads", "routers"]
ExitLoss = Literal["aggressive", "weighted", "free"]
LayerDistillation = Literal["kd_last", "kd_unif", "kd_dyna"]
RouterBalance = Literal["loss", "bias", "none"]
Sharding = Literal["none", "fsdp2", "zero2"]
LossBackend = Literal["auto", "torch", "liger"]


class UptrainSettings(Settings):
    """Options of ``recursify uptrain``."""

    panels: ClassVar[Mapping[str, str]] = {
        "stage": "Stage",
        "data": "Data",
        "max_tokens": "Optimization",
        "random_recursions": "Memory and processes",
        "teacher": "Losses",
        "exit_head": "Exits (stage exits)",
        "router": "Routers (stage routers)",
        "layer_tokens": "Other stages",
        "eval_every": "Evaluation, checkpoints and reports",
    }

    stage: str = "heal"
    """Training stage. heal: the whole model, by cross-entropy and distillation. exits: exit heads after every
    recursion. routers: heal, with routers that choose which tokens run which recursions. layers: every shared layer by
    itself, fitted to the dense layers' outputs in bounded memory. tie: heal, starting from the dense layers and moving
    tied ones to their mean."""
    trainable: Trainable = "all"
    """Weights to train: all; lora (residuals, per-depth norms and biases); shared (the shared weights); heads or
    routers (those alone). A stage that trains exit heads or routers trains them in addition to any of these."""

    data: Strings | None = None
    """Files (txt, md, jsonl, json, csv, tsv, parquet), folders of them, or Hub data sets. Without it, Python's own help
    topics."""
    data_split: str = "train"
    """Split of a Hub data set."""
    streaming: bool = False
    """Read and pack rows as they are needed, instead of preparing (and caching) all of them first."""
    completions_only: bool = False
    """Compute the loss on completions / assistant turns only."""
    length: Annotated[int, Ge(2)] = 512
    """Tokens per packed sequence."""
    eval_data: Strings | None = None
    """Held-out text. Without it, one packed sequence in twenty of the data."""
    eval_sequences: PositiveInt = 64
    """Maximum number of held-out sequences."""

    max_tokens: PositiveInt = 1_000_000
    """Number of tokens to train on, rounded up to whole steps; shorter data is repeated."""
    batch_size: PositiveInt = 4
    """Sequences per device and micro-batch."""
    accumulate: PositiveInt = 1
    """Micro-batches per step."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    lora_learning_rate: PositiveFloat | None = None
    """Peak learning rate of residuals, per-depth norms and biases. Without it, the learning rate."""
    head_learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of exit heads."""
    router_learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of routers."""
    schedule: str = "cosine"
    """Learning-rate schedule, any of transformers' (cosine, linear, constant_with_warmup, ...)."""
    warmup_fraction: Fraction = 0.05
    """Fraction of the steps over which the learning rate rises."""
    optimizer: str = "adamw_torch"
    """Optimizer, any of transformers' (adamw_torch, adafactor, adamw_8bit, ...) or hfac."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices; norms and biases have none."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Maximum norm of the gradients; larger ones are scaled down."""
    seed: int = 0
    """Seed of data order, recursion counts and dropout."""

    random_recursions: bool = False
    """Draw the number of recursions of every step, the same on all ranks."""
    recursion_curriculum: Fraction = 0.5
    """Fraction of the steps over which the minimum of random recursions falls from all to one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    sharding: Sharding = "none"
    """Sharding over several processes: none; fsdp2 (weights, gradients and optimizer states); zero2 (gradients and
    optimizer states; needs deepspeed)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights, optimizer states and losses are float32. auto: bfloat16 on GPUs that
    support it."""

    teacher: str | None = None
    """Dense model to distil from. Without it, the one that the model was converted from."""
    teacher_dtype: Dtype = "auto"
    """Dtype of the teacher; auto is the checkpoint's."""
    teacher_device: str | None = None
    """Device of the teacher (cuda:1, cpu). Without it, the model's."""
    ce_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy."""
    kl_weight: NonNegativeFloat = 1.0
    """Weight of the distillation loss KL(teacher ‖ model); with 0, no teacher is loaded."""
    temperature: PositiveFloat = 1.0
    """Temperature of both distributions in the distillation loss, which is scaled by its square."""
    loss_chunk: PositiveInt = 512
    """Tokens whose logits are in memory at a time."""
    loss_backend: LossBackend = "auto"
    """Implementation of cross-entropy and KL: torch; liger (Triton kernels with fewer copies of the logits); auto
    (liger on a GPU if liger-kernel is installed, else torch). Stage layers uses torch."""

    exit_head: Literal["shared", "norm", "low_rank", "full"] | None = None
    """Kind of exit head: shared (the model's final norm and LM head), norm (its own norm), low_rank (its own norm and a
    low-rank residual on the LM head), full (its own norm and head). Without it, the model's kind, else shared."""
    exit_rank: PositiveInt | None = None
    """Rank of a low_rank exit head. Without it, the model's rank, else 64."""
    exit_through_coda: bool | None = None
    """Run the coda for tokens that exit. Without it, as the model does, else yes."""
    exit_loss: ExitLoss = "aggressive"
    """Weighting of exits against the last recursion: aggressive (exit_weight each against 1), weighted (by depth), free
    (FREE's, by the number of layers)."""
    exit_weight: NonNegativeFloat = 0.1
    """Coefficient of each exit in the aggressive loss."""
    exit_kl_weight: NonNegativeFloat = 1.0
    """Weight of KL(last recursion ‖ exit) next to the cross-entropy of an exit; not used by FREE's loss."""
    free_distillation: LayerDistillation | None = "kd_dyna"
    """Pairing of deep and shallow layers in FREE's layer distillation."""
    free_distillation_weight: NonNegativeFloat = 0.5
    """Weight of FREE's layer distillation."""
    test_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropy of the exit classifier; its gradient reaches nothing else."""

    router: Literal["expert_choice", "token_choice"] | None = None
    """Routing: expert_choice (every recursion chooses its tokens) or token_choice (every token chooses its number of
    recursions). Without this and the next eight, the model's values, else expert_choice and the config's defaults."""
    router_width: Literal["linear", "mlp", "wide_mlp", "random"] | None = None
    """Router architecture; random is a control."""
    router_activation: Literal["sigmoid", "softmax"] | None = None
    """Activation of the router's logits."""
    router_temperature: PositiveFloat | None = None
    """Divisor of the router's input."""
    router_alpha: PositiveFloat | None = None
    """Factor of the gates."""
    router_gate: Literal["residual", "mor"] | None = None
    """Gate of a recursion's result: residual (starts as the model without routers) or mor (as published)."""
    router_capacities: Annotated[Fractions | None, Option("--capacity")] = None
    """Fraction of the tokens that runs each recursion (expert_choice only), one value per recursion. Without it, evenly
    falling."""
    router_kv: Literal["recursion_wise", "shared"] | None = None
    """Keys and values that a recursion attends to: recursion_wise (its own) or shared (the first recursion's)."""
    router_decision: Literal["own", "auxiliary"] | None = None
    """Score that decides at inference: the router's own, or that of an auxiliary router."""
    router_warmup_fraction: Fraction = 0.0
    """Fraction of the steps over which capacities fall from 1, along a cosine (expert_choice only)."""
    router_calibrate: bool = True
    """Choose score thresholds on training text after training, so that every recursion takes the fraction that it was
    trained for (expert_choice only). Otherwise the threshold is 0.5 and the load follows from it."""
    router_weight: NonNegativeFloat = 0.001
    """Weight of the cross-entropy that trains scores to predict the top k (expert_choice only)."""
    router_balance: RouterBalance = "loss"
    """Load balancing of token_choice: a loss, a bias that follows the loads, or none."""
    router_balance_weight: NonNegativeFloat = 0.1
    """Weight of the balancing loss."""
    router_bias_rate: NonNegativeFloat = 0.001
    """Step size of the balancing bias."""
    router_z_weight: NonNegativeFloat = 0.0
    """Weight of the squared log-partition of router logits."""

    layer_tokens: PositiveInt = 32_768
    """Stage layers: tokens whose hidden states are in memory at a time, for a sweep over all layers."""
    layer_passes: PositiveInt = 4
    """Stage layers: passes of a layer over the tokens of its sweep; max_tokens counts each."""
    tie_fraction: Annotated[float, Ge(0), Lt(1)] = 0.75
    """Stage tie: fraction of the steps over which the weights of a tied group move to their mean; the rest trains the
    mean."""
    tie_noise: Fraction = 1.0
    """Stage tie: spread of a step's mixture around its expectation; 0 is deterministic."""

    eval_every: PositiveInt = 100
    """Steps between evaluations; one more follows at the end."""
    save_every: PositiveInt = 100
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep, in addition to the best."""
    report_to: Strings = ()
    """Installed trackers to report to: tensorboard, trackio, wandb, ..."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further fields of transformers' TrainingArguments (deepspeed, torch_compile, ...)."""

    def __post_init__(self) -> None:
        if "fsdp" in self.trainer:
            raise SettingsError("trainer: fsdp would shard a shared layer like any other. Use sharding: fsdp2 instead.")
