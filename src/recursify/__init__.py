"""Convert pretrained LLMs into recursive ones: smaller on disk and in memory.

Every public name is imported on first use, so importing this package takes milliseconds. It also registers recursive
models with transformers: ``AutoModelForCausalLM.from_pretrained`` loads them without ``trust_remote_code``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recursify.errors import (
    CheckpointError,
    ContextLengthError,
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
from recursify.lazy import lazy_names
from recursify.registration import register_on_import

if TYPE_CHECKING:
    from recursify.bench.plan import benchmark_model
    from recursify.bench.results import BenchmarkResult
    from recursify.bench.settings import BenchSettings
    from recursify.checkpoint.description import ModelDescription, inspect_model
    from recursify.checkpoint.loading import load_model
    from recursify.convert.export import ExportResult, export_model
    from recursify.convert.pipeline import ConversionResult, convert_model, plan_conversion
    from recursify.convert.plan import ConversionPlan
    from recursify.convert.settings import ConversionSettings
    from recursify.engine.config import EngineConfig
    from recursify.engine.engine import Engine
    from recursify.engine.request import RequestOutput, SamplingParams
    from recursify.evaluation.evaluate import EvaluationResult, evaluate_model
    from recursify.evaluation.exit_calibration import ExitCalibration, calibrate_exits
    from recursify.evaluation.generation import GenerationResult, generate_text
    from recursify.evaluation.settings import EvaluationSettings, GenerationSettings
    from recursify.evaluation.tasks import TaskResults, evaluate_tasks
    from recursify.hub.push import PushResult, push_model
    from recursify.modeling import ExitSettings, RecursiveConfig, RecursiveForCausalLM
    from recursify.server.run import serve_model
    from recursify.server.settings import ServerSettings
    from recursify.uptrain.run import UptrainResult, uptrain_model
    from recursify.uptrain.settings import UptrainSettings
    from recursify.version import __version__

MODULES = {
    "BenchSettings": "recursify.bench.settings",
    "BenchmarkResult": "recursify.bench.results",
    "ConversionPlan": "recursify.convert.plan",
    "ConversionResult": "recursify.convert.pipeline",
    "ConversionSettings": "recursify.convert.settings",
    "Engine": "recursify.engine.engine",
    "EngineConfig": "recursify.engine.config",
    "EvaluationResult": "recursify.evaluation.evaluate",
    "EvaluationSettings": "recursify.evaluation.settings",
    "ExitCalibration": "recursify.evaluation.exit_calibration",
    "ExitSettings": "recursify.modeling",
    "ExportResult": "recursify.convert.export",
    "GenerationResult": "recursify.evaluation.generation",
    "GenerationSettings": "recursify.evaluation.settings",
    "ModelDescription": "recursify.checkpoint.description",
    "PushResult": "recursify.hub.push",
    "RecursiveConfig": "recursify.modeling",
    "RecursiveForCausalLM": "recursify.modeling",
    "RequestOutput": "recursify.engine.request",
    "SamplingParams": "recursify.engine.request",
    "ServerSettings": "recursify.server.settings",
    "TaskResults": "recursify.evaluation.tasks",
    "UptrainResult": "recursify.uptrain.run",
    "UptrainSettings": "recursify.uptrain.settings",
    "__version__": "recursify.version",
    "benchmark_model": "recursify.bench.plan",
    "calibrate_exits": "recursify.evaluation.exit_calibration",
    "convert_model": "recursify.convert.pipeline",
    "evaluate_model": "recursify.evaluation.evaluate",
    "evaluate_tasks": "recursify.evaluation.tasks",
    "export_model": "recursify.convert.export",
    "generate_text": "recursify.evaluation.generation",
    "inspect_model": "recursify.checkpoint.description",
    "load_model": "recursify.checkpoint.loading",
    "plan_conversion": "recursify.convert.pipeline",
    "push_model": "recursify.hub.push",
    "serve_model": "recursify.server.run",
    "uptrain_model": "recursify.uptrain.run",
}
"""Module of every public name that is imported on first use."""

__all__ = [
    "BenchSettings",
    "BenchmarkResult",
    "CheckpointError",
    "ContextLengthError",
    "ConversionPlan",
    "ConversionResult",
    "ConversionSettings",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EvaluationResult",
    "EvaluationSettings",
    "ExitCalibration",
    "ExitSettings",
    "ExportResult",
    "GenerationResult",
    "GenerationSettings",
    "HubError",
    "ModelDescription",
    "OutputError",
    "ParityError",
    "PlanError",
    "PushResult",
    "RecursifyError",
    "RecursiveConfig",
    "RecursiveForCausalLM",
    "RequestOutput",
    "SamplingParams",
    "ServerSettings",
    "SettingsError",
    "TaskResults",
    "TextError",
    "TrainingError",
    "UnsupportedModelError",
    "UptrainResult",
    "UptrainSettings",
    "__version__",
    "benchmark_model",
    "calibrate_exits",
    "convert_model",
    "evaluate_model",
    "evaluate_tasks",
    "export_model",
    "generate_text",
    "inspect_model",
    "load_model",
    "plan_conversion",
    "push_model",
    "serve_model",
    "uptrain_model",
]


__getattr__, __dir__ = lazy_names(__name__, MODULES)
register_on_import()
