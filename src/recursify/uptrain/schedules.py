"""The number of recursions of each training step."""

from __future__ import annotations

import math
import random

from transformers import TrainerState

from recursify.modeling import LayerLayout

from .settings import UptrainSettings


def fewest_recursions(settings: UptrainSettings, num_recursions: int, progress: float) -> int:
    """The smallest number of recursions that may be drawn at ``progress`` (0 .. 1) of a run.

    It falls from all to one over the first ``recursion_curriculum`` of the steps: a converted model is good at full
    depth only and learns shallower depths from there.
    """
    if settings.recursion_curriculum == 0:
        return 1
    done = min(1.0, progress / settings.recursion_curriculum)
    return max(1, num_recursions - math.floor(done * num_recursions))


def draw_recursions(settings: UptrainSettings, layout: LayerLayout, state: TrainerState) -> int | None:
    """Number of recursions of the step after ``state.global_step``; None for all.

    It depends on seed and step only, so that all ranks and a resumed run draw the same: if ranks ran different numbers,
    their collectives would wait for each other forever.
    """
    if not settings.random_recursions:
        return None
    progress = state.global_step / max(1, state.max_steps)
    fewest = fewest_recursions(settings, layout.num_recursions, progress)
    return random.Random(f"{settings.seed}:{state.global_step}").randint(fewest, layout.num_recursions)
