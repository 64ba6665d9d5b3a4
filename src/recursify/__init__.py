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
    from recursify.convert.cost import CostEstimate, estimate_costs
    from recursify.convert.export import ExportResult, export_model
    from recursify.convert.layout_plan import LayoutPlan
    from recursify.convert.layout_search import LayoutChoice
    from recursify.convert.pipeline import ConversionResult, convert_model, plan_conversion, plan_layouts
    from recursify.convert.plan import ConversionPlan
    from recursify.convert.settings import ConversionSettings
    from recursify.engine.config import EngineConfig
    from recursify.engine.engine import Engine
    from recursify.engine.request import RequestOutput, SamplingParams
    from recursify.evaluation.evaluate import EvaluationResult, evaluate_model
    from recursify.evaluation.exit_calibration import ExitCalibration, calibrate_exits
    from recursify.evaluation.generation import GenerationResult, generate_text
    from recursify.evaluation.settings import (
        EvaluationSettings,
        ExitCalibrationSettings,
        GenerationSettings,
        TaskSettings,
    )
    from recursify.evaluation.tasks import TaskResults, evaluate_tasks
    from recursify.hub.push import PushResult, push_model
    from recursify.hub.settings import PushSettings
    from recursify.modeling import ExitSettings, RecursiveConfig, RecursiveForCausalLM
    from recursify.server.run import serve_model
    from recursify.server.settings import ServerSettings
    from recursify.uptrain.run import UptrainResult, uptrain_model
    from recursify.uptrain.settings import UptrainSettings
    from recursify.version import __version__

MODULES = {
    "recursify.bench.plan": ["benchmark_model"],
    "recursify.bench.results": ["BenchmarkResult"],
    "recursify.bench.settings": ["BenchSettings"],
    "recursify.checkpoint.description": ["ModelDescription", "inspect_model"],
    "recursify.checkpoint.loading": ["load_model"],
    "recursify.convert.cost": ["CostEstimate", "estimate_costs"],
    "recursify.convert.export": ["ExportResult", "export_model"],
    "recursify.convert.layout_plan": ["LayoutPlan"],
    "recursify.convert.layout_search": ["LayoutChoice"],
    "recursify.convert.pipeline": ["ConversionResult", "convert_model", "plan_conversion", "plan_layouts"],
    "recursify.convert.plan": ["ConversionPlan"],
    "recursify.convert.settings": ["ConversionSettings"],
    "recursify.engine.config": ["EngineConfig"],
    "recursify.engine.engine": ["Engine"],
    "recursify.engine.request": ["RequestOutput", "SamplingParams"],
    "recursify.evaluation.evaluate": ["EvaluationResult", "evaluate_model"],
    "recursify.evaluation.exit_calibration": ["ExitCalibration", "calibrate_exits"],
    "recursify.evaluation.generation": ["GenerationResult", "generate_text"],
    "recursify.evaluation.settings": [
        "EvaluationSettings",
        "ExitCalibrationSettings",
        "GenerationSettings",
        "TaskSettings",
    ],
    "recursify.evaluation.tasks": ["TaskResults", "evaluate_tasks"],
    "recursify.hub.push": ["PushResult", "push_model"],
    "recursify.hub.settings": ["PushSettings"],
    "recursify.modeling": ["ExitSettings", "RecursiveConfig", "RecursiveForCausalLM"],
    "recursify.server.run": ["serve_model"],
    "recursify.server.settings": ["ServerSettings"],
    "recursify.uptrain.run": ["UptrainResult", "uptrain_model"],
    "recursify.uptrain.settings": ["UptrainSettings"],
    "recursify.version": ["__version__"],
}
"""Public names that are imported on first use, by module."""

__all__ = [
    "BenchSettings",
    "BenchmarkResult",
    "CheckpointError",
    "ContextLengthError",
    "ConversionPlan",
    "ConversionResult",
    "ConversionSettings",
    "CostEstimate",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EvaluationResult",
    "EvaluationSettings",
    "ExitCalibration",
    "ExitCalibrationSettings",
    "ExitSettings",
    "ExportResult",
    "GenerationResult",
    "GenerationSettings",
    "HubError",
    "LayoutChoice",
    "LayoutPlan",
    "ModelDescription",
    "OutputError",
    "ParityError",
    "PlanError",
    "PushResult",
    "PushSettings",
    "RecursifyError",
    "RecursiveConfig",
    "RecursiveForCausalLM",
    "RequestOutput",
    "SamplingParams",
    "ServerSettings",
    "SettingsError",
    "TaskResults",
    "TaskSettings",
    "TextError",
    "TrainingError",
    "UnsupportedModelError",
    "UptrainResult",
    "UptrainSettings",
    "__version__",
    "benchmark_model",
    "calibrate_exits",
    "convert_model",
    "estimate_costs",
    "evaluate_model",
    "evaluate_tasks",
    "export_model",
    "generate_text",
    "inspect_model",
    "load_model",
    "plan_conversion",
    "plan_layouts",
    "push_model",
    "serve_model",
    "uptrain_model",
]


__getattr__, __dir__ = lazy_names(__name__, MODULES)
register_on_import()
