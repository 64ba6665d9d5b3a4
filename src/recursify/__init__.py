"""Convert pretrained LLMs into recursive ones: smaller on disk and in memory.

Every public name is imported on first use, so importing this package takes milliseconds. It also registers recursive
models with transformers: ``AutoModelForCausalLM.from_pretrained`` loads them without ``trust_remote_code``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recursify.errors import (
    CheckpointError,
    EngineError,
    HubError,
    OutputError,
    ParityError,
    PlanError,
    RecursifyError,
    SettingsError,
    TextError,
    TrainingError,
    UnsupportedModelError,
)
from recursify.registration import register_on_import

if TYPE_CHECKING:
    from recursify.bench.plan import benchmark_model
    from recursify.checkpoint.description import inspect_model
    from recursify.checkpoint.loading import load_model
    from recursify.convert.export import export_model
    from recursify.convert.pipeline import convert_model, plan_conversion
    from recursify.convert.settings import ConversionSettings
    from recursify.engine.config import EngineConfig
    from recursify.engine.engine import Engine
    from recursify.engine.request import RequestOutput, SamplingParams
    from recursify.evaluation.evaluate import evaluate_model
    from recursify.evaluation.exit_calibration import calibrate_exits
    from recursify.evaluation.tasks import evaluate_tasks
    from recursify.hub.push import push_model
    from recursify.modeling import ExitSettings, RecursiveConfig, RecursiveForCausalLM
    from recursify.server.run import serve_model
    from recursify.server.settings import ServerSettings
    from recursify.uptrain.run import uptrain_model
    from recursify.uptrain.settings import UptrainSettings

    __version__: str

MODULES = {
    "ConversionSettings": "recursify.convert.settings",
    "Engine": "recursify.engine.engine",
    "EngineConfig": "recursify.engine.config",
    "ExitSettings": "recursify.modeling",
    "RecursiveConfig": "recursify.modeling",
    "RecursiveForCausalLM": "recursify.modeling",
    "RequestOutput": "recursify.engine.request",
    "SamplingParams": "recursify.engine.request",
    "ServerSettings": "recursify.server.settings",
    "UptrainSettings": "recursify.uptrain.settings",
    "benchmark_model": "recursify.bench.plan",
    "calibrate_exits": "recursify.evaluation.exit_calibration",
    "convert_model": "recursify.convert.pipeline",
    "evaluate_model": "recursify.evaluation.evaluate",
    "evaluate_tasks": "recursify.evaluation.tasks",
    "export_model": "recursify.convert.export",
    "inspect_model": "recursify.checkpoint.description",
    "load_model": "recursify.checkpoint.loading",
    "plan_conversion": "recursify.convert.pipeline",
    "push_model": "recursify.hub.push",
    "serve_model": "recursify.server.run",
    "uptrain_model": "recursify.uptrain.run",
}
"""Module of every public name that is imported on first use."""

__all__ = [
    "CheckpointError",
    "ConversionSettings",
    "Engine",
    "EngineConfig",
    "EngineError",
    "ExitSettings",
    "HubError",
    "OutputError",
    "ParityError",
    "PlanError",
    "RecursifyError",
    "RecursiveConfig",
    "RecursiveForCausalLM",
    "RequestOutput",
    "SamplingParams",
    "ServerSettings",
    "SettingsError",
    "TextError",
    "TrainingError",
    "UnsupportedModelError",
    "UptrainSettings",
    "__version__",
    "benchmark_model",
    "calibrate_exits",
    "convert_model",
    "evaluate_model",
    "evaluate_tasks",
    "export_model",
    "inspect_model",
    "load_model",
    "plan_conversion",
    "push_model",
    "serve_model",
    "uptrain_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("recursify")
        except PackageNotFoundError:  # a source tree that is not installed
            value = "0+unknown"
    elif name in MODULES:
        value = getattr(import_module(MODULES[name]), name)
    else:
        raise AttributeError(f"module 'recursify' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, including those not imported yet."""
    return sorted(__all__)


register_on_import()
