"""Parameter names of recursive models and of their dense families."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from recursify.modeling import RecursiveConfig, RecursiveForCausalLM, RelaxedLinear, SharedLayer

OUTSIDE = {
    "model.embed_tokens": ("embed_tokens", "embed_in"),
    "model.norm": ("norm", "final_layer_norm", "final_layernorm"),
    "lm_head": ("lm_head", "embed_out"),
}
"""Modules outside the layers: recursive name to the last part of their dense names."""


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


class DenseNames:
    """Mapping between parameter names of a recursive model and of its dense family.

    Attributes:
        parameters: Shapes of the recursive parameters by name, without a tied head.
        dense_parameters: Shapes of the dense parameters by name, without a tied head.
        unshared: Dense names by recursive name, of all parameters outside the shared block.
        skeleton: Recursive model on the meta device.
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

    def stored_modules(self, index: int) -> Iterator[StoredModule]:
        """Iterate over the stored modules of block layer ``index``."""
        layer = self.skeleton.model.block[index]
        assert isinstance(layer, SharedLayer)
        for path, module in layer.stored_modules():
            name = f"model.block.{index}.{path}"
            if isinstance(module, RelaxedLinear):
                parameters: tuple[str, ...] = ("weight",) if module.bias is None else ("weight", "bias")
                yield StoredModule(name, index, path, module.rank, True, parameters)
            else:
                parameters = tuple(name for name, _ in module.copies[0].named_parameters())
                yield StoredModule(name, index, path, 0, False, parameters)

    def dense(self, position: int, path: str, parameter: str) -> str:
        """Dense name of a parameter of the layer at ``position``."""
        return f"{self.stem}.{position}.{path}.{parameter}"

    def _unshared(self) -> dict[str, str]:
        names = {}
        for name in self.dense_parameters:
            if name.startswith(self.stem + "."):
                position, _, rest = name.removeprefix(self.stem + ".").partition(".")
                ref = self.layout.layer_ref(int(position))
                if ref.part != "block":
                    names[f"model.{ref.part}.{ref.index}.{rest}"] = name
                continue
            module, _, parameter = name.rpartition(".")
            for recursive_module, dense_names in OUTSIDE.items():
                if module.rpartition(".")[2] in dense_names:
                    names[f"{recursive_module}.{parameter}"] = name
        return names
