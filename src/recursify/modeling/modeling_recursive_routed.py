"""A recursive model with routers (Mixture-of-Recursions)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import Cache

from .modeling_recursive import RecursiveForCausalLM as PlainForCausalLM
from .modeling_recursive import RecursiveModel as PlainModel
from .recursive_base import LayerWalk
from .recursive_routed_cache import RoutedCache
from .recursive_routed_walk import RoutedWalk, drop_key_projections, routed_generate_arguments
from .recursive_routing import RouterKind, make_routers


class RecursiveModel(PlainModel):
    """Embedding, prelude, shared block with routers, coda and final norm."""

    training_capacities: list[float] | None = None

    def _add_parts(self) -> None:
        if self.config.router is None:
            super()._add_parts()
        else:
            self.make_routers()

    def make_routers(self) -> None:
        """Create the routers of the configuration; their weights are not initialized."""
        self.routers, self.auxiliary_routers = make_routers(self.config)
        if self.config.router_kv == "shared":
            drop_key_projections(self.block)

    def _make_cache(self) -> Cache | None:
        if self.routers is None:
            return super()._make_cache()
        # Training chooses tokens from whole sequences, without a cache.
        return None if self.training else RoutedCache(self.config)

    def _make_walk(self, states: Tensor, attention_mask: Any, **call: Any) -> LayerWalk:
        if self.routers is None:
            return super()._make_walk(states, attention_mask, **call)
        return RoutedWalk(self, states, attention_mask=attention_mask, **call)


class RecursiveForCausalLM(PlainForCausalLM):
    """A recursive model with routers and its language-modelling head."""

    base_model_class: ClassVar[type[PlainModel]] = RecursiveModel

    def add_routers(self, kind: RouterKind, **fields: Any) -> None:
        """Add routers, in place of existing ones; until they are trained, all tokens run all recursions.

        ``router_kv="shared"`` changes the model at once: deeper recursions read the first one's keys.

        Args:
            kind: Kind of router, one of ``ROUTERS``.
            fields: Router fields of the configuration (``router_capacities=[1, 0.5]``); others take their defaults.

        Raises:
            ValueError: A layout without boundaries between recursions, unknown fields, or fields that exclude one
                another.
        """
        config = self.config
        known = {name: default for name, default in config.router_defaults().items() if name != "router"}
        if unknown := sorted(fields.keys() - known.keys()):
            raise ValueError(f"Unknown router field '{unknown[0]}'. Use one of: {', '.join(known)}.")
        if config.router_kv == "shared" != fields.get("router_kv", "recursion_wise"):
            raise ValueError(
                "The model's deeper recursions read the first one's keys and values and have no projections. "
                "Keep router_kv at 'shared', or start from the model without routers."
            )
        config.change(**{**known, **fields, "router": kind})
        self.model.make_routers()
        for routers in (self.model.routers, self.model.auxiliary_routers):
            for router in routers or ():
                router.to(self.device, self.dtype).apply(self._init_weights)

    def generate(self, *arguments: Any, exit_policy: Any = None, speculate: Any = None, **kwargs: Any) -> Any:
        """transformers' ``generate``, with a cache that fits the routers.

        Raises:
            ValueError: An exit policy, speculation, or arguments that exclude routers.
        """
        if self.model.routers is not None:
            if exit_policy is not None or speculate:
                raise ValueError(
                    "The model's routers decide how far a token goes. Leave exit_policy and speculate out."
                )
            kwargs = routed_generate_arguments(self, kwargs)
        return super().generate(*arguments, exit_policy=exit_policy, speculate=speculate, **kwargs)
