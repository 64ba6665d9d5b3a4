"""Which parameters are trained, at what rate, and by which optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from recursify.errors import TrainingError
from recursify.experiments.hfac import HFac
from recursify.modeling import RecursiveForCausalLM

from .settings import UptrainSettings

HFAC = "hfac"
"""Our own optimizer's name, beside those of transformers."""


def is_per_depth(name: str) -> bool:
    """Whether a parameter belongs to one depth: a residual, a norm or a bias inside the shared block."""
    return ".block." in name and not name.endswith(".linear.weight")


def is_exit_head(name: str) -> bool:
    """Whether a parameter belongs to an exit head."""
    return ".exit_heads." in f".{name}"


def is_router(name: str) -> bool:
    """Whether a parameter belongs to a router."""
    return any(part in f".{name}" for part in (".routers.", ".auxiliary_routers."))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms and to biases (which are ``[R, O]`` when relaxed)."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def find_optimizer(
    settings: UptrainSettings, arguments: TrainingArguments, model: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and its options: transformers' choice, or our own that it does not know."""
    if settings.optimizer == HFAC:
        return HFac, {"betas": (arguments.adam_beta1, arguments.adam_beta2)}
    return Trainer.get_optimizer_cls_and_kwargs(arguments, model)


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], settings: UptrainSettings) -> list[dict[str, Any]]:
    """Groups for an optimizer of those parameters, given with their names in the model, that require gradients.

    Residuals, norms and biases have a learning rate of their own: a shared weight gathers the gradients of all depths,
    a residual those of one, so one rate rarely fits both. So have exit heads and routers. Vectors have no weight decay.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((peak_rate(name, settings), decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": members,
            "lr": rate,
            "weight_decay": settings.weight_decay if decayed else 0.0,
            **({"factored": decayed} if settings.optimizer == HFAC else {}),
        }
        for (rate, decayed), members in groups.items()
    ]


def peak_rate(name: str, settings: UptrainSettings) -> float:
    """Learning rate, at its peak, of the parameter ``name``."""
    if is_exit_head(name):
        return settings.head_learning_rate
    if is_router(name):
        return settings.router_learning_rate
    return (settings.lora_learning_rate or settings.learning_rate) if is_per_depth(name) else settings.learning_rate


def is_trained(name: str, settings: UptrainSettings) -> bool:
    """Whether the settings train the parameter ``name``; exit heads and routers only where the stage
    has a use for them."""
    if is_exit_head(name):
        return settings.stage == "exits"
    if is_router(name):
        return settings.stage == "routers"
    if settings.trainable == "lora":
        return is_per_depth(name)
    if settings.trainable == "shared":
        return ".block." in name and name.endswith(".linear.weight")
    return settings.trainable == "all"


def choose_trained(model: RecursiveForCausalLM, settings: UptrainSettings) -> None:
    """Freeze what the settings leave out.

    Raises:
        TrainingError: Nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, settings))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(f"This model has no parameters that trainable '{settings.trainable}' names.")
