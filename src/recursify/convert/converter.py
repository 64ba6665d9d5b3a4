"""Execution of a conversion plan: dense checkpoint in, recursive checkpoint out, a few layers in memory at a time."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint
from recursify.checkpoint.dense_names import DenseNames, StoredModule
from recursify.checkpoint.record import write_model_files
from recursify.checkpoint.writer import ShardedCheckpoint, atomic_folder, check_target
from recursify.evaluation.text import Text
from recursify.progress import Progress

from .calibration import Calibration
from .factors import write_factors
from .initialization import average, find_initialization
from .plan import ConversionPlan
from .relaxation import find_relaxation


def write_recursive_model(
    checkpoint: DenseCheckpoint,
    plan: ConversionPlan,
    target: Path,
    *,
    text: Text | None,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write the recursive model that ``plan`` describes into ``target``.

    Args:
        checkpoint: Dense model that the plan was made for.
        plan: Plan from :func:`recursify.convert.plan.make_plan`.
        target: Folder to write; it appears when it is complete.
        text: Calibration text, required if ``plan.needs_text``.
        overwrite: Replace an existing target.
        progress: Callback for progress.

    Returns:
        Contents of ``recursify.json``.

    Raises:
        OutputError: The target cannot be written; nothing was.
        CheckpointError: A tensor cannot be read or holds NaN; nothing was written.
        TextError: The text is too short.
    """
    check_target(target, checkpoint.location, overwrite=overwrite, num_bytes=int(plan.recursive.num_bytes * 1.02))
    with atomic_folder(target, overwrite=overwrite) as folder:
        calibration = None
        if plan.needs_text:
            assert text is not None, "make_plan refuses plans that need text without it"
            calibration = Calibration(checkpoint, plan, text, progress)
            plan = calibration.allocate_ranks()
        output = ShardedCheckpoint(folder, plan.tensors)
        _write_unshared(checkpoint, plan, output, progress)
        if calibration is None:
            _write_block(checkpoint, plan, output, progress)
        record = {
            "recursify_version": version("recursify"),
            "format_version": plan.config.format_version,
            "made_with": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "base": checkpoint.origin().to_dict(),
            "plan": plan.to_dict(),
            "settings": plan.settings.to_dict(),
            "calibration": {} if calibration is None else calibration.run(output),
            "evaluation": [],
            "history": [],
        }
        output.finish()
        checkpoint.save_auxiliary_files(folder)
        write_model_files(folder, plan.config, record)
    return record


def _write_unshared(
    checkpoint: DenseCheckpoint, plan: ConversionPlan, output: ShardedCheckpoint, progress: Progress
) -> None:
    """Copy embedding, prelude, coda, final norm, head, and the norms and biases of the shared block."""
    names = DenseNames(plan.config)
    for done, (name, dense_name) in enumerate(names.unshared.items()):
        output.write(name, checkpoint.read(dense_name))
        progress("copy", done + 1, len(names.unshared))
    for index in range(plan.layout.block_size):
        positions = plan.sources[index] if plan.settings.tie_norms else plan.layout.positions(index)
        for module in names.stored_modules(index):
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
    names = DenseNames(plan.config)
    generator = torch.Generator().manual_seed(plan.settings.seed)
    for index in range(plan.layout.block_size):
        for module in names.stored_modules(index):
            if module.is_linear:
                _write_linear(checkpoint, plan, names, module, output, generator)
        progress("share", index + 1, plan.layout.block_size)


def _write_linear(
    checkpoint: DenseCheckpoint,
    plan: ConversionPlan,
    names: DenseNames,
    module: StoredModule,
    output: ShardedCheckpoint,
    generator: torch.Generator,
) -> None:
    sources = [checkpoint.read(names.dense(p, module.path, "weight")) for p in plan.sources[module.index]]
    if find_initialization(plan.settings.initialization).from_scratch:
        std = getattr(plan.config, "initializer_range", 0.02)
        shared = torch.randn(sources[0].shape, generator=generator) * std
    else:
        shared = sources[0] if len(sources) == 1 else average(sources)
    output.write(f"{module.name}.linear.weight", shared)
    if not module.rank:
        return
    # Residuals are taken against the weight on disk, so that they also correct its rounding.
    shared = output.read(f"{module.name}.linear.weight").float()
    del sources
    factors = find_relaxation(plan.settings.relaxation).factors
    assert factors is not None, "relaxations without factors are fitted by the calibration"
    pairs = []
    for position in plan.layout.positions(module.index):
        dense = checkpoint.read(names.dense(position, module.path, "weight")).float()
        pairs.append(factors(dense - shared, module.rank, generator))
    write_factors(output, module, pairs)
