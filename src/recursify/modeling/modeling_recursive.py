"""The recursive model: prelude, a shared block applied several times, coda.

Caches, masks, paged attention and activation checkpointing see an ordinary model of ``num_hidden_layers`` layers; the
checkpoint sees every weight once. How layers share their weights is in ``recursive_layers.py``. Routers, Anderson
mixing, exit policies and speculation are subclasses in files of their own, which only travel with a model that uses
them; they override :meth:`RecursiveModel._make_walk` and :meth:`RecursiveForCausalLM.generate`.

Shape legend: B batch, T tokens, D hidden size, V vocabulary, R recursions (depths).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_recursive import RecursiveConfig
from .recursive_base import LayerWalk, RecursiveOutput, RecursivePreTrainedModel
from .recursive_exits import ExitHead, ExitKind, vocabulary_logits
from .recursive_generation import choose_cache, one_cache_name, prepare_as, prepares_inputs
from .recursive_layers import CACHE_ARGUMENT, DenseFamily, SharedLayer, materialize


class RecursiveModel(RecursivePreTrainedModel):
    """Embedding, prelude, shared block, coda and final norm: ``input_ids [B, T] -> last_hidden_state [B, T, D]``."""

    def __init__(self, config: RecursiveConfig):
        super().__init__(config)
        family = DenseFamily(config)
        layout = config.layout
        self.layout = layout
        self.embed_tokens = materialize(family.embed_tokens)
        self.rotary_emb = materialize(family.rotary_emb)
        self.prelude = nn.ModuleList(materialize(layer) for layer in family.layers[: layout.num_prelude_layers])
        self.block = nn.ModuleList(
            SharedLayer(config, index, [family.layers[position] for position in layout.positions(index)])
            for index in range(layout.block_size)
        )
        self.coda = nn.ModuleList(materialize(layer) for layer in family.layers[layout.coda_positions.start :])
        self.norm = materialize(family.norm)
        self.routers: nn.ModuleList | None = None
        self.auxiliary_routers: nn.ModuleList | None = None
        self.cache_argument = family.cache_argument
        self.rope_by_layer_type = family.rope_by_layer_type
        self.gradient_checkpointing = False
        object.__setattr__(self, "_skeleton", family.strip())
        self._add_parts()
        self.post_init()

    def _family_skeleton(self) -> PreTrainedModel:
        return self._skeleton

    # --- Hooks of subclasses -------------------------------------------------------------------------------------

    def _add_parts(self) -> None:
        """Add the modules of a subclass.

        Raises:
            ValueError: The configuration uses parts that this class does not have.
        """
        for field in ("router", "anderson"):
            if value := getattr(self.config, field):
                raise ValueError(
                    f"{field}={value} needs code that {type(self).__module__} does not have. Install recursify and "
                    f"import it before loading the model, or load a complete checkpoint with trust_remote_code=True."
                )

    def _make_cache(self) -> Cache | None:
        """A new KV cache; None to run without one."""
        return DynamicCache(config=self.config)

    def _make_walk(self, states: Tensor, attention_mask: Any, **call: Any) -> LayerWalk:
        """The walk of one forward; ``call`` holds further arguments of :class:`LayerWalk`."""
        return LayerWalk(self, states, **call)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_recursions: int | None = None,
        exit_depth: int | None = None,
        exit_depths: Iterable[int] = (),
        return_layer_states: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> RecursiveOutput:
        """Run all recursions, or the first ``num_recursions``, or as far as the exit after ``exit_depth``.

        Args:
            input_ids: ``[B, T]``; or give ``inputs_embeds [B, T, D]``.
            attention_mask: ``[B, past + T]`` with 0 at padding, a prepared 4-D mask, or a dict of those by layer type.
            position_ids: ``[B, T]``; counted from the cache's length if absent.
            past_key_values: KV cache with one slot per effective position.
            use_cache: Flag to make and return a cache.
            num_recursions: Number of applications of the shared block before the coda, 1 .. R; all R if absent.
            exit_depth: Depth after which every token exits, with the coda or without as configured; the input of that
                exit's head is the last of ``exit_states``. ``config.exit_depth`` if neither is given.
            exit_depths: Depths to branch off ``exit_states`` at, for training and measuring; without a cache, which a
                coda that runs more than once would write more than once.
            return_layer_states: Flag to return the hidden states after every position.
            cache: Name of ``past_key_values`` from transformers 5.24 on; before, passed to attention functions.
            kwargs: Arguments passed to every attention function.

        Raises:
            ValueError: ``num_recursions`` or an exit depth outside its range, both of them, exit depths with a cache,
                or two caches.
        """
        if CACHE_ARGUMENT == "cache" or isinstance(cache, Cache):
            past_key_values = choose_cache(past_key_values, cache)
        elif cache is not None:
            kwargs["cache"] = cache  # before 5.24, paged attention finds its pages by this name
        exit_depth = self.config.depth_to_exit_at(num_recursions, exit_depth)
        recursions = self._recursions(num_recursions, exit_depth)
        branches = self._branches(exit_depths, recursions, caches=bool(use_cache or past_key_values is not None))
        if use_cache and past_key_values is None:
            past_key_values = self._make_cache()
        hidden_states, call = self._prepare(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        walk = self._make_walk(hidden_states, attention_mask, **call, arguments={"use_cache": use_cache, **kwargs})
        if return_layer_states and walk.routing is not None:
            raise ValueError("return_layer_states: a routed model's layers run on different tokens. Leave it out.")
        without_coda = exit_depth is not None and not self.config.exit_through_coda
        layer_states: list[Tensor] = []
        boundary_states: list[Tensor] = []
        for position, ref in enumerate(self.layout.layer_refs()):
            if ref.depth >= recursions or (without_coda and ref.part == "coda"):
                continue
            hidden_states = walk(position, hidden_states)
            if return_layer_states:
                layer_states.append(hidden_states)
            if ref.part == "block" and ref.index == self.layout.block_size - 1 and ref.depth in branches:
                boundary_states.append(hidden_states)
        exit_states = [self._to_exit(states, walk.run_layer) for states in boundary_states]
        if exit_depth is not None:
            exit_states.append(hidden_states)
        return RecursiveOutput(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_ARGUMENT: past_key_values if use_cache else None},
            boundary_states=tuple(boundary_states) or None,
            exit_states=tuple(exit_states) or None,
            layer_states=tuple(layer_states) if return_layer_states else None,
            routing=walk.routing,
        )

    def _prepare(
        self, input_ids: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, cache: Cache | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings ``[B, T, D]`` of a forward, and its masks, position ids and cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + seen
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks_for_generate(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_ARGUMENT: cache},
            )
        return inputs_embeds, {"masks": masks, "position_ids": position_ids, "cache": cache}

    def _recursions(self, num_recursions: int | None, exit_depth: int | None) -> int:
        """Number of recursions to run."""
        if exit_depth is not None:
            return exit_depth + 1
        available = self.layout.num_recursions
        if num_recursions is not None and not 1 <= num_recursions <= available:
            raise ValueError(f"num_recursions={num_recursions} is outside 1 .. {available}: the model has no more.")
        return available if num_recursions is None else num_recursions

    def _branches(self, exit_depths: Iterable[int], recursions: int, *, caches: bool) -> set[int]:
        """Check the depths to branch off exits at."""
        wanted, running = set(exit_depths), self.config.exit_depths[:recursions]
        if wanted and caches:
            raise ValueError("exit_depths and a cache exclude one another: pass use_cache=False.")
        if not wanted <= set(running):
            raise ValueError(
                f"exit_depths={sorted(wanted)} are not all depths that run and have an exit: those are {list(running)}."
            )
        return wanted

    def _to_exit(self, boundary_states: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Input of an exit head, given the states at its boundary."""
        if self.config.exit_through_coda:
            for position in self.layout.coda_positions:
                boundary_states = run(position, boundary_states)
        return boundary_states

    def run_layer(
        self, position: int, states: Tensor, *, masks: Any, rotations: Any, kv_cache: Cache | None, **arguments: Any
    ) -> Tensor:
        """Run the layer at ``position``, ``[B, T, D] -> [B, T, D]``; masks and rotations are one or by layer type.

        Before transformers 5.24, ``arguments`` may hold a ``cache`` for the attention function beside the KV cache.
        """
        ref, kind = self.layout.layer_ref(position), self.layer_type(position)
        arguments["attention_mask"] = masks[kind] if isinstance(masks, dict) else masks
        arguments["position_embeddings"] = rotations[kind] if isinstance(rotations, dict) else rotations
        arguments[self.cache_argument] = kv_cache
        if ref.part == "block":
            return self.block[ref.index](states, ref.depth, **arguments)
        layer = self.prelude[ref.index] if ref.part == "prelude" else self.coda[ref.index]
        return layer(states, **arguments)

    def layer_type(self, position: int) -> str | None:
        """Attention type at ``position`` (``"sliding_attention"``, ...); None in families with one type."""
        layer_types = getattr(self.config, "layer_types", None)
        return layer_types[position] if layer_types else None

    def rotations(self, hidden_states: Tensor, position_ids: Tensor, rotary: nn.Module | None = None) -> Any:
        """RoPE's cosines and sines, by layer type in families with several bases (Gemma 3); of ``rotary`` if given."""
        rotary = self.rotary_emb if rotary is None else rotary
        if not self.rope_by_layer_type:
            return rotary(hidden_states, position_ids)
        return {kind: rotary(hidden_states, position_ids, kind) for kind in dict.fromkeys(self.config.layer_types)}


class RecursiveForCausalLM(RecursivePreTrainedModel, GenerationMixin):
    """A recursive model with its language-modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    base_model_class: ClassVar[type[RecursiveModel]] = RecursiveModel

    def __init__(self, config: RecursiveConfig):
        super().__init__(config)
        self.model = self.base_model_class(config)
        with torch.device("meta"):
            dense = _dense_model(config)
        self.dense_class = type(dense)
        self.lm_head = materialize(dense.get_output_embeddings())
        self.exit_heads = self._make_exit_heads() if config.exit_head is not None else None
        self.post_init()

    def _family_skeleton(self) -> PreTrainedModel:
        return self.model._skeleton

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_recursions: int | None = None,
        exit_depth: int | None = None,
        objective: Callable[[RecursiveForCausalLM, RecursiveOutput], Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits ``[B, T, V]``, or of the last ``logits_to_keep`` tokens; and the loss, given ``labels [B, T]``.

        They are those of the last recursion that runs; see :meth:`RecursiveModel.forward` for ``num_recursions`` and
        ``exit_depth``.

        With an ``objective``, its value for this model and the output of :class:`RecursiveModel` is returned, and no
        logits are computed here: a training loss that uses weights (a head, chunk by chunk) has to run inside this
        call, because FSDP gathers them for no longer than that.
        """
        exit_depth = self.config.depth_to_exit_at(num_recursions, exit_depth)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_recursions=num_recursions,
            exit_depth=exit_depth,
            **kwargs,
        )
        if objective is not None:
            return objective(self, outputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if exit_depth is None:
            logits = self.compute_logits(outputs.last_hidden_state[:, kept, :])
        else:
            logits = self.compute_exit_logits(exit_depth, outputs.exit_states[-1][:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_ARGUMENT: getattr(outputs, CACHE_ARGUMENT)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _make_exit_heads(self) -> nn.ModuleList:
        arguments = (cast(ExitKind, self.config.exit_head), self.model.norm, cast(nn.Linear, self.lm_head))
        return nn.ModuleList(ExitHead(*arguments, self.config.exit_rank) for _ in self.config.exit_depths)

    def generate(self, *arguments: Any, exit_policy: Any = None, speculate: Any = None, **kwargs: Any) -> Any:
        """transformers' ``generate``, which refuses the arguments of classes with more parts."""
        if exit_policy is not None or speculate:
            raise ValueError(
                "This checkpoint does not carry the code of exit policies and speculation. Install recursify (pip "
                "install recursify) and import it before loading the model."
            )
        return super().generate(*arguments, **one_cache_name(kwargs))

    def prepare_inputs_for_generation(self, input_ids: Tensor, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of the next forward in ``generate``, as the dense family prepares them.

        The KV cache is called ``past_key_values`` with any version of transformers: peft looks for it by that name to
        put a prefix in it, or to know that a prompt has been read.
        """
        if prepares_inputs(self.dense_class):
            inputs = prepare_as(self.dense_class, self, input_ids, *arguments, **kwargs)
            if kwargs.get(CACHE_ARGUMENT) is not None and inputs.get(CACHE_ARGUMENT) is None:
                # Dropped: all tokens run again. transformers before 5.24 cuts all but the last off nevertheless.
                kwargs.update({CACHE_ARGUMENT: None, "next_sequence_length": None})
                inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        else:
            inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        if CACHE_ARGUMENT in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_ARGUMENT)
        return inputs

    def lora_targets(self, *names: str) -> list[str]:
        """Full names of linear maps for peft's ``LoraConfig(target_modules=…)``.

        peft adapts an ``nn.Linear`` and refuses :class:`RelaxedLinear`, so a plain ``"q_proj"`` does not work. A
        shared map is adapted inside, at its ``linear``: its depths share the adapter, which can be merged into it.

        Args:
            names: Names of maps in the family's layers (``"q_proj"``, ``"down_proj"``); all maps if there are none.

        Raises:
            ValueError: An unknown name.
        """
        maps = {
            path: path.removesuffix(".linear").rpartition(".")[2]
            for path, module in self.model.named_modules(prefix="model")
            if isinstance(module, nn.Linear)
        }
        if unknown := sorted(set(names) - set(maps.values())):
            known = ", ".join(sorted(set(maps.values())))
            raise ValueError(f"No linear map is called '{unknown[0]}'. There are: {known}.")
        return [path for path, name in maps.items() if not names or name in names]

    def compute_logits(self, hidden_states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[..., V]`` of normed ``hidden_states [..., D]``, or of the first ``vocabulary`` entries."""
        return self._soft_cap(vocabulary_logits(self.lm_head, hidden_states, vocabulary))

    def compute_exit_logits(self, depth: int, exit_states: Tensor, vocabulary: int | None = None) -> Tensor:
        """Logits ``[..., V]`` of the exit after ``depth``, given its ``exit_states [..., D]`` (not normed).

        A model without exit heads uses its own final norm and head.
        """
        if self.exit_heads is None:
            return self.compute_logits(self.model.norm(exit_states), vocabulary)
        return self._soft_cap(self.exit_heads[depth](exit_states, self.model.norm, self.lm_head, vocabulary))

    def _soft_cap(self, logits: Tensor) -> Tensor:
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _dense_model(config: RecursiveConfig) -> PreTrainedModel:
    """The family's own causal model without layers, for its LM head (some have a bias)."""
    head_only = config.dense_config()
    head_only.num_hidden_layers = 0
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(head_only)](head_only)


RecursiveConfig.register_for_auto_class()
