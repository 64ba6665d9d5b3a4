"""The recursive model. Importing this package registers it with transformers' Auto classes.

The files named ``*recursive*`` travel inside checkpoints, flat, as far as a checkpoint uses them: they import torch,
transformers and one another only.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .complete_model import RecursiveForCausalLM, RecursiveModel, code_files, copy_travelling_files, travelling_files
from .configuration_recursive import (
    FORMAT_VERSION,
    ROUTED_KV,
    ROUTER_DECISIONS,
    ROUTER_GATES,
    ROUTER_WIDTHS,
    ROUTERS,
    RecursiveConfig,
)
from .recursive_base import RecursiveOutput
from .recursive_decoding import DepthDecoder
from .recursive_exit_generation import ExitGenerateOutput
from .recursive_exit_settings import ExitSettings, LearnedThresholds
from .recursive_exits import EXIT_HEADS, KV_MODES, ExitHead, ExitKind
from .recursive_layers import (
    CACHE_ARGUMENT,
    DepthView,
    FamilyParts,
    PerDepth,
    RelaxedLinear,
    SharedLayer,
    UnsupportedFamily,
    weight_owners,
)
from .recursive_layout import SHARINGS, LayerLayout, LayerRef, LayoutError
from .recursive_policies import EXIT_POLICIES, ExitContext, ExitLimits, ExitPolicy, decide_exits, make_policy
from .recursive_routed_cache import RoutedCache
from .recursive_routing import RouterKind, Routing, TokenRouter
from .recursive_speculation import SpeculationOutput, SpeculationSettings

AutoConfig.register("recursive", RecursiveConfig, exist_ok=True)
AutoModel.register(RecursiveConfig, RecursiveModel, exist_ok=True)
AutoModelForCausalLM.register(RecursiveConfig, RecursiveForCausalLM, exist_ok=True)

MINIMUM_TRANSFORMERS = "5.17"
"""The oldest transformers that runs the files of this package."""

__all__ = [
    "CACHE_ARGUMENT",
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
    "DepthDecoder",
    "DepthView",
    "ExitContext",
    "ExitGenerateOutput",
    "ExitHead",
    "ExitKind",
    "ExitLimits",
    "ExitPolicy",
    "ExitSettings",
    "FamilyParts",
    "LayerLayout",
    "LayerRef",
    "LayoutError",
    "LearnedThresholds",
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
    "code_files",
    "copy_travelling_files",
    "decide_exits",
    "make_policy",
    "travelling_files",
    "weight_owners",
]
