"""Running a dense model one layer at a time, and looking at what its linear maps are fed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from recursify.modeling import RecursiveConfig
from recursify.modeling.modeling_recursive import CACHE_ARGUMENT, DenseFamily

from .dense_checkpoint import DenseCheckpoint

TOKENS_PER_BATCH = 4096


class _Reached(Exception):
    """Ends a layer's forward once the input looked for has been seen."""


class _Silent(nn.Module):
    """Stands for a linear map, remembers what it was fed, and returns zeros or stops the layer."""

    def __init__(self, replaced: nn.Module, *, stops: bool = False):
        super().__init__()
        assert isinstance(replaced, nn.Linear)
        self.out_features = replaced.out_features
        self.stops = stops
        self.fed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.fed = x.flatten(0, -2)
        if self.stops:
            raise _Reached
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Layerwise:
    """A dense model whose layers are loaded, run in float32 over all of a text, and dropped, one by one.

    Held throughout: the token ids, RoPE and nothing else. Hidden states are the caller's, as a list of batches
    ``[b, T, D]``.

    Attributes:
        stages: Paths of a layer's linear maps, in groups that are fed the same tensor, in the order in which they run.
        writes: Per stage, whether its output is added to the residual stream as it is.

    Args:
        checkpoint: The dense model.
        config: The recursive config made from it (layers are built as the recursive model builds them).
        windows: Token ids ``[N, T]``; None where the caller embeds text of its own.
        device: Where layers run.
    """

    def __init__(
        self, checkpoint: DenseCheckpoint, config: RecursiveConfig, windows: Tensor | None, device: str = "cpu"
    ):
        self.checkpoint = checkpoint
        # Eager and sdpa differ in rounding only; a private copy keeps the caller's config as it is.
        self.config = copy.deepcopy(config)
        self.device = device
        family = DenseFamily(self.config)
        self._layers = family.layers
        self._embed = family.embed_tokens
        self._initialize = family.skeleton._init_weights
        self.stem = f"{family.model_class.base_model_prefix}.layers"
        self.rotary_emb = self._computed(family.rotary_emb)
        self._rope_by_layer_type = family.rope_by_layer_type
        self._cache_argument = family.cache_argument
        self.batches = [] if windows is None else list(windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1])))
        self.num_tokens = 0 if windows is None else windows.numel()
        self._arguments: dict[tuple[int, int], dict[str, Any]] = {}
        self.stages, self.writes = self._find_stages()

    def _computed(self, module: nn.Module) -> nn.Module:
        """A module without stored weights (RoPE), its buffers computed."""
        module = module.to_empty(device=self.device)
        self._initialize(module)
        return module

    def embed(self) -> list[Tensor]:
        """Hidden states before the first layer."""
        module = copy.deepcopy(self._embed).to_empty(device=self.device)
        self._initialize(module)
        module.weight = nn.Parameter(
            self.checkpoint.read(self.checkpoint.embedding_name).to(self.device, torch.float32), requires_grad=False
        )
        return [module(batch.to(self.device)) for batch in self.batches]

    def load(self, position: int) -> nn.Module:
        """The dense layer at ``position``, float32."""
        layer = copy.deepcopy(self._layers[position])
        state = {
            name: self.checkpoint.read(f"{self.stem}.{position}.{name}").to(self.device, torch.float32)
            for name, _ in layer.named_parameters()
        }
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(False).eval()

    def run(
        self, layer: Callable[..., Tensor], position: int, hidden: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """``[b, T, D] -> [b, T, D]``; where ``position_ids [b, T]`` restart, a packed document begins."""
        if position_ids is None:
            return layer(hidden, **self._layer_arguments(position, hidden))
        return layer(hidden, **self._arguments_at(position, hidden, position_ids))

    def observe(
        self, layer: nn.Module, position: int, hidden: Tensor, paths: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`run`, and what the linear maps at ``paths`` were fed, each ``[b·T, I]``."""
        seen: dict[str, Tensor] = {}

        def look(path: str):
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                seen[path] = arguments[0].flatten(0, -2)

            return hook

        hooks = [layer.get_submodule(path).register_forward_pre_hook(look(path)) for path in paths]
        try:
            return self.run(layer, position, hidden), seen
        finally:
            for hook in hooks:
                hook.remove()

    def input_and_rest(
        self, layer: nn.Module, position: int, hidden: Tensor, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        """What a stage is fed, ``[b·T, I]``, and the residual stream it adds to, ``[b·T, D]``.

        The latter is the layer's output with this stage and all later ones silenced; None where the stage does not
        write to the stream as it is (q/k/v, or an output that a norm follows).
        """
        path = self.stages[stage][0]
        silenced = {p: layer.get_submodule(p) for later in self.stages[stage:] for p in later}
        recorder = _Silent(silenced[path], stops=not self.writes[stage])
        for p, module in silenced.items():
            layer.set_submodule(p, recorder if p == path else _Silent(module))
        rest = None
        try:
            rest = self.run(layer, position, hidden).flatten(0, -2)
        except _Reached:
            pass
        finally:
            for p, module in silenced.items():
                layer.set_submodule(p, module)
        assert recorder.fed is not None
        return recorder.fed, rest

    def _layer_arguments(self, position: int, hidden: Tensor) -> dict[str, Any]:
        key = (hidden.shape[0], position)
        if key not in self._arguments:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            # One position and batch size at a time: masks are as large as hidden states.
            self._arguments = {key: self._arguments_at(position, hidden, positions)}
        return self._arguments[key]

    def _arguments_at(self, position: int, hidden: Tensor, position_ids: Tensor) -> dict[str, Any]:
        masks = create_masks_for_generate(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            position_ids=position_ids,
            **{CACHE_ARGUMENT: None},
        )
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[position] if kinds else None
        rope = (position_ids, kind) if self._rope_by_layer_type else (position_ids,)
        return {
            "attention_mask": masks[kind] if isinstance(masks, dict) else masks,
            "position_embeddings": self.rotary_emb(hidden, *rope),
            "position_ids": position_ids,
            "use_cache": False,
            self._cache_argument: None,
        }

    def _find_stages(self) -> tuple[list[list[str]], list[bool]]:
        """Linear maps of a layer in the order in which they run, and which of them write to the residual stream.

        Maps fed the same tensor form one stage; for Llama: q/k/v, o, gate/up, down. Found by running a random layer, so
        that fused, parallel and sandwich-normed layouts need no table.
        """
        layer = copy.deepcopy(self._layers[0]).to_empty(device=self.device)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        layer.requires_grad_(False).eval()
        stages: list[list[str]] = []
        fed: list[Tensor] = []  # kept alive, so that identity means the same tensor
        wrote: dict[str, Tensor] = {}

        def look(path: str):
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                wrote[path] = output
                for stage, tensor in zip(stages, fed, strict=True):
                    if tensor is arguments[0]:
                        stage.append(path)
                        return
                stages.append([path])
                fed.append(arguments[0])

            return hook

        linears = [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        hooks = [module.register_forward_hook(look(path)) for path, module in linears]
        hidden = torch.randn(1, 4, self.config.hidden_size, device=self.device)
        self.run(layer, 0, hidden)
        for hook in hooks:
            hook.remove()
        return stages, [self._writes(layer, hidden, stages, index, wrote) for index in range(len(stages))]

    def _writes(
        self, layer: nn.Module, hidden: Tensor, stages: list[list[str]], index: int, wrote: dict[str, Tensor]
    ) -> bool:
        """Whether a stage's output is added to the residual stream as it is."""
        stage = stages[index]
        if len(stage) != 1 or wrote[stage[0]].shape != hidden.shape:
            return False
        outputs = []
        for first_silenced in (index, index + 1):
            silent = copy.deepcopy(layer)
            for path in [path for later in stages[first_silenced:] for path in later]:
                silent.set_submodule(path, _Silent(layer.get_submodule(path)))
            outputs.append(self.run(silent, 0, hidden))
        return torch.allclose(outputs[1] - outputs[0], wrote[stage[0]], rtol=1e-4, atol=1e-5)
