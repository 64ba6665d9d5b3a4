"""Execution of a dense model one layer at a time, with access to the inputs of its linear maps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from recursify.modeling import RecursiveConfig
from recursify.modeling.recursive_layers import CACHE_ARGUMENT, DenseFamily

from .dense_checkpoint import DenseCheckpoint

TOKENS_PER_BATCH = 4096


class _ZeroLinear(nn.Module):
    """Replacement of a linear map that returns zeros."""

    def __init__(self, replaced: nn.Module):
        super().__init__()
        assert isinstance(replaced, nn.Linear)
        self.out_features = replaced.out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Layerwise:
    """Dense model whose layers are loaded, run in float32 on a whole text, and released one by one.

    Only RoPE stays in memory. The caller keeps the hidden states, as a list of batches ``[b, T, D]``.

    Attributes:
        stages: Paths of a layer's linear maps in order of execution, grouped by their input tensor.
        writes: True for each stage whose output is added to the residual stream without a norm.

    Args:
        checkpoint: Dense model.
        config: Recursive config made from it (layers are built as the recursive model builds them).
        device: Device for the layers.
    """

    def __init__(self, checkpoint: DenseCheckpoint, config: RecursiveConfig, device: str = "cpu"):
        self.checkpoint = checkpoint
        # A private copy, since building layers modifies the config.
        self.config = copy.deepcopy(config)
        self.device = device
        self.family = DenseFamily(self.config)
        self.stem = f"{self.family.model_class.base_model_prefix}.layers"
        self.rotary_emb = self._computed(self.family.rotary_emb)
        self._cached_arguments: dict[tuple[torch.Size, int], dict[str, Any]] = {}
        self.stages, self.writes = self._find_stages()

    def _computed(self, module: nn.Module) -> nn.Module:
        """Materialize a module, its buffers computed (RoPE)."""
        module = module.to_empty(device=self.device)
        self.family.skeleton._init_weights(module)
        return module

    def embed(self, windows: Tensor) -> list[Tensor]:
        """Compute the hidden states of token ids ``[N, T]`` before the first layer, in batches."""
        module = self._computed(copy.deepcopy(self.family.embed_tokens))
        # Rows of the text's own tokens: the whole table of a large vocabulary takes more memory than all layers here.
        tokens, ids = torch.unique(windows, return_inverse=True)
        weight = self.checkpoint.read(self.checkpoint.embedding_name)[tokens].to(self.device, torch.float32)
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.padding_idx = None  # type: ignore[assignment]  # matters to gradients alone, but is checked
        return self.split(module(ids.to(self.device)))

    def split(self, hidden: Tensor) -> list[Tensor]:
        """Batches of about ``TOKENS_PER_BATCH`` tokens of hidden states ``[N, T, D]``, each in its own memory."""
        batches = hidden.to(self.device).split(max(1, TOKENS_PER_BATCH // hidden.shape[1]))
        return [batch.clone() for batch in batches]

    def load(self, position: int) -> nn.Module:
        """Load the dense layer at ``position`` in float32."""
        names = [name for name, _ in self.family.layers[position].named_parameters()]
        return self.build(position, {n: self.checkpoint.read(f"{self.stem}.{position}.{n}") for n in names})

    def build(self, position: int, parameters: dict[str, Tensor]) -> nn.Module:
        """Make a layer for ``position`` from its parameters by name, in float32."""
        layer = copy.deepcopy(self.family.layers[position])
        state = {name: parameter.to(self.device, torch.float32) for name, parameter in parameters.items()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).eval()

    def run(
        self, layer: Callable[..., Tensor], position: int, hidden: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run a layer, ``[b, T, D] -> [b, T, D]``; a packed document begins where ``position_ids [b, T]`` restart."""
        if position_ids is not None:
            return layer(hidden, **self._arguments(position, hidden, position_ids))
        key = (hidden.shape[:2], position)
        if key not in self._cached_arguments:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            # One entry at a time, since masks are as large as hidden states.
            self._cached_arguments = {key: self._arguments(position, hidden, positions)}
        return layer(hidden, **self._cached_arguments[key])

    def pass_layer(self, position: int, hidden: list[Tensor]) -> list[Tensor]:
        """Load the layer at ``position``, run it on batches ``[b, T, D]``, and release it."""
        layer = self.load(position)
        return [self.run(layer, position, batch) for batch in hidden]

    def observe(
        self, layer: nn.Module, position: int, hidden: Tensor, paths: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`run`, and the inputs of the linear maps at ``paths``, each ``[b·T, I]``."""
        inputs: dict[str, Tensor] = {}

        def record(path: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[path] = arguments[0].flatten(0, -2)

        hooks = [layer.get_submodule(path).register_forward_pre_hook(partial(record, path)) for path in paths]
        try:
            return self.run(layer, position, hidden), inputs
        finally:
            for hook in hooks:
                hook.remove()

    def run_in_stages(
        self, layer: nn.Module, position: int, hidden: Tensor, visit: Callable[[int, Tensor, Tensor | None], None]
    ) -> Tensor:
        """:meth:`run`, with a call of ``visit(stage, inputs, stream)`` before each stage, which may change its weights.

        ``inputs [b·T, I]`` are those of the stage's linear maps; ``stream [b·T, D]`` is the residual stream that it
        writes to, None if it does not write to it directly (q/k/v, or an output followed by a norm).
        """
        stream = hidden.flatten(0, -2)

        def before(stage: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            visit(stage, arguments[0].flatten(0, -2), stream if self.writes[stage] else None)

        def after(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal stream
            stream = stream + output.flatten(0, -2)

        hooks: list[Any] = []
        for index, stage in enumerate(self.stages):
            first = layer.get_submodule(stage[0])
            hooks.append(first.register_forward_pre_hook(partial(before, index)))
            if self.writes[index]:
                hooks.append(first.register_forward_hook(after))
        try:
            return self.run(layer, position, hidden)
        finally:
            for hook in hooks:
                hook.remove()

    def _arguments(self, position: int, hidden: Tensor, position_ids: Tensor) -> dict[str, Any]:
        masks = create_masks_for_generate(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            position_ids=position_ids,
            **{CACHE_ARGUMENT: None},
        )
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[position] if kinds else None
        rope = (position_ids, kind) if self.family.rope_by_layer_type else (position_ids,)
        return {
            "attention_mask": masks[kind] if isinstance(masks, dict) else masks,
            "position_embeddings": self.rotary_emb(hidden, *rope),
            "position_ids": position_ids,
            "use_cache": False,
            self.family.cache_argument: None,
        }

    def _find_stages(self) -> tuple[list[list[str]], list[bool]]:
        """Find :attr:`stages` and :attr:`writes` by running a random layer.

        Maps with the same input tensor form one stage; for Llama: q/k/v, o, gate/up, down. Fused, parallel and
        sandwich-normed layers therefore need no table.
        """
        layer = copy.deepcopy(self.family.layers[0]).to_empty(device=self.device)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        layer.requires_grad_(False).eval()
        stages: list[list[str]] = []
        inputs: list[Tensor] = []  # kept alive, so that identity means the same tensor
        outputs: dict[str, Tensor] = {}

        def record(path: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[path] = output
            for stage, tensor in zip(stages, inputs, strict=True):
                if tensor is arguments[0]:
                    stage.append(path)
                    return
            stages.append([path])
            inputs.append(arguments[0])

        linears = [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_hook(partial(record, path)) for path, module in linears]
        hidden = torch.randn(1, 4, self.config.hidden_size, device=self.device)
        self.run(layer, 0, hidden)
        for hook in hooks:
            hook.remove()
        return stages, self._find_writers(layer, hidden, stages, outputs)

    def _find_writers(
        self, layer: nn.Module, hidden: Tensor, stages: list[list[str]], outputs: dict[str, Tensor]
    ) -> list[bool]:
        """Tell for each stage whether its output is added to the residual stream directly.

        The stream before it must be the layer's input and the outputs of the writers before.
        """
        writes, stream = [], hidden
        for index, stage in enumerate(stages):
            output = outputs[stage[0]]
            is_writer = len(stage) == 1 and output.shape == hidden.shape
            if is_writer:
                without, with_it = (self._run_without(layer, hidden, stages[first:]) for first in (index, index + 1))
                pairs = ((without, stream), (with_it - without, output))
                is_writer = all(torch.allclose(got, wanted, rtol=1e-4, atol=1e-5) for got, wanted in pairs)
            writes.append(is_writer)
            stream = stream + output if is_writer else stream
        return writes

    def _run_without(self, layer: nn.Module, hidden: Tensor, stages: list[list[str]]) -> Tensor:
        """Output of the layer at 0 with the maps of ``stages`` returning zeros."""
        ablated = copy.deepcopy(layer)
        for path in [path for stage in stages for path in stage]:
            ablated.set_submodule(path, _ZeroLinear(layer.get_submodule(path)))
        return self.run(ablated, 0, hidden)
