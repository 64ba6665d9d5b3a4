"""Execution of a conversion plan: dense checkpoint in, recursive checkpoint out, a few layers in memory at a time."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.dense_names import Factors
from recursify.checkpoint.record import write_model_files
from recursify.checkpoint.writer import ShardedCheckpoint, atomic_folder, check_target
from recursify.evaluation.text import Text
from recursify.progress import Progress

from .calibration import Calibration
from .initialization import average
from .plan import ConversionPlan
from .relaxation import find_relaxation
from .unfinished import UnfinishedConversion


def write_recursive_model(
    checkpoint: DenseCheckpoint,
    plan: ConversionPlan,
    target: Path,
    *,
    text: Text | None,
    overwrite: bool,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write the recursive model that ``plan`` describes into ``target``, which appears when it is complete.

    The calibration ``text`` is required if ``plan.needs_text``. With ``resume``, an interrupted conversion into the
    same target goes on at its last finished layer.

    Returns:
        Contents of ``recursify.json``.

    Raises:
        OutputError: The target cannot be written; nothing was.
        CheckpointError: A tensor cannot be read or holds NaN; nothing was written.
        TextError: The text is too short.
    """
    check_target(target, checkpoint.location, overwrite=overwrite, num_bytes=int(plan.recursive.num_bytes * 1.02))
    with atomic_folder(target, overwrite=overwrite, resume=resume) as folder:
        calibration = unfinished = None
        if plan.needs_text:
            assert text is not None, "make_plan refuses plans that need text without it"
            calibration = Calibration(checkpoint, plan, text, progress)
            unfinished = UnfinishedConversion(folder, calibration.facts(), calibration.generator)
            plan = calibration.allocate_ranks()
        output = ShardedCheckpoint(folder, plan.tensors, unwritten=None if unfinished is None else unfinished.unwritten)
        _write_unshared(checkpoint, plan, output, progress)
        if calibration is None:
            _write_block(checkpoint, plan, output, progress)
        record = {
            "recursify_version": version("recursify"),
            "format_version": plan.config.format_version,
            "made_with": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "base": asdict(checkpoint.origin()),
            "plan": plan.to_dict(),
            "settings": plan.settings.to_dict(),
            "calibration": calibration.run(output, unfinished) if calibration and unfinished else {},
            "evaluation": [],
            "history": [],
        }
        output.finish()
        if unfinished is not None:
            unfinished.finish()
        checkpoint.save_auxiliary_files(folder)
        write_model_files(folder, plan.config, record)
    return record


def _write_unshared(
    checkpoint: DenseCheckpoint, plan: ConversionPlan, output: ShardedCheckpoint, progress: Progress
) -> None:
    """Copy embedding, prelude, coda, final norm, head, and the norms and biases of the shared block."""
    names = plan.names
    for done, (name, dense_name) in enumerate(names.unshared.items()):
        output.write(name, checkpoint.read(dense_name))
        progress("copy", done + 1, len(names.unshared))
    for module in names.stored_modules():
        positions = plan.sources[module.index] if plan.settings.tie_norms else plan.layout.positions(module.index)
        for parameter in module.parameters:
            if module.is_linear and parameter == "weight":
                continue
            vectors = [checkpoint.read(names.dense(p, module.path, parameter)) for p in positions]
            if plan.settings.tie_norms:
                vectors = [average(vectors).to(vectors[0].dtype)]
            if module.is_linear:
                output.write(f"{module.name}.bias", torch.stack(vectors))
            else:
                for depth, vector in enumerate(vectors):
                    output.write(f"{module.name}.copies.{depth}.{parameter}", vector)


def _write_block(
    checkpoint: DenseCheckpoint, plan: ConversionPlan, output: ShardedCheckpoint, progress: Progress
) -> None:
    """Write shared weights and residuals without text, one linear map of one shared layer at a time."""
    names = plan.names
    factors = find_relaxation(plan.settings.relaxation).factors
    assert factors is not None, "relaxations without factors are fitted by the calibration"
    generator = torch.Generator().manual_seed(plan.settings.seed)

    def fit(depth: int, residual: Tensor, rank: int) -> Factors:
        return factors(residual, rank, generator)

    for module in names.stored_modules():
        if module.is_linear:
            shared = plan.initial_weight(checkpoint, module, generator)
            dense_names = [names.dense(p, module.path, "weight") for p in plan.layout.positions(module.index)]
            module.write_linear(output, shared, map(checkpoint.read, dense_names), fit)
        progress("share", module.index + 1, plan.layout.block_size)
