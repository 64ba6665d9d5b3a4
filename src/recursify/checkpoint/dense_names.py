"""Parameters of recursive models by name, module and depth, and their names in the dense families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.modeling import RecursiveConfig, RecursiveForCausalLM, RelaxedLinear, SharedLayer, UnsupportedFamily

from .shards import TensorInfo
from .writer import ShardedCheckpoint

OUTSIDE = {
    "model.embed_tokens": ("embed_tokens", "embed_in"),
    "model.norm": ("norm", "final_layer_norm", "final_layernorm"),
    "lm_head": ("lm_head", "embed_out"),
}
"""Modules outside the layers: recursive name to the last part of their dense names."""

Factors = tuple[Tensor, Tensor]
"""LoRA factors ``(B [O, r], A [r, I])``."""


def merge_factors(weight: Tensor, factors: Factors) -> Tensor:
    """``W + B A``, ``[O, I]``, in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    b, a = (factor.to(dtype) for factor in factors)
    return weight.to(dtype) + b @ a


class ReadableTensors(Protocol):
    """Tensors of a recursive model: a folder, or one that is being written."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class StoredModule:
    """Module of the shared block.

    Attributes:
        name: Name in the recursive model (``model.block.3.self_attn.q_proj``).
        index: Block layer.
        path: Path inside the family's layer.
        rank: LoRA rank; 0 for norms.
        is_linear: True for a relaxed linear map, False for a per-depth norm.
        parameters: Names of the dense module's parameters (``weight``, ``bias``).
    """

    name: str
    index: int
    path: str
    rank: int
    is_linear: bool
    parameters: tuple[str, ...]

    @property
    def shared_weight(self) -> str:
        """Name of a linear map's shared weight."""
        return f"{self.name}.linear.weight"

    def read(self, source: ReadableTensors, parameter: str, depth: int) -> Tensor:
        """Dense parameter at ``depth``; merged weights are in float32 or better."""
        if not self.is_linear:
            is_tied = f"{self.name}.copies.{depth}.{parameter}" not in source.tensors
            return source.read(f"{self.name}.copies.{0 if is_tied else depth}.{parameter}")
        if parameter == "bias":
            biases = source.read(f"{self.name}.bias")
            return biases[depth if len(biases) > 1 else 0]
        weight = source.read(self.shared_weight)
        if not self.rank:
            return weight
        return merge_factors(weight, self.read_factors(source, depth))

    def read_factors(self, source: ReadableTensors, depth: int) -> Factors:
        """LoRA factors at one depth."""
        return source.read(f"{self.name}.lora_b")[depth], source.read(f"{self.name}.lora_a")[depth]

    def write_linear(
        self,
        output: ShardedCheckpoint,
        shared: Tensor,
        weights: Iterable[Tensor],
        fit: Callable[[int, Tensor, int], Factors],
    ) -> None:
        """Write a shared weight ``[O, I]`` and the residuals of all depths.

        Residuals are taken against the weight on disk, so that they also correct its rounding.

        Args:
            output: Checkpoint to write.
            shared: Shared weight.
            weights: Dense weights by depth.
            fit: Function from a depth, its residual ``[O, I]``, float32, and a rank to factors.
        """
        output.write(self.shared_weight, shared)
        if self.rank:
            shared = output.read(self.shared_weight).float()
            residuals = (weight.float() - shared.to(weight.device) for weight in weights)
            factors = [fit(depth, residual, self.rank) for depth, residual in enumerate(residuals)]
            output.write(f"{self.name}.lora_b", torch.stack([b for b, _ in factors]))
            output.write(f"{self.name}.lora_a", torch.stack([a for _, a in factors]))

    def write_factors(self, output: ShardedCheckpoint, depth: int, factors: Factors) -> None:
        """Write the factors of one depth."""
        for name, factor in zip(("lora_b", "lora_a"), factors, strict=True):
            output.write_row(f"{self.name}.{name}", depth, factor)


class DenseNames:
    """Mapping between parameter names of a recursive model and of its dense family.

    Attributes:
        parameters: Shapes of the recursive parameters by name, without a tied head.
        dense_parameters: Shapes of the dense parameters by name, without a tied head.
        unshared: Dense names by recursive name, of all parameters outside the shared block.
        skeleton: Recursive model on the meta device.

    Raises:
        UnsupportedFamily: A dense parameter has no counterpart.
    """

    def __init__(self, config: RecursiveConfig):
        dense_config = config.dense_config()
        with torch.device("meta"):
            self.skeleton = RecursiveForCausalLM(config)
            dense = MODEL_FOR_CAUSAL_LM_MAPPING[type(dense_config)](dense_config)
        self.layout = config.layout
        self.parameters = {name: tuple(p.shape) for name, p in self.skeleton.named_parameters()}
        self.dense_parameters = {name: tuple(p.shape) for name, p in dense.named_parameters()}
        self.stem = f"{dense.base_model_prefix}.layers"
        self.unshared = self._unshared()

    def stored_modules(self, index: int | None = None) -> Iterator[StoredModule]:
        """Iterate over the stored modules of block layer ``index``, or of all."""
        for block_index in range(self.layout.block_size) if index is None else [index]:
            layer = self.skeleton.model.block[block_index]
            assert isinstance(layer, SharedLayer)
            for path, module in layer.stored_modules():
                name = f"model.block.{block_index}.{path}"
                if isinstance(module, RelaxedLinear):
                    parameters: tuple[str, ...] = ("weight",) if module.bias is None else ("weight", "bias")
                    yield StoredModule(name, block_index, path, module.rank, True, parameters)
                else:
                    parameters = tuple(name for name, _ in module.copies[0].named_parameters())
                    yield StoredModule(name, block_index, path, 0, False, parameters)

    def dense(self, position: int, path: str, parameter: str) -> str:
        """Dense name of a parameter of the layer at ``position``."""
        return f"{self.stem}.{position}.{path}.{parameter}"

    def _unshared(self) -> dict[str, str]:
        recursive_modules = {dense: recursive for recursive, names in OUTSIDE.items() for dense in names}
        names = {}
        for name in self.dense_parameters:
            if name.startswith(self.stem + "."):
                position, _, rest = name.removeprefix(self.stem + ".").partition(".")
                ref = self.layout.layer_ref(int(position))
                if ref.part != "block":
                    names[f"model.{ref.part}.{ref.index}.{rest}"] = name
                continue
            module, _, parameter = name.rpartition(".")
            module = module.rpartition(".")[2]
            if module not in recursive_modules:
                raise UnsupportedFamily(f"A recursive model has no place for the parameter '{name}'.")
            names[f"{recursive_modules[module]}.{parameter}"] = name
        return names
