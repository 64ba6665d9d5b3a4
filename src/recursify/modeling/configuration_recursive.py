"""Configuration of a recursive model: the dense model's own fields, verbatim and flat, plus the layout.

Everything that reads a config by field name (caches, vLLM, lm-eval, memory estimators) finds the dense model's true
values. ``num_hidden_layers`` is the *effective* depth, since every KV cache is sized by it.

This file travels inside every checkpoint: it imports transformers and its neighbours only.
"""

from __future__ import annotations

import difflib
import inspect
import math
from itertools import pairwise
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .recursive_exits import EXIT_HEADS
from .recursive_layout import LayerLayout, LayoutError
from .recursive_loops import spread_depths
from .recursive_policies import KV_MODES
from .recursive_routing import check_routers

FORMAT_VERSION = 1
"""Version of the on-disk format. Raised when an older recursify could not read a newer folder."""

AUTO_MAP = {
    "AutoConfig": "configuration_recursive.RecursiveConfig",
    "AutoModel": "modeling_recursive.RecursiveModel",
    "AutoModelForCausalLM": "modeling_recursive.RecursiveForCausalLM",
}
# vLLM's Transformers backend builds `AutoModel.from_config`, and `register_for_auto_class` never writes that key.


class RecursiveConfig(PreTrainedConfig):
    """Configuration of :class:`RecursiveForCausalLM`.

    Args:
        dense_model_type: ``model_type`` of the dense family whose decoder layers this model runs (``"llama"``, ...).
        num_recursions: How often the shared block is applied, at least 1.
        num_prelude_layers: Unshared layers before the block.
        num_coda_layers: Unshared layers after the block.
        sharing: ``"cycle"`` (the block, then again) or ``"sequence"`` (each layer repeated in place).
        lora_rank: Rank of the per-depth residual on every shared linear; 0 for none. Clamped to each matrix.
        lora_rank_pattern: Ranks that differ from ``lora_rank``: ``{"mlp.down_proj": 128, "3.self_attn.q_proj": 32}``.
            A key is a module path inside the shared layer, optionally preceded by the block layer's index; the most
            specific one wins.
        tie_norms: One norm (and bias) for all depths, as in the papers, instead of one per depth.
        exit_head: What an exit after a recursion reads out with (``EXIT_HEADS``), or None: the model has no exits.
        exit_rank: Rank of a ``low_rank`` exit head.
        exit_through_coda: A token that exits still runs the coda, as at full depth, instead of being read out where it
            stopped.
        exit_kv: Where exits were trained to find keys and values of depths that earlier tokens skipped, of
            ``recursive_policies.KV_MODES``; ``deferred`` are those of the whole model. The engine keeps to it.
        exit_policy: The policy that ``exit_thresholds`` are for, of ``recursive_policies.EXIT_POLICIES``.
        exit_vocabulary: How many entries of the vocabulary that policy judges by; None for all.
        exit_thresholds: One per exit, which ``generate(exit_policy=…)`` takes where it is given that policy's name.
        exit_depth: Depth after which every token exits; None runs all recursions. It can be given to
            ``from_pretrained``, and so to whatever passes arguments on to it (lm-eval's ``--model_args``, a pipeline).
        residual_scale: What the steps of the shared layers are multiplied by: ``h + residual_scale · (layer(h) - h)``.
        depth_map: By depth, the depth of the model it was made from (:meth:`with_recursions`) that its own parameters
            are of; None where the model is as it was made.
        anderson: How many earlier loops are mixed into one that repeats them (``recursive_loops.py``); 0 for none.
        router: Who decides which tokens go through a recursion (``recursive_routing.ROUTERS``), or None: all do.
        router_width: What a router is, of ``recursive_routing.ROUTER_WIDTHS``.
        router_activation: ``sigmoid`` or ``softmax``; None takes MoR's, by the kind of router.
        router_temperature: Divides what a router sees.
        router_alpha: Scales gates; None takes MoR's, 0.1 for ``expert_choice`` and 1 for ``token_choice``.
        router_gate: How a recursion's result comes back, of ``recursive_routing.ROUTER_GATES``.
        router_capacities: With ``expert_choice``, the part of the tokens that goes into each recursion, not rising;
            None takes ``(R − r + 1) / R``.
        router_kv: Which keys a recursion attends to, of ``recursive_routing.ROUTED_KV``.
        router_decision: Whose score decides in inference, of ``recursive_routing.ROUTER_DECISIONS``.
        router_thresholds: The score from which on a token goes in at inference, by depth; None is 0.5, and none where
            the capacity is 1.
        format_version: Version of the on-disk format.
        dense_fields: Every field of the dense family's config, ``num_hidden_layers`` being the effective depth.

    Raises:
        ValueError: An unknown ``dense_model_type``, a newer ``format_version``, a misspelt field of our own, exits or
            routers where there is no boundary between recursions, or fields of the loops or routers that do not fit.
        LayoutError: The effective depth does not fold as the other fields say.
    """

    model_type = "recursive"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    has_no_defaults_at_init = True

    def __init__(
        self,
        dense_model_type: str = "llama",
        num_recursions: int = 1,
        num_prelude_layers: int = 0,
        num_coda_layers: int = 0,
        sharing: str = "cycle",
        lora_rank: int = 0,
        lora_rank_pattern: dict[str, int] | None = None,
        tie_norms: bool = False,
        exit_head: str | None = None,
        exit_rank: int = 64,
        exit_through_coda: bool = True,
        exit_kv: str = "deferred",
        exit_policy: str | None = None,
        exit_thresholds: list[float] | None = None,
        exit_vocabulary: int | None = None,
        exit_depth: int | None = None,
        residual_scale: float = 1.0,
        depth_map: list[int] | None = None,
        anderson: int = 0,
        router: str | None = None,
        router_width: str = "linear",
        router_activation: str | None = None,
        router_temperature: float = 1.0,
        router_alpha: float | None = None,
        router_gate: str = "residual",
        router_capacities: list[float] | None = None,
        router_kv: str = "recursion_wise",
        router_decision: str = "own",
        router_thresholds: list[float] | None = None,
        format_version: int = FORMAT_VERSION,
        **dense_fields: Any,
    ):
        if dense_model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"Unknown dense_model_type '{dense_model_type}': the installed transformers has no such family."
            )
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format_version {format_version}, newer than {FORMAT_VERSION}, the newest this "
                f"code reads. Upgrade recursify, or load with the code in the checkpoint (trust_remote_code=True)."
            )
        if sharing not in ("cycle", "sequence"):
            raise ValueError(f"Unknown sharing '{sharing}' in the config. Use 'cycle' or 'sequence'.")
        if lora_rank < 0 or any(rank < 0 for rank in (lora_rank_pattern or {}).values()):
            raise ValueError(f"LoRA ranks cannot be negative, got {lora_rank} and {lora_rank_pattern}.")
        derived = {key: dense_fields.pop(key, None) for key in ("num_unique_layers", "layer_to_block", "block_size")}
        for key in ("model_type", "auto_map"):
            dense_fields.pop(key, None)

        dense = CONFIG_MAPPING[dense_model_type](**dense_fields)
        self._refuse_misspelt(dense_fields, dense)
        verbatim = {key: value for key, value in dense.to_dict().items() if key not in _NOT_COPIED}
        super().__init__(**verbatim)
        for key, value in verbatim.items():
            # PreTrainedConfig drops fields that it takes for generation settings, use_cache among them.
            if key not in self.__dict__ and key != "dtype":
                setattr(self, key, value)
        self._attn_implementation = dense_fields.get("attn_implementation")
        self.dense_model_type = dense_model_type
        self.num_recursions = num_recursions
        self.num_prelude_layers = num_prelude_layers
        self.num_coda_layers = num_coda_layers
        self.sharing = sharing
        self.lora_rank = lora_rank
        self.lora_rank_pattern = dict(lora_rank_pattern or {})
        self.tie_norms = tie_norms
        self.exit_head = exit_head
        self.exit_rank = exit_rank
        self.exit_through_coda = exit_through_coda
        self.exit_kv = exit_kv
        self.exit_policy = exit_policy
        self.exit_thresholds = exit_thresholds
        self.exit_vocabulary = exit_vocabulary
        self.exit_depth = exit_depth
        self.residual_scale = residual_scale
        self.depth_map = depth_map
        self.anderson = anderson
        self.router = router
        self.router_width = router_width
        self.router_activation = router_activation
        self.router_temperature = router_temperature
        self.router_alpha = router_alpha
        self.router_gate = router_gate
        self.router_capacities = router_capacities
        self.router_kv = router_kv
        self.router_decision = router_decision
        self.router_thresholds = router_thresholds
        self.format_version = format_version
        self.auto_map = dict(AUTO_MAP)

        layout = self.layout
        self.block_size = layout.block_size
        self.num_unique_layers = layout.num_unique_layers
        self.layer_to_block = layout.layer_to_block()
        for key, given in derived.items():
            if given is not None and given != getattr(self, key):
                raise LayoutError(
                    f"config.{key} is {given}, but {self.num_hidden_layers} layers with {num_recursions} recursions, a "
                    f"prelude of {num_prelude_layers}, a coda of {num_coda_layers} and sharing '{sharing}' make it "
                    f"{getattr(self, key)}. The config was edited by hand: convert again instead."
                )
        if exit_head is not None:
            self.check_exits()
        if exit_thresholds is not None and len(exit_thresholds) != len(self.exit_depths):
            raise ValueError(
                f"exit_thresholds has {len(exit_thresholds)} values, and the model {len(self.exit_depths)} exits. "
                f"Choose them again: recursify calibrate-exits."
            )
        if router is not None:
            check_routers(self)
        self.depth_to_exit_at()
        self.check_loops()

    @classmethod
    def from_dense(cls, dense: PreTrainedConfig, layout: LayerLayout, **fields: Any) -> RecursiveConfig:
        """The config of ``dense`` folded by ``layout``; ``fields`` are this class's own (``lora_rank``, ...)."""
        return cls(
            dense_model_type=dense.model_type,
            num_recursions=layout.num_recursions,
            num_prelude_layers=layout.num_prelude_layers,
            num_coda_layers=layout.num_coda_layers,
            sharing=layout.order,
            **fields,
            **{key: value for key, value in dense.to_dict().items() if key not in _NOT_COPIED},
        )

    @property
    def layout(self) -> LayerLayout:
        """The map between positions, stored layers and depths."""
        return LayerLayout.fold(
            self.num_hidden_layers,
            self.num_recursions,
            self.sharing,
            num_prelude_layers=self.num_prelude_layers,
            num_coda_layers=self.num_coda_layers,
        )

    @property
    def exit_depths(self) -> tuple[int, ...]:
        """Depths after which a token can stop: all but the last; none where recursions have no boundary."""
        return tuple(range(self.num_recursions - 1)) if self.sharing == "cycle" else ()

    def check_exits(self) -> None:
        """Raises:
        ValueError: The exit fields do not fit the layout or one another.
        """
        if self.exit_head not in EXIT_HEADS:
            raise ValueError(f"Unknown exit_head '{self.exit_head}'. Use one of: {', '.join(EXIT_HEADS)}.")
        if self.exit_kv not in KV_MODES:
            raise ValueError(f"Unknown exit_kv '{self.exit_kv}'. Use one of: {', '.join(KV_MODES)}.")
        if self.exit_rank < 1:
            raise ValueError(f"exit_rank must be at least 1, got {self.exit_rank}.")
        if not self.exit_depths:
            raise ValueError(
                f"A model with {self.num_recursions} recursions in {self.sharing} sharing has no boundary between "
                f"recursions, so it cannot exit. Exits need cycle sharing and at least 2 recursions."
            )

    @staticmethod
    def router_defaults() -> dict[str, Any]:
        """The router fields and what they are by default."""
        parameters = inspect.signature(RecursiveConfig.__init__).parameters
        return {name: each.default for name, each in parameters.items() if name.partition("_")[0] == "router"}

    def depth_to_exit_at(self, num_recursions: int | None = None, exit_depth: int | None = None) -> int | None:
        """The depth after which a call exits: ``exit_depth``, else the config's, if it names no ``num_recursions``.

        Raises:
            ValueError: There is no exit after that depth, or both are given.
        """
        if num_recursions is not None and exit_depth is not None:
            raise ValueError(f"Give num_recursions={num_recursions} or exit_depth={exit_depth}, not both.")
        if num_recursions is None and exit_depth is None:
            exit_depth = self.exit_depth
        if exit_depth is not None and exit_depth not in self.exit_depths:
            raise ValueError(
                f"There is no exit after depth {exit_depth}: those are after {list(self.exit_depths)}. Leave "
                f"exit_depth out to run all recursions."
            )
        return exit_depth

    @property
    def repetitions(self) -> list[int]:
        """By depth, how many depths right before it run the same map; 0 where another one begins.

        Depths run the same map that have the same parameters and, where layers differ in what is not a weight (window,
        RoPE or NoPE), the same kinds of layers.
        """
        layout = self.layout
        sources = self.depth_map or list(range(self.num_recursions))
        if self.tie_norms and not self.lora_rank and not any(self.lora_rank_pattern.values()):
            sources = [0] * self.num_recursions
        by_layer = [value for _, value in self._by_layer(self.to_dict())]
        maps = [
            (source, [[value[layout.position(index, depth)] for value in by_layer] for index in range(self.block_size)])
            for depth, source in enumerate(sources)
        ]
        counts = [0]
        for before, here in pairwise(maps):
            counts.append(counts[-1] + 1 if here == before else 0)
        return counts

    def check_loops(self) -> None:
        """Raises:
        ValueError: A scale, map or history that the recursions cannot have.
        """
        if not 0 < self.residual_scale < math.inf:
            raise ValueError(f"residual_scale must be a positive number, got {self.residual_scale}.")
        depths = self.depth_map
        if depths is not None and (len(depths) != self.num_recursions or sorted(depths) != depths or depths[0] < 0):
            raise ValueError(
                f"depth_map {depths} is not one rising depth for each of {self.num_recursions} recursions. It is made "
                f"by with_recursions."
            )
        if self.anderson < 0:
            raise ValueError(f"anderson must be a number of loops, 0 for none; got {self.anderson}.")
        if self.anderson and not any(self.repetitions):
            raise ValueError(
                f"anderson={self.anderson} mixes loops that repeat a depth, and of {self.num_recursions} recursions "
                f"none does. Take more recursions than the model was made with, or leave anderson out."
            )

    def with_recursions(
        self, num_recursions: int, *, residual_scale: float | Literal["auto"] = "auto", anderson: int = 0
    ) -> RecursiveConfig:
        """The config of ``RecursiveForCausalLM.with_recursions``, which says what the arguments mean.

        Raises:
            ValueError: Less than one recursion, or a scale or history that they cannot have.
        """
        if num_recursions < 1:
            raise ValueError(f"A model has at least 1 recursion, got {num_recursions}.")
        if self.router is not None:
            raise ValueError(
                f"The model has {self.router} routers, which were trained for {self.num_recursions} recursions at "
                f"their scale. Change those of a model without routers."
            )
        changes: dict[str, Any] = {"num_recursions": num_recursions, "anderson": anderson}
        changes["residual_scale"] = residual_scale
        if residual_scale == "auto":
            changes["residual_scale"] = self.residual_scale * self.num_recursions / num_recursions
        fields = {key: value for key, value in self.to_dict().items() if key not in _DERIVED}
        if num_recursions != self.num_recursions:
            depths = spread_depths(num_recursions, self.num_recursions)
            positions = self.layout.sources(depths)
            changes["num_hidden_layers"] = len(positions)
            changes["depth_map"] = depths if self.depth_map is None else [self.depth_map[depth] for depth in depths]
            changes |= {key: [value[position] for position in positions] for key, value in self._by_layer(fields)}
            changes |= {"exit_policy": None, "exit_thresholds": None, "exit_depth": None}
            if num_recursions == 1:
                changes["exit_head"] = None
        return type(self)(**{**fields, **changes, "attn_implementation": self._attn_implementation})

    def _by_layer(self, fields: dict[str, Any]) -> list[tuple[str, list[Any]]]:
        """The dense family's fields, among ``fields``, that have an entry for every effective layer."""
        own = set(inspect.signature(RecursiveConfig.__init__).parameters) | _DERIVED | _NOT_COPIED | {"eos_token_id"}
        return [
            (key, list(value))
            for key, value in fields.items()
            if key not in own and isinstance(value, list | tuple) and len(value) == self.num_hidden_layers
        ]

    def dense_config(self) -> PreTrainedConfig:
        """The dense family's own config, of the effective depth: what the unrolled model has."""
        dense_class = CONFIG_MAPPING[self.dense_model_type]
        own = set(inspect.signature(RecursiveConfig.__init__).parameters) | _DERIVED
        fields = {key: value for key, value in self.to_dict().items() if key not in own | _NOT_COPIED}
        return dense_class(**fields)

    def rank_of(self, index: int, path: str, in_features: int, out_features: int) -> int:
        """LoRA rank of the shared linear ``path`` (``"self_attn.q_proj"``) in block layer ``index``."""
        rank = self.lora_rank
        names = path.split(".")
        for start in reversed(range(len(names))):
            rank = self.lora_rank_pattern.get(".".join(names[start:]), rank)
        rank = self.lora_rank_pattern.get(f"{index}.{path}", rank)
        return min(rank, in_features, out_features)

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields: readers of ``config.json`` outside transformers do not know the dense family's defaults.

        Except where it was loaded from, which may be a path of this machine.
        """
        return {key: value for key, value in self.to_dict().items() if key != "_name_or_path"}

    @staticmethod
    def _refuse_misspelt(fields: dict[str, Any], dense: PreTrainedConfig) -> None:
        """transformers keeps any unknown key as an attribute, so a misspelt field of ours would vanish silently."""
        own = set(inspect.signature(RecursiveConfig.__init__).parameters) - {"self", "dense_fields"}
        known = set(type(dense)().to_dict())
        for key in fields.keys() - known:
            if nearest := difflib.get_close_matches(key, own, n=1, cutoff=0.8):
                raise ValueError(f"Unknown config key '{key}'. Did you mean '{nearest[0]}'?")


_DERIVED = {"num_unique_layers", "layer_to_block", "block_size", "auto_map"}
_NOT_COPIED = {
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "quantization_config",
    "_name_or_path",
}
