"""Back to stock: a recursive model as a dense checkpoint, or as a stock model with a stock peft adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.checkpoint.dense_checkpoint import RENAMED, TensorInfo, copy_auxiliary_files
from recursify.checkpoint.recursive_checkpoint import RecursiveCheckpoint
from recursify.checkpoint.writer import ShardedCheckpoint, atomic_folder, check_target
from recursify.errors import ParityError, PlanError
from recursify.modeling import RecursiveForCausalLM

from .converter import Progress

OLD_NAMES_ON_DISK = ("gpt_neox",)
"""Families whose files keep names older than transformers' current ones, so that every version reads them."""

PEFT_FAMILIES = ("llama", "mistral", "gemma", "phi3")
"""Families that peft's layer_replication repeats rightly. The others read ``config.layer_types`` by position, which
peft does not repeat, or keep their layers where it does not look."""

CHECK_TOKENS = 24
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-1}
"""Largest difference of logits after merging, relative to their standard deviation. In float32 only the order of
additions differs (measured 2e-5); in half precision the merged weight is rounded once more than the factors were."""


def export_dense(folder: Path, target: Path, *, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """Unroll the recursion and merge each depth's residual into a checkpoint of the dense family, of the dense size.

    Exit heads are left out: a stock model always runs to the end.

    Returns:
        What was written.

    Raises:
        CheckpointError, OutputError: The source is damaged, or the target cannot be written.
        PlanError: It computes what no stock layers do.
    """
    checkpoint = RecursiveCheckpoint(folder)
    _require_stock_steps(checkpoint)
    config = checkpoint.config.dense_config()
    config.dtype = checkpoint.dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    renamed = RENAMED if config.model_type in OLD_NAMES_ON_DISK else {}
    tensors = {
        renamed.get(name, name): TensorInfo(shape, checkpoint.dtype)
        for name, shape in checkpoint.names.dense_parameters.items()
    }
    num_bytes = sum(info.num_bytes for info in tensors.values())
    check_target(target, folder, overwrite=overwrite, num_bytes=num_bytes)
    with atomic_folder(target, overwrite=overwrite) as scratch:
        output = ShardedCheckpoint(scratch, tensors)
        for done, (theirs, mine, module, depth) in enumerate(checkpoint.unrolled()):
            tensor = checkpoint.read(mine) if module is None else checkpoint.read_depth(module, mine, depth)
            output.write(renamed.get(theirs, theirs), tensor)
            progress("unroll", done + 1, len(tensors))
        output.finish()
        config.save_pretrained(scratch)
        copy_auxiliary_files(folder, scratch)
    left_out = [name for name in checkpoint.tensors if name.startswith("exit_heads.")]
    return {
        "format": "dense",
        "architecture": config.architectures[0],
        "bytes": num_bytes,
        "left_out": "exit heads" if left_out else None,
    }


def export_peft(folder: Path, target: Path, *, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """A stock model of ``K`` layers in ``target``, and in ``target/adapter`` a peft LoRA that repeats them.

    The adapter's ``layer_replication`` runs the K layers once per recursion on shared base weights, each with its own
    LoRA and norms. No remote code; fixed depth.

    Raises:
        PlanError: The layout or family is one that peft cannot repeat.
    """
    checkpoint = RecursiveCheckpoint(folder)
    _require_stock_steps(checkpoint)
    _require_replicable(checkpoint)
    num_bytes = sum(info.num_bytes for info in checkpoint.tensors.values())
    check_target(target, folder, overwrite=overwrite, num_bytes=num_bytes)
    layout = checkpoint.layout
    config = checkpoint.config.dense_config()
    config.num_hidden_layers = layout.block_size
    config.dtype = checkpoint.dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).named_parameters()}
    with atomic_folder(target, overwrite=overwrite) as scratch:
        output = ShardedCheckpoint(scratch, {n: TensorInfo(tuple(s), checkpoint.dtype) for n, s in shapes.items()})
        for mine, theirs in checkpoint.names.unshared.items():
            output.write(theirs, checkpoint.read(mine))
        for index in range(layout.block_size):
            for module in checkpoint.names.stored_modules(index):
                for parameter in module.parameters:
                    tensor = (
                        checkpoint.read(f"{module.name}.linear.weight")
                        if module.is_linear and parameter == "weight"
                        else checkpoint.read_depth(module, parameter, 0)
                    )
                    output.write(checkpoint.names.dense(index, module.path, parameter), tensor)
            progress("share", index + 1, layout.block_size)
        output.finish()
        config.save_pretrained(scratch)
        copy_auxiliary_files(folder, scratch)
        _write_adapter(checkpoint, scratch / "adapter")
    return {"format": "peft", "architecture": config.architectures[0], "bytes": num_bytes, "adapter": "adapter"}


def _require_stock_steps(checkpoint: RecursiveCheckpoint) -> None:
    config = checkpoint.config
    if config.router is not None:
        raise PlanError(
            f"'{checkpoint.folder}' has {config.router} routers, and stock layers take every token. Export the model "
            f"that they were trained on instead."
        )
    if config.residual_scale != 1 or config.anderson:
        what = f"scales its layers' steps by {config.residual_scale:g}"
        if config.residual_scale == 1:
            what = f"mixes {config.anderson} earlier loops into a loop"
        raise PlanError(
            f"'{checkpoint.folder}' {what}, which stock layers do not. Export the model that it was made from, or make "
            f"it again with_recursions(..., residual_scale=1, anderson=0)."
        )


def _require_replicable(checkpoint: RecursiveCheckpoint) -> None:
    layout, family = checkpoint.layout, checkpoint.config.dense_model_type
    if checkpoint.config.exit_head is not None:
        raise PlanError(
            "peft's layer_replication has no exits, and this model has exit heads. Use --format dense, which leaves "
            "them out."
        )
    dense = "Use --format dense, which has no such limit."
    if layout.order != "cycle" or layout.num_prelude_layers or layout.num_coda_layers:
        raise PlanError(
            f"peft's layer_replication repeats a whole model, and this one is {layout} in {layout.order} order. Only "
            f"cycle sharing without prelude and coda can be written so. {dense}"
        )
    if family not in PEFT_FAMILIES:
        raise PlanError(
            f"peft's layer_replication does not repeat '{family}' rightly; it does {', '.join(PEFT_FAMILIES)}. {dense}"
        )


def _write_adapter(checkpoint: RecursiveCheckpoint, folder: Path) -> None:
    """Write the LoRA of all depths, their norms and differences of biases, in peft's format; scale 1."""
    layout = checkpoint.layout
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    norms: set[str] = set()
    has_bias = False
    for index in range(layout.block_size):
        for module in checkpoint.names.stored_modules(index):
            for depth, position in enumerate(layout.positions(index)):
                stem = f"base_model.model.{checkpoint.names.stem}.{position}.{module.path}"
                if not module.is_linear:
                    norms.add(module.path)
                    for parameter in module.parameters:
                        tensors[f"{stem}.{parameter}"] = checkpoint.read_depth(module, parameter, depth)
                    continue
                rows, columns = checkpoint.tensors[f"{module.name}.linear.weight"].shape
                left, right = (
                    torch.zeros(rows, 1, dtype=checkpoint.dtype),
                    torch.zeros(1, columns, dtype=checkpoint.dtype),
                )
                if module.rank:
                    left, right = checkpoint.read_factors(module, depth)
                tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = right, left
                ranks[f"layers.{position}.{module.path}"] = len(right)
                if "bias" in module.parameters:
                    has_bias = True
                    biases = [checkpoint.read_depth(module, "bias", d) for d in (0, depth)]
                    tensors[f"{stem}.lora_B.bias"] = biases[1] - biases[0]
    rank = max(ranks.values())
    unlike = {key: value for key, value in ranks.items() if value != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "r": rank,
        "lora_alpha": rank,
        "lora_bias": has_bias,
        "rank_pattern": unlike,
        "alpha_pattern": unlike,
        "target_modules": sorted({key.rpartition(".")[2] for key in ranks}),
        "modules_to_save": sorted({path.rpartition(".")[2] for path in norms}),
        "layer_replication": [[0, layout.block_size]] * layout.num_recursions,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


FORMATS: dict[str, Callable[..., dict[str, Any]]] = {"dense": export_dense, "peft": export_peft}


def find_format(name: str) -> Callable[..., dict[str, Any]]:
    """The exporter called ``name``.

    Raises:
        PlanError: There is none; the message lists those that exist.
    """
    if name not in FORMATS:
        raise PlanError(f"Unknown format '{name}'. Use one of: {', '.join(FORMATS)}.")
    return FORMATS[name]


@torch.inference_mode()
def check_export(folder: Path, exported: Path, form: str) -> float:
    """Largest difference of logits between a recursive model and its export, over random tokens.

    Raises:
        ParityError: It is larger than rounding explains.
    """
    model = RecursiveForCausalLM.from_pretrained(folder).eval()
    stock = AutoModelForCausalLM.from_pretrained(exported).eval()
    if form == "peft":
        from peft import PeftModel

        stock = PeftModel.from_pretrained(stock, str(exported / "adapter")).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, CHECK_TOKENS), generator=generator)
    mine, theirs = model(ids).logits.float(), stock(ids).logits.float()
    difference = float((mine - theirs).abs().max())
    if difference > TOLERANCE[model.dtype] * float(mine.std()):
        raise ParityError(
            f"The export in '{exported}' computes something else: logits differ by {difference:.3g} from '{folder}', "
            f"whose logits have a standard deviation of {float(mine.std()):.3g}. Please report this with both folders' "
            f"config.json."
        )
    return difference
