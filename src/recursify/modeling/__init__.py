"""What a recursive model is. Importing this package registers it with transformers' Auto classes.

The files beside this one are copied into every checkpoint, flat, and import nothing of recursify.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_recursive import FORMAT_VERSION, RecursiveConfig
from .modeling_recursive import (
    DepthView,
    PerDepth,
    RecursiveForCausalLM,
    RecursiveModel,
    RecursiveOutput,
    RelaxedLinear,
    SharedLayer,
    UnsupportedFamily,
)
from .recursive_decoding import DepthDecoder, ExitGenerateOutput
from .recursive_exits import EXIT_HEADS, ExitHead, ExitKind
from .recursive_layout import SHARINGS, LayerLayout, LayerRef, LayoutError
from .recursive_policies import EXIT_POLICIES, KV_MODES, ExitLimits, ExitPolicy, ExitSettings, exits, make_policy
from .recursive_routed_cache import RoutedCache
from .recursive_routing import (
    ROUTED_KV,
    ROUTER_DECISIONS,
    ROUTER_GATES,
    ROUTER_WIDTHS,
    ROUTERS,
    RouterKind,
    Routing,
    TokenRouter,
)
from .recursive_speculation import SpeculationOutput, SpeculationSettings
from .recursive_thresholds import AdaptiveThresholds

AutoConfig.register("recursive", RecursiveConfig, exist_ok=True)
AutoModel.register(RecursiveConfig, RecursiveModel, exist_ok=True)
AutoModelForCausalLM.register(RecursiveConfig, RecursiveForCausalLM, exist_ok=True)

MINIMUM_TRANSFORMERS = "5.17"
"""The oldest transformers that runs the files of this package."""

TRAVELLING_FILES = (
    "configuration_recursive.py",
    "recursive_layout.py",
    "recursive_loops.py",
    "recursive_exits.py",
    "recursive_thresholds.py",
    "recursive_policies.py",
    "recursive_decoding.py",
    "recursive_speculation.py",
    "recursive_routing.py",
    "recursive_routed_cache.py",
    "recursive_routed_walk.py",
    "modeling_recursive.py",
)
"""Files of this package that a checkpoint carries, so that it loads where recursify is not installed."""

__all__ = [
    "EXIT_HEADS",
    "EXIT_POLICIES",
    "FORMAT_VERSION",
    "KV_MODES",
    "MINIMUM_TRANSFORMERS",
    "ROUTED_KV",
    "ROUTERS",
    "ROUTER_DECISIONS",
    "ROUTER_GATES",
    "ROUTER_WIDTHS",
    "SHARINGS",
    "TRAVELLING_FILES",
    "AdaptiveThresholds",
    "DepthDecoder",
    "DepthView",
    "ExitGenerateOutput",
    "ExitHead",
    "ExitKind",
    "ExitLimits",
    "ExitPolicy",
    "ExitSettings",
    "LayerLayout",
    "LayerRef",
    "LayoutError",
    "PerDepth",
    "RecursiveConfig",
    "RecursiveForCausalLM",
    "RecursiveModel",
    "RecursiveOutput",
    "RelaxedLinear",
    "RoutedCache",
    "RouterKind",
    "Routing",
    "SharedLayer",
    "SpeculationOutput",
    "SpeculationSettings",
    "TokenRouter",
    "UnsupportedFamily",
    "exits",
    "make_policy",
]
