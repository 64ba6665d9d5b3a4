"""Export of recursive models for stock libraries: a dense checkpoint, or a stock model with a peft adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.checkpoint.dense_checkpoint import copy_auxiliary_files
from recursify.checkpoint.loading import require_recursive
from recursify.checkpoint.recursive_checkpoint import RecursiveCheckpoint
from recursify.checkpoint.shards import TensorInfo
from recursify.checkpoint.writer import ShardedCheckpoint, atomic_folder, check_target
from recursify.errors import ParityError, PlanError
from recursify.modeling import RecursiveConfig, RecursiveForCausalLM
from recursify.progress import Progress, silent

RENAMED = {"lm_head.weight": "embed_out.weight"}
"""Parameter names that transformers changed since checkpoints were written: current name to name on disk."""

OLD_NAMES_ON_DISK = ("gpt_neox",)
"""Families written with the parameter names of older transformers versions, which all versions read."""

OLD_ROTARY_FIELDS = ("gpt_neox", "cohere2")
"""Families whose converter in llama.cpp reads ``rotary_pct``, which transformers 5 keeps in ``rope_parameters``."""

PEFT_FAMILIES = ("llama", "mistral", "gemma", "phi3")
"""Families that peft's layer_replication repeats correctly. The others read ``config.layer_types`` by position, which
peft does not repeat, or keep their layers where it does not look."""

CHECK_TOKENS = 24
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-1}
"""Largest difference of logits after merging, relative to their standard deviation. In float32 only the order of
additions differs (measured 2e-5); in half precision the merged weight is rounded once more than the factors were."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Result of :func:`export_model`.

    Attributes:
        output: Folder of the exported model.
        format: ``dense`` or ``peft``.
        architecture: Class of the stock model in transformers.
        num_bytes: Bytes of weights.
        left_out: Parts of the recursive model that the export does not have.
        adapter: Subfolder of the peft adapter.
        max_logit_difference: Largest difference of logits; None if the check was switched off.
    """

    output: Path
    format: str
    architecture: str
    num_bytes: int
    left_out: str | None = None
    adapter: str | None = None
    max_logit_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, as ``recursify export --json`` prints it."""
        facts = {name: value for name, value in vars(self).items() if name != "num_bytes"}
        return {**facts, "output": str(self.output), "bytes": self.num_bytes}


def export_model(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "dense",
    check: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Write a recursive model for stock libraries: no remote code, fixed depth.

    ``dense`` unrolls the recursion and merges each depth's residual into a checkpoint of the dense family and size.
    ``peft`` writes the ``K`` shared layers as a stock model, and in ``adapter`` a LoRA whose ``layer_replication``
    runs them once per recursion. Exit heads are not exported.

    Args:
        model: Folder of the recursive model.
        output: Folder to write; it appears when it is complete.
        format: One of :data:`FORMATS`.
        check: Compare the logits of both models. Both are loaded into memory.
        overwrite: Replace an existing ``output``.
        progress: Callback for progress.

    Raises:
        PlanError: The format is unknown, or cannot express this model.
        CheckpointError: The model is damaged.
        OutputError: The output cannot be written.
        ParityError: The logits differ by more than rounding.
    """
    folder, target = require_recursive(model), Path(output)
    if format not in FORMATS:
        raise PlanError(f"Unknown format '{format}'. Use one of: {', '.join(FORMATS)}.")
    checkpoint = RecursiveCheckpoint(folder)
    _require_stock_steps(checkpoint)
    if format == "peft":
        _require_replicable(checkpoint)
    architecture, num_bytes = _write_stock_model(checkpoint, target, format, overwrite=overwrite, progress=progress)
    return ExportResult(
        output=target,
        format=format,
        architecture=architecture,
        num_bytes=num_bytes,
        left_out="exit heads" if any(name.startswith("exit_heads.") for name in checkpoint.tensors) else None,
        adapter="adapter" if format == "peft" else None,
        max_logit_difference=check_export(folder, target, format) if check else None,
    )


def _write_stock_model(
    checkpoint: RecursiveCheckpoint, target: Path, format: str, *, overwrite: bool, progress: Progress
) -> tuple[str, int]:
    """Write the files of an export; returns the model's class and the bytes of weights."""
    config = stock_config(checkpoint.config)
    if format == "peft":
        config.num_hidden_layers = checkpoint.layout.block_size
    config.dtype = checkpoint.dtype
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [model_class.__name__]
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in model_class(config).named_parameters()}
    renamed = RENAMED if config.model_type in OLD_NAMES_ON_DISK else {}
    tensors = {renamed.get(name, name): TensorInfo(shape, checkpoint.dtype) for name, shape in shapes.items()}
    num_bytes = sum(info.num_bytes for info in (checkpoint.tensors if format == "peft" else tensors).values())
    check_target(target, checkpoint.folder, overwrite=overwrite, num_bytes=num_bytes)
    with atomic_folder(target, overwrite=overwrite) as scratch:
        output = ShardedCheckpoint(scratch, tensors)
        for done, (name, tensor) in enumerate(FORMATS[format](checkpoint)):
            output.write(renamed.get(name, name), tensor)
            progress("export", done + 1, len(tensors))
        output.finish()
        config.save_pretrained(scratch)
        copy_auxiliary_files(checkpoint.folder, scratch)
        if format == "peft":
            _write_adapter(checkpoint, scratch / "adapter")
    return model_class.__name__, num_bytes


def stock_config(config: RecursiveConfig) -> PreTrainedConfig:
    """Config of the dense family, with the older field that llama.cpp's converter needs."""
    dense = config.dense_config()
    if dense.model_type in OLD_ROTARY_FIELDS:
        dense.rotary_pct = dense.rope_parameters.get("partial_rotary_factor", 1.0)
    return dense


def _shared_layers(checkpoint: RecursiveCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Read a stock model of the ``K`` shared layers: dense names and tensors; vectors are those of depth 0."""
    names = checkpoint.names
    for name, dense_name in names.unshared.items():
        yield dense_name, checkpoint.read(name)
    for module in names.stored_modules():
        for parameter in module.parameters:
            is_shared = module.is_linear and parameter == "weight"
            stored = checkpoint.read(module.shared_weight) if is_shared else module.read(checkpoint, parameter, 0)
            yield names.dense(module.index, module.path, parameter), stored


FORMATS: dict[str, Callable[[RecursiveCheckpoint], Iterator[tuple[str, Tensor]]]] = {
    "dense": RecursiveCheckpoint.unrolled,
    "peft": _shared_layers,
}
"""Export formats by name, with the tensors that each writes."""


def _require_stock_steps(checkpoint: RecursiveCheckpoint) -> None:
    config = checkpoint.config
    if config.router is not None:
        raise PlanError(
            f"'{checkpoint.folder}' has {config.router} routers, and stock layers process every token. Export the "
            f"model that the routers were added to."
        )
    difference = f"mixes {config.anderson} earlier recursions into each one" if config.anderson else ""
    if config.residual_scale != 1:
        difference = f"scales its layers' updates by {config.residual_scale:g}"
    if difference:
        raise PlanError(
            f"'{checkpoint.folder}' {difference}, which stock layers cannot do. Export the model that it was made "
            f"from, or make it with_recursions(..., residual_scale=1, anderson=0)."
        )


def _require_replicable(checkpoint: RecursiveCheckpoint) -> None:
    layout, family = checkpoint.layout, checkpoint.config.dense_model_type
    if checkpoint.config.exit_head is not None:
        raise PlanError(
            "peft's layer_replication does not support exits, and this model has exit heads. Use --format dense, "
            "which drops them."
        )
    remedy = "Use --format dense, which has no such limit."
    if layout.order != "cycle" or layout.num_prelude_layers or layout.num_coda_layers:
        raise PlanError(
            f"peft's layer_replication repeats a whole model, and this one is {layout} in {layout.order} order. Only "
            f"cycle sharing without prelude and coda can be exported. {remedy}"
        )
    if family not in PEFT_FAMILIES:
        raise PlanError(
            f"peft's layer_replication does not support '{family}', only {', '.join(PEFT_FAMILIES)}. {remedy}"
        )


def _write_adapter(checkpoint: RecursiveCheckpoint, folder: Path) -> None:
    """Write the LoRA factors, norms and bias differences of all depths in peft's format, with scale 1."""
    layout = checkpoint.layout
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    modules = list(checkpoint.names.stored_modules())
    for module in modules:
        for depth, position in enumerate(layout.positions(module.index)):
            stem = f"base_model.model.{checkpoint.names.stem}.{position}.{module.path}"
            if not module.is_linear:
                for parameter in module.parameters:
                    tensors[f"{stem}.{parameter}"] = module.read(checkpoint, parameter, depth)
                continue
            if module.rank:
                left, right = module.read_factors(checkpoint, depth)
            else:
                rows, columns = checkpoint.tensors[module.shared_weight].shape
                left, right = (torch.zeros(size, dtype=checkpoint.dtype) for size in ((rows, 1), (1, columns)))
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = right, left
            ranks[f"layers.{position}.{module.path}"] = len(right)
            if "bias" in module.parameters:
                first, bias = (module.read(checkpoint, "bias", d) for d in (0, depth))
                tensors[f"{stem}.lora_B.bias"] = bias - first
    rank = max(ranks.values())
    other_ranks = {key: value for key, value in ranks.items() if value != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "r": rank,
        "lora_alpha": rank,
        "lora_bias": any(module.is_linear and "bias" in module.parameters for module in modules),
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": sorted({module.path.rpartition(".")[2] for module in modules if module.is_linear}),
        "modules_to_save": sorted({module.path.rpartition(".")[2] for module in modules if not module.is_linear}),
        "layer_replication": [[0, layout.block_size]] * layout.num_recursions,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


@torch.inference_mode()
def check_export(folder: Path, exported: Path, format: str) -> float:
    """Largest difference of logits between a recursive model and its export, over random tokens.

    Raises:
        ParityError: It exceeds :data:`TOLERANCE`.
    """
    model = RecursiveForCausalLM.from_pretrained(folder).eval()
    stock = AutoModelForCausalLM.from_pretrained(exported).eval()
    if format == "peft":
        from peft import PeftModel

        stock = PeftModel.from_pretrained(stock, str(exported / "adapter")).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits.float()
    difference, deviation = float((logits - stock(ids).logits.float()).abs().max()), float(logits.std())
    if difference > TOLERANCE[model.dtype] * deviation:
        raise ParityError(
            f"The export in '{exported}' is wrong: its logits differ from those of '{folder}' by {difference:.3g}, at "
            f"a standard deviation of {deviation:.3g}. Please report this with both folders' config.json."
        )
    return difference
