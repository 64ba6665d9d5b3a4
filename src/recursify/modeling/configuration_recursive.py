"""Configuration of a recursive model: the dense model's own fields, verbatim and flat, plus the layout.

Everything that reads a config by field name (caches, vLLM, lm-eval, memory estimators) finds the dense model's true
values. ``num_hidden_layers`` is the *effective* depth, since every KV cache is sized by it.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import math
import os
from collections.abc import Collection
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .recursive_exits import EXIT_HEADS, KV_MODES
from .recursive_layout import LayerLayout, LayoutError
from .recursive_overrides import OVERRIDABLE, refuse_other_models

FORMAT_VERSION = 1
"""Version of the on-disk format. Raised when an older recursify could not read a newer folder."""

ROUTERS = ("expert_choice", "token_choice")
"""Kinds of routers: every recursion chooses its tokens, or every token the number of its recursions."""

ROUTER_WIDTHS = {"linear": 0, "mlp": 2, "wide_mlp": 4, "random": None}
"""Router architectures: linear, MLP (multiplier of the hidden size), or random (a control)."""

ROUTER_ACTIVATIONS = ("sigmoid", "softmax")

ROUTER_GATES = ("residual", "mor")
"""Combinations of a recursion's input and output: ``residual`` is ours (``recursive_routing.gated``), ``mor`` as
published."""

ROUTED_KV = ("recursion_wise", "shared")
"""Keys that a recursion attends to: its own, of the tokens that run it; or those of the first recursion, which spares
the others their key and value projections (MoR, section 2.2.2)."""

ROUTER_DECISIONS = ("own", "auxiliary")
"""Router that decides at inference: the router itself, taught by an auxiliary loss; or a second one, trained alone on
detached states (MoR, section 2.2.1)."""


class RecursiveConfig(PreTrainedConfig):
    """Configuration of a recursive model.

    Args:
        dense_model_type: ``model_type`` of the dense family whose decoder layers this model runs (``"llama"``, ...).
        num_recursions: Number of applications of the shared block, at least 1.
        num_prelude_layers: Unshared layers before the block.
        num_coda_layers: Unshared layers after the block.
        sharing: ``"cycle"`` (the block, then again) or ``"sequence"`` (each layer repeated in place).
        lora_rank: Rank of the per-depth residual on every shared linear; 0 for none. Clamped to each matrix.
        lora_rank_pattern: Ranks that differ from ``lora_rank``: ``{"mlp.down_proj": 128, "3.self_attn.q_proj": 32}``.
            A key is a module path inside the shared layer, optionally preceded by the block layer's index; the most
            specific one wins.
        tie_norms: One norm (and bias) for all depths, as in the papers, instead of one per depth.
        exit_head: Kind of the exit heads after the recursions (``EXIT_HEADS``); None for a model without them.
        exit_rank: Rank of a ``low_rank`` exit head.
        exit_through_coda: A token that exits still runs the coda, as at full depth.
        exit_kv: KV mode that the exits were trained for (``KV_MODES``); the engine uses it.
        exit_policy: Exit policy that ``exit_thresholds`` were calibrated for.
        exit_vocabulary: Number of vocabulary entries that this policy scores; None for all.
        exit_thresholds: Calibrated thresholds, one per exit, for ``generate(exit_policy=…)`` with that policy's name.
        exit_depth: Depth after which every token exits; None runs all recursions. ``from_pretrained`` takes it for
            one run (:meth:`as_saved`), and so does any tool that passes arguments on (lm-eval's ``--model_args``).
        residual_scale: Factor on the steps of the shared layers: ``h + residual_scale · (layer(h) - h)``.
        depth_map: Depth of the original model that each depth took its own parameters from, in a model with another
            number of recursions (``with_recursions``).
        anderson: Number of earlier loops mixed into one that repeats them (``modeling_recursive_anderson.py``).
        router: Kind of router that decides which tokens run a recursion (``ROUTERS``); None runs all of them.
        router_width: Architecture of a router (``ROUTER_WIDTHS``).
        router_activation: ``sigmoid`` or ``softmax``; None takes MoR's for the kind of router.
        router_temperature: Divisor of a router's input.
        router_alpha: Factor on gates; None takes MoR's, 0.1 for ``expert_choice`` and 1 for ``token_choice``.
        router_gate: Combination of a recursion's input and output (``ROUTER_GATES``).
        router_capacities: Fraction of the tokens in each recursion with ``expert_choice``, not rising; None takes
            ``(R − r + 1) / R``.
        router_kv: Keys that a recursion attends to (``ROUTED_KV``).
        router_decision: Router that decides at inference (``ROUTER_DECISIONS``).
        router_thresholds: Lowest score of a token that runs a recursion at inference, by depth; None takes 0.5, and no
            threshold where the capacity is 1.
        format_version: Version of the on-disk format.
        dense_fields: Fields of the dense family's configuration, ``num_hidden_layers`` being the effective depth.

    Raises:
        ValueError: A field of our own that is misspelt or has a wrong type, an unknown ``dense_model_type``, a newer
            ``format_version``, exits or routers without a boundary between recursions, or exit, loop or router fields
            that do not fit.
        LayoutError: The effective depth does not fold as the other fields require.
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
        own = {name: value for name, value in locals().items() if name in _own_fields()}
        _check_types(own)
        if dense_model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"Unknown dense_model_type '{dense_model_type}': the installed transformers has no such family."
            )
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format_version {format_version}, newer than {FORMAT_VERSION}, the newest this "
                f"code reads. Upgrade recursify, or load with the code in the checkpoint (trust_remote_code=True)."
            )
        derived = {key: dense_fields.pop(key, None) for key in ("model_type", *_DERIVED)}
        dense = CONFIG_MAPPING[dense_model_type](**dense_fields)
        _refuse_misspelt(dense_fields, dense)
        verbatim = {key: value for key, value in dense.to_dict().items() if key not in _NOT_COPIED}
        super().__init__(**verbatim)
        for key, value in verbatim.items():
            # PreTrainedConfig drops fields that it takes for generation settings, use_cache among them.
            if key not in self.__dict__ and key != "dtype":
                setattr(self, key, value)
        self._attn_implementation = dense_fields.get("attn_implementation")
        for key, value in own.items():
            setattr(self, key, value)
        self.lora_rank_pattern: dict[str, int] = dict(lora_rank_pattern or {})
        self._overrides: dict[str, tuple[Any, Any]] = {}  # given to from_pretrained: that value, and the one on disk
        self._derive(derived)
        self.check_fields()

    def _derive(self, given: dict[str, Any]) -> None:
        """Set the fields that follow from the layout, equal to those ``given`` by a file."""
        if self.sharing not in ("cycle", "sequence"):
            raise ValueError(f"Unknown sharing '{self.sharing}' in the config. Use 'cycle' or 'sequence'.")
        layout = self.layout
        self.block_size = layout.block_size
        self.num_unique_layers = layout.num_unique_layers
        self.layer_to_block = layout.layer_to_block()
        for key in ("num_unique_layers", "layer_to_block", "block_size"):
            if given[key] not in (None, getattr(self, key)):
                raise LayoutError(
                    f"config.{key} is {given[key]}, but {self.num_hidden_layers} layers with {self.num_recursions} "
                    f"recursions, a prelude of {self.num_prelude_layers}, a coda of {self.num_coda_layers} and sharing "
                    f"'{self.sharing}' make it {getattr(self, key)}. The config was edited by hand: convert again "
                    f"instead."
                )

    def check_fields(self) -> None:
        """Check the fields of this class.

        Raises:
            ValueError: A value outside its range, or fields that do not fit the layout or one another.
        """
        if self.lora_rank < 0 or any(rank < 0 for rank in self.lora_rank_pattern.values()):
            raise ValueError(f"LoRA ranks cannot be negative, got {self.lora_rank} and {self.lora_rank_pattern}.")
        if self.exit_head is not None:
            self._check_exits()
        if self.exit_thresholds is not None and len(self.exit_thresholds) != len(self.exit_depths):
            raise ValueError(
                f"exit_thresholds has {len(self.exit_thresholds)} values, and the model {len(self.exit_depths)} exits. "
                f"Choose them again: recursify calibrate-exits."
            )
        if self.router is not None:
            _check_routers(self)
        self.depth_to_exit_at()
        self._check_loops()

    @classmethod
    def from_dense(cls, dense: PreTrainedConfig, layout: LayerLayout, **fields: Any) -> RecursiveConfig:
        """Configuration of ``dense`` folded by ``layout``; ``fields`` are this class's own (``lora_rank``, ...)."""
        return cls(
            dense_model_type=dense.model_type,
            num_recursions=layout.num_recursions,
            num_prelude_layers=layout.num_prelude_layers,
            num_coda_layers=layout.num_coda_layers,
            sharing=layout.order,
            **fields,
            **{key: value for key, value in dense.to_dict().items() if key not in {*_NOT_COPIED, *_own_fields()}},
        )

    @staticmethod
    def clash_with(dense: PreTrainedConfig) -> str | None:
        """Name of a field that the family of ``dense`` and this class both have; None if there is none."""
        fields = {*inspect.signature(type(dense)).parameters, *type(dense).attribute_map}
        return next((name for name in (*_own_fields(), *_DERIVED) if name in fields and name != "auto_map"), None)

    @property
    def layout(self) -> LayerLayout:
        """Map between positions, stored layers and depths."""
        return LayerLayout.fold(
            self.num_hidden_layers,
            self.num_recursions,
            self.sharing,
            num_prelude_layers=self.num_prelude_layers,
            num_coda_layers=self.num_coda_layers,
        )

    @property
    def exit_depths(self) -> tuple[int, ...]:
        """Depths after which a token can exit: all but the last; none in ``sequence`` sharing."""
        return tuple(range(self.num_recursions - 1)) if self.sharing == "cycle" else ()

    @property
    def auto_map(self) -> dict[str, str]:
        """The classes of a checkpoint's own code, which has only the parts that these fields use."""
        model = causal_model = "modeling_recursive"
        if self.router is not None:
            model = causal_model = "modeling_recursive_routed"
        elif self.anderson:
            model = causal_model = "modeling_recursive_anderson"
        elif self.exit_head is not None or self.exit_policy is not None or self.exit_thresholds is not None:
            causal_model = "modeling_recursive_exits"
        return {
            "AutoConfig": "configuration_recursive.RecursiveConfig",
            # vLLM's Transformers backend builds `AutoModel.from_config`.
            "AutoModel": f"{model}.RecursiveModel",
            "AutoModelForCausalLM": f"{causal_model}.RecursiveForCausalLM",
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Configuration of ``config_dict``, with the fields in ``kwargs`` for this run: they are not written.

        Raises:
            ValueError: A field in ``kwargs`` that makes another model, or has a wrong type or value.
        """
        given = {name: value for name, value in kwargs.items() if name in _own_fields() or name == "num_hidden_layers"}
        refuse_other_models(given, config_dict, _own_fields())
        _check_types(given)
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        stored = {name: config_dict.get(name, _own_fields()[name]) for name in OVERRIDABLE if name in given}
        config._overrides = {name: (given[name], value) for name, value in stored.items() if value != given[name]}
        config.check_fields()
        return loaded

    def as_saved(self) -> RecursiveConfig:
        """This configuration as a file has it: with its own values of the fields that ``from_pretrained`` was given."""
        saved = copy.deepcopy(self)
        saved._overrides = {}
        for name, (given, stored) in self._overrides.items():
            if getattr(self, name) == given:  # and was not set since
                setattr(saved, name, stored)
        return saved

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **kwargs: Any) -> None:
        """Write ``config.json``, without what ``from_pretrained`` was given; arguments are those of transformers."""
        if self._overrides:
            return self.as_saved().save_pretrained(save_directory, *arguments, **kwargs)
        return super().save_pretrained(save_directory, *arguments, **kwargs)

    def change(self, **fields: Any) -> None:
        """Set ``fields`` of this class, all or none.

        Raises:
            ValueError: As :meth:`check_fields`.
        """
        before = {name: getattr(self, name) for name in fields}
        self.__dict__.update(fields)
        try:
            self.check_fields()
        except ValueError:
            self.__dict__.update(before)
            raise
        self._overrides = {name: entry for name, entry in self._overrides.items() if name not in fields}

    def _check_exits(self) -> None:
        _check_choices(self, exit_head=EXIT_HEADS, exit_kv=KV_MODES)
        if self.exit_rank < 1:
            raise ValueError(f"exit_rank must be at least 1, got {self.exit_rank}.")
        if not self.exit_depths:
            raise ValueError(
                f"A model with {self.num_recursions} recursions in {self.sharing} sharing has no boundary between "
                f"recursions, so it cannot exit. Exits need cycle sharing and at least 2 recursions."
            )

    @staticmethod
    def router_defaults() -> dict[str, Any]:
        """Router fields with their defaults."""
        return {name: default for name, default in _own_fields().items() if name.partition("_")[0] == "router"}

    def depth_to_exit_at(self, num_recursions: int | None = None, exit_depth: int | None = None) -> int | None:
        """Depth after which a call exits: ``exit_depth``, or the config's if the call names no ``num_recursions``.

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

    def _check_loops(self) -> None:
        if not 0 < self.residual_scale < math.inf:
            raise ValueError(f"residual_scale must be a positive number, got {self.residual_scale}.")
        depths = self.depth_map
        if depths is not None and (len(depths) != self.num_recursions or sorted(depths) != depths or depths[0] < 0):
            raise ValueError(
                f"depth_map {depths} is not one rising depth for each of {self.num_recursions} recursions. Make it by "
                f"with_recursions."
            )
        if self.anderson < 0:
            raise ValueError(f"anderson must be a number of loops, 0 for none; got {self.anderson}.")

    def fields_by_layer(self) -> dict[str, list[Any]]:
        """Fields of the dense family that have an entry for every effective layer."""
        own = {*_own_fields(), *_NOT_COPIED, "eos_token_id"}
        return {
            key: list(value)
            for key, value in self.to_dict().items()
            if key not in own and isinstance(value, list | tuple) and len(value) == self.num_hidden_layers
        }

    def dense_config(self) -> PreTrainedConfig:
        """Configuration of the dense family, with the effective depth."""
        unwanted = {*_own_fields(), *_NOT_COPIED}
        fields = {key: value for key, value in self.to_dict().items() if key not in unwanted}
        return CONFIG_MAPPING[self.dense_model_type](**fields)

    def rank_of(self, index: int, path: str, in_features: int, out_features: int) -> int:
        """LoRA rank of the shared linear ``path`` (``"self_attn.q_proj"``) in block layer ``index``."""
        rank, names = int(self.lora_rank), path.split(".")
        for start in reversed(range(len(names))):
            rank = self.lora_rank_pattern.get(".".join(names[start:]), rank)
        rank = self.lora_rank_pattern.get(f"{index}.{path}", rank)
        return min(rank, in_features, out_features)

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the map of classes that these fields need."""
        fields = {**super().to_dict(), "auto_map": self.auto_map}
        fields.pop("_overrides", None)
        return fields

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields: readers of ``config.json`` outside transformers do not know the dense family's defaults.

        The name it was loaded from, which may be a path of this machine, is left out.
        """
        return {key: value for key, value in self.to_dict().items() if key != "_name_or_path"}


@functools.cache
def _own_fields() -> dict[str, Any]:
    """Fields of :class:`RecursiveConfig` that are not the dense family's, with their defaults."""
    parameters = inspect.signature(RecursiveConfig.__init__).parameters
    return {name: entry.default for name, entry in parameters.items() if name not in ("self", "dense_fields")}


def _check_types(own: dict[str, Any]) -> None:
    """Raise a ValueError if a field of :class:`RecursiveConfig` does not have the type of its annotation."""
    for name, kind in get_type_hints(RecursiveConfig.__init__).items():
        if name in own and not _has_type(own[name], kind):
            raise ValueError(
                f"config.{name} is {own[name]!r}, which is not {RecursiveConfig.__init__.__annotations__[name]}. "
                f"Correct it in config.json, or convert again."
            )


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_has_type(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_has_type(entry, *get_args(kind)) for entry in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_has_type(entry, get_args(kind)[1]) for entry in value.values())
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def _refuse_misspelt(fields: dict[str, Any], dense: PreTrainedConfig) -> None:
    """Refuse a misspelt field: transformers keeps any unknown key as an attribute, so it would vanish silently."""
    known = set(type(dense)().to_dict())
    for key in fields.keys() - known:
        if nearest := difflib.get_close_matches(key, _own_fields(), n=1, cutoff=0.8):
            raise ValueError(f"Unknown config key '{key}'. Did you mean '{nearest[0]}'?")


_DERIVED = ("num_unique_layers", "layer_to_block", "block_size", "auto_map")
_NOT_COPIED = ("model_type", "architectures", "transformers_version", "quantization_config", "_name_or_path", *_DERIVED)


def _check_choices(config: Any, **choices: Collection[str]) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"Unknown {name} '{getattr(config, name)}'. Use one of: {', '.join(known)}.")


def _check_routers(config: Any) -> None:
    _check_choices(config, router=ROUTERS, router_width=ROUTER_WIDTHS, router_gate=ROUTER_GATES)
    _check_choices(config, router_kv=ROUTED_KV, router_decision=ROUTER_DECISIONS)
    if config.router_activation is not None:
        _check_choices(config, router_activation=ROUTER_ACTIVATIONS)
    if config.sharing != "cycle" or config.num_recursions < 2:
        raise ValueError(
            f"A model with {config.num_recursions} recursions in {config.sharing} sharing has no boundary between "
            f"recursions, so there is nothing to route tokens to. Routers need cycle sharing and at least 2 recursions."
        )
    if config.anderson:
        raise ValueError(
            f"anderson={config.anderson} mixes loops of all tokens, and routers keep some out of a loop. Leave one out."
        )
    if config.router_temperature <= 0:
        raise ValueError(f"router_temperature must be above 0, got {config.router_temperature:g}.")
    if config.router == "expert_choice" and config.router_activation == "softmax":
        raise ValueError(
            "An expert-choice router cannot have a softmax: over the tokens of a sequence it would look at later ones. "
            "Use router_activation sigmoid."
        )
    _check_router_lists(config)
    if config.router == "token_choice" and (config.router_width == "random" or config.router_decision != "own"):
        raise ValueError(
            "A random router and an auxiliary one are for expert_choice: a token-choice router decides alike in "
            "training and inference. Leave router_width and router_decision at their defaults."
        )
    if config.router_kv == "shared":
        _check_same_layers(config)


def _check_router_lists(config: Any) -> None:
    """Check the router fields that have a value for each recursion."""
    for name in ("router_capacities", "router_thresholds"):
        values = getattr(config, name)
        if values is not None and config.router == "token_choice":
            raise ValueError(
                f"{name} {values} are for expert_choice: in token_choice every token chooses, without a threshold. "
                f"Leave them out."
            )
        if values is not None and len(values) != config.num_recursions:
            raise ValueError(f"{name} has {len(values)} values, and the model {config.num_recursions} recursions.")
    capacities, thresholds = config.router_capacities or [], config.router_thresholds or []
    for depth, capacity in enumerate(capacities):
        if not 0 < capacity <= 1:
            raise ValueError(
                f"router_capacities {capacities}: {capacity:g} at depth {depth} leaves "
                f"{'no token' if capacity <= 0 else 'more tokens than there are'}. A capacity is the part of the "
                f"tokens that goes into a recursion: above 0, and 1 at most."
            )
        if depth and capacity > capacities[depth - 1]:
            raise ValueError(
                f"router_capacities {capacities} rise from {capacities[depth - 1]:g} to {capacity:g} at depth {depth}, "
                f"but only tokens of the recursion before can go into one. Give capacities that fall or stay."
            )
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(f"router_thresholds {thresholds} must be between 0 and 1: a router's score is a probability.")


def _check_same_layers(config: Any) -> None:
    """Require equal attention at all depths: keys of one depth are read at another."""
    kinds, layout = getattr(config, "layer_types", None) or {}, config.layout
    for index in range(layout.block_size if kinds else 0):
        found = {kinds[position] for position in layout.positions(index)}
        if len(found) > 1:
            raise ValueError(
                f"router_kv 'shared' has layer {index} of the block read the first recursion's keys, but its positions "
                f"{layout.positions(index)} attend in different ways ({', '.join(sorted(found))}). Use recursion_wise."
            )
