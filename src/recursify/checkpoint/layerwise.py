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


class _StopForward(Exception):
    """Signal that ends a layer's forward once the input has been recorded."""


class _ZeroLinear(nn.Module):
    """Replacement of a linear map that records its input, and returns zeros or stops the layer."""

    def __init__(self, replaced: nn.Module, *, stops: bool = False):
        super().__init__()
        assert isinstance(replaced, nn.Linear)
        self.out_features = replaced.out_features
        self.stops = stops
        self.input: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.input = x.flatten(0, -2)
        if self.stops:
            raise _StopForward
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Layerwise:
    """Dense model whose layers are loaded, run in float32 on a whole text, and released one by one.

    Only the token ids and RoPE stay in memory. The caller keeps the hidden states, as a list of batches ``[b, T, D]``.

    Attributes:
        stages: Paths of a layer's linear maps in order of execution, grouped by their input tensor.
        writes: True for each stage whose output is added to the residual stream without a norm.

    Args:
        checkpoint: Dense model.
        config: Recursive config made from it (layers are built as the recursive model builds them).
        windows: Token ids ``[N, T]``; None if the caller embeds its own text.
        device: Device for the layers.
    """

    def __init__(
        self, checkpoint: DenseCheckpoint, config: RecursiveConfig, windows: Tensor | None, device: str = "cpu"
    ):
        self.checkpoint = checkpoint
        # A private copy, since building layers modifies the config.
        self.config = copy.deepcopy(config)
        self.device = device
        self.family = DenseFamily(self.config)
        self.stem = f"{self.family.model_class.base_model_prefix}.layers"
        self.rotary_emb = self._computed(self.family.rotary_emb)
        self.batches = [] if windows is None else list(windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])))
        self._cached_arguments: dict[tuple[int, int], dict[str, Any]] = {}
        self.stages, self.writes = self._find_stages()

    def _computed(self, module: nn.Module) -> nn.Module:
        """Materialize a module, its buffers computed (RoPE)."""
        module = module.to_empty(device=self.device)
        self.family.skeleton._init_weights(module)
        return module

    def embed(self) -> list[Tensor]:
        """Compute the hidden states before the first layer."""
        module = self._computed(copy.deepcopy(self.family.embed_tokens))
        weight = self.checkpoint.read(self.checkpoint.embedding_name).to(self.device, torch.float32)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return [module(batch.to(self.device)) for batch in self.batches]

    def load(self, position: int) -> nn.Module:
        """Load the dense layer at ``position`` in float32."""
        layer = copy.deepcopy(self.family.layers[position])
        state = {
            name: self.checkpoint.read(f"{self.stem}.{position}.{name}").to(self.device, torch.float32)
            for name, _ in layer.named_parameters()
        }
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).eval()

    def run(
        self, layer: Callable[..., Tensor], position: int, hidden: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """Run a layer, ``[b, T, D] -> [b, T, D]``; a packed document begins where ``position_ids [b, T]`` restart."""
        if position_ids is not None:
            return layer(hidden, **self._arguments(position, hidden, position_ids))
        key = (hidden.shape[0], position)
        if key not in self._cached_arguments:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            # One entry at a time, since masks are as large as hidden states.
            self._cached_arguments = {key: self._arguments(position, hidden, positions)}
        return layer(hidden, **self._cached_arguments[key])

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

    def input_and_stream(
        self, layer: nn.Module, position: int, hidden: Tensor, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        """Input of a stage, ``[b·T, I]``, and the residual stream that it writes to, ``[b·T, D]``.

        The stream is the layer's output with this and all later stages returning zeros; None if the stage does not
        write to it directly (q/k/v, or an output followed by a norm).
        """
        path = self.stages[stage][0]
        replaced = {p: layer.get_submodule(p) for later in self.stages[stage:] for p in later}
        recorder = _ZeroLinear(replaced[path], stops=not self.writes[stage])
        for p, module in replaced.items():
            layer.set_submodule(p, recorder if p == path else _ZeroLinear(module))
        stream = None
        try:
            stream = self.run(layer, position, hidden).flatten(0, -2)
        except _StopForward:
            pass
        finally:
            for p, module in replaced.items():
                layer.set_submodule(p, module)
        assert recorder.input is not None
        return recorder.input, stream

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
        return stages, [self._writes(layer, hidden, stages, index, outputs) for index in range(len(stages))]

    def _writes(
        self, layer: nn.Module, hidden: Tensor, stages: list[list[str]], index: int, outputs: dict[str, Tensor]
    ) -> bool:
        """Tell whether the output of stage ``index`` is added to the residual stream directly."""
        stage = stages[index]
        if len(stage) != 1 or outputs[stage[0]].shape != hidden.shape:
            return False
        results = []
        for first_zero in (index, index + 1):
            ablated = copy.deepcopy(layer)
            for path in [path for later in stages[first_zero:] for path in later]:
                ablated.set_submodule(path, _ZeroLinear(layer.get_submodule(path)))
            results.append(self.run(ablated, 0, hidden))
        return torch.allclose(results[1] - results[0], outputs[stage[0]], rtol=1e-4, atol=1e-5)
