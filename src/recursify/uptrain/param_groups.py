"""Choice of trained parameters, their learning rates and scale, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from recursify import plugins
from recursify.errors import SettingsError, TrainingError
from recursify.modeling import RecursiveForCausalLM, RelaxedLinear

from .settings import UptrainSettings

OPTIMIZERS = "recursify.optimizers"
"""Entry-point group of optimizers that transformers does not have.

Each is a ``torch.optim.Optimizer`` class with an argument ``betas``. Its parameter groups have the keys ``lr``,
``weight_decay`` and ``factored`` (False for norms and biases). A class attribute ``supports_sharding = False`` refuses
sharded weights.
"""


def is_per_depth(name: str) -> bool:
    """Tell whether a parameter belongs to one depth: a residual, a norm or a bias inside the shared block."""
    return ".block." in name and not name.endswith(".linear.weight")


def is_exit_head(name: str) -> bool:
    """Tell whether a parameter belongs to an exit head."""
    return ".exit_heads." in f".{name}"


def is_router(name: str) -> bool:
    """Tell whether a parameter belongs to a router."""
    return any(part in f".{name}" for part in (".routers.", ".auxiliary_routers."))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter has weight decay: matrices do, norms and biases (``[R, O]`` when relaxed) do not."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def _plugin_optimizer(name: str) -> type[Optimizer] | None:
    if name not in plugins.names(OPTIMIZERS, {}):
        return None
    return plugins.find(OPTIMIZERS, name, {}, kind="optimizer", error=SettingsError)


def check_optimizer(settings: UptrainSettings) -> None:
    """Check that the optimizer works with the sharding.

    Raises:
        SettingsError: It factorizes matrices, and they are sharded.
    """
    plugin = _plugin_optimizer(settings.optimizer)
    factorizes = settings.optimizer == "adafactor" or not getattr(plugin, "supports_sharding", True)
    if settings.sharding != "none" and factorizes:
        raise SettingsError(
            f"optimizer '{settings.optimizer}' factorizes whole matrices, and sharding '{settings.sharding}' splits "
            f"them. Use another optimizer, or sharding none."
        )


def transformers_optimizer(settings: UptrainSettings) -> str:
    """Name of the optimizer for the Trainer's arguments; a placeholder if the optimizer is a plug-in."""
    return "adamw_torch" if _plugin_optimizer(settings.optimizer) else settings.optimizer


def find_optimizer(
    settings: UptrainSettings, arguments: TrainingArguments, model: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and its options, from a plug-in or from transformers."""
    plugin = _plugin_optimizer(settings.optimizer)
    if plugin is not None:
        return plugin, {"betas": (arguments.adam_beta1, arguments.adam_beta2)}
    return Trainer.get_optimizer_cls_and_kwargs(arguments, model)


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], settings: UptrainSettings) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, from those of the named ``parameters`` that require gradients.

    Residuals, norms and biases have their own learning rate: a shared weight sums the gradients of all depths, a
    residual has those of one, so one rate rarely suits both. Exit heads and routers have their own rates, too. Vectors
    have no weight decay.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((peak_rate(name, settings), decays(name, parameter)), []).append(parameter)
    is_plugin = _plugin_optimizer(settings.optimizer) is not None
    return [
        {"params": members, "lr": rate, "weight_decay": settings.weight_decay if decayed else 0.0}
        | ({"factored": decayed} if is_plugin else {})
        for (rate, decayed), members in groups.items()
    ]


def peak_rate(name: str, settings: UptrainSettings) -> float:
    """Peak learning rate of the parameter ``name``."""
    if is_exit_head(name):
        return settings.head_learning_rate
    if is_router(name):
        return settings.router_learning_rate
    return (settings.lora_learning_rate or settings.learning_rate) if is_per_depth(name) else settings.learning_rate


def is_trained(name: str, settings: UptrainSettings, trained_parts: frozenset[str] = frozenset()) -> bool:
    """Tell whether the parameter ``name`` is trained; exit heads and routers only if they are in ``trained_parts``."""
    if is_exit_head(name):
        return "heads" in trained_parts
    if is_router(name):
        return "routers" in trained_parts
    if settings.trainable == "lora":
        return is_per_depth(name)
    if settings.trainable == "shared":
        return ".block." in name and name.endswith(".linear.weight")
    return settings.trainable == "all"


def freeze_untrained(
    model: RecursiveForCausalLM, settings: UptrainSettings, trained_parts: frozenset[str] = frozenset()
) -> None:
    """Set ``requires_grad`` of every parameter by :func:`is_trained`.

    Raises:
        TrainingError: No parameter is trained.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, settings, trained_parts))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError(
            f"This model has no parameters of the kind trainable '{settings.trainable}'. Use another --trainable."
        )


@torch.no_grad()
def balance_factors(model: nn.Module) -> None:
    """Give both factors of every trained residual the same norm, component by component, without changing the product.

    After an SVD all singular values are in ``B``: in SmolLM2-135M the first column of ``B`` is a thousand times as long
    as the first row of ``A``. Adam moves every entry by the same amount, so a step small enough for ``A`` hardly
    changes ``B``.
    """
    for module in model.modules():
        if not isinstance(module, RelaxedLinear) or module.lora_a is None or module.lora_b is None:
            continue
        if not module.lora_a.requires_grad:
            continue
        norm_a, norm_b = module.lora_a.norm(dim=2), module.lora_b.norm(dim=1)  # [R, r] both
        scale = (norm_b / norm_a).sqrt()
        # Factors that are zero stay zero.
        scale = torch.where((norm_a > 0) & (norm_b > 0), scale, torch.ones_like(scale))
        module.lora_a.mul_(scale.unsqueeze(2))
        module.lora_b.div_(scale.unsqueeze(1))
