"""Conversion of a dense model into a recursive one: plan, convert, check."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, load_tokenizer, open_checkpoint
from recursify.checkpoint.dense_families import SUPPORTED_FAMILIES
from recursify.checkpoint.record import update_record
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import PlanError
from recursify.evaluation.fingerprint import in_float32, take_fingerprint
from recursify.evaluation.perplexity import Comparison, compare, precompute_states
from recursify.evaluation.text import Text, default_text, num_context, read_text, token_windows
from recursify.modeling import RecursiveForCausalLM
from recursify.progress import Progress, silent
from recursify.settings import require_device, resolve_settings

from .converter import write_recursive_model
from .layout_plan import LayoutPlan, fill_budget, make_layout_plan
from .parity import require_family_parity
from .plan import ConversionPlan, make_plan
from .settings import ConversionSettings

CHECK_WINDOWS = 8
CHECK_LENGTH = 512
SAMPLE_PROMPT = "The capital of France is"
SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class ConversionCheck:
    """Comparison of a converted model with the dense one on held-out text.

    Attributes:
        comparison: Perplexities, agreement and KL divergence.
        text: Name of the text.
        sample: Greedy continuation of :data:`SAMPLE_PROMPT`; empty without a tokenizer.
    """

    comparison: Comparison
    text: str
    sample: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {**asdict(self.comparison), "text": self.text, "sample": self.sample}


@dataclass(frozen=True)
class ConversionResult:
    """Result of :func:`convert_model`.

    Attributes:
        output: Folder of the recursive model.
        plan: Plan that was carried out.
        record: Contents of ``recursify.json``.
        check: Comparison with the dense model; None if it was switched off.
    """

    output: Path
    plan: ConversionPlan
    record: dict[str, Any]
    check: ConversionCheck | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, as ``recursify convert --json`` prints it."""
        check = {} if self.check is None else self.check.to_dict()
        return {"output": str(self.output), **self.record, "check": check}


def plan_conversion(
    model: str | Path,
    *,
    settings: ConversionSettings | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> ConversionPlan:
    """Plan a conversion without writing anything.

    Args:
        model: Dense model: a folder of safetensors, a ``.gguf`` file, or a Hub id.
        settings: Settings; give these or ``options``.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Permission to run Python code of the model's folder.
        progress: Callback for progress; only a choice of the layout for a budget takes long.
        options: Fields of :class:`~recursify.convert.settings.ConversionSettings`.

    Raises:
        RecursifyError: The model, the settings or the text cannot be used.
    """
    settings = resolve_settings(ConversionSettings, settings, options)
    _, plan, _ = _prepare(model, settings, revision, trust_remote_code, progress)
    return plan


def plan_layouts(
    model: str | Path,
    *,
    settings: ConversionSettings | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> LayoutPlan:
    """Predict the best layouts of a dense model by size, from one measuring pass; nothing is written.

    Args:
        model: Dense model: a folder of safetensors, a ``.gguf`` file, or a Hub id.
        settings: Settings, of which budget, calibration and device are used; give these or ``options``.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Permission to run Python code of the model's folder.
        progress: Callback for progress.
        options: Fields of :class:`~recursify.convert.settings.ConversionSettings`.

    Raises:
        RecursifyError: The model, the settings or the text cannot be used, or no layout meets the budget.
    """
    settings = resolve_settings(ConversionSettings, settings, options)
    checkpoint, text = _open(model, settings, revision, trust_remote_code)
    return make_layout_plan(checkpoint, settings, _require_text(text), progress)


def convert_model(
    model: str | Path,
    output: str | Path,
    *,
    settings: ConversionSettings | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    on_plan: Callable[[ConversionPlan], None] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> ConversionResult:
    """Convert a dense model into a recursive one.

    Args:
        model: Folder, ``.gguf`` file, embedded model or Hub id of the dense model.
        output: Folder to write; it appears when it is complete.
        settings: Settings; alternatively, give their fields as keywords.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Permission to run code from the model's folder.
        check: Compare the result with the dense model on held-out text. Each is loaded into memory in turn.
        overwrite: Replace an existing ``output``.
        resume: Go on with an interrupted conversion into ``output`` at its last finished layer.
        on_plan: Callback that receives the plan before the conversion starts.
        progress: Callback for progress.
        **options: Fields of :class:`~recursify.convert.settings.ConversionSettings`.

    Raises:
        RecursifyError: The model, the settings, the text or the output cannot be used; nothing was written.
    """
    target, settings = Path(output), resolve_settings(ConversionSettings, settings, options)
    checkpoint, plan, text = _prepare(model, settings, revision, trust_remote_code, progress)
    if on_plan is not None:
        on_plan(plan)
    check_text = _read_check_text(checkpoint) if check else None
    record = write_recursive_model(
        checkpoint, plan, target, text=text, overwrite=overwrite, resume=resume, progress=progress
    )
    checked = _check(checkpoint, target, check_text, progress) if check else None
    return ConversionResult(target, plan, record, checked)


def _prepare(
    model: str | Path,
    settings: ConversionSettings,
    revision: str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[DenseCheckpoint, ConversionPlan, Text | None]:
    """Open the dense model, plan its conversion and read the calibration text that the plan needs."""
    checkpoint, text = _open(model, settings, revision, trust_remote_code)
    if settings.has_budget:
        settings = fill_budget(checkpoint, settings, _require_text(text), progress)
    plan = make_plan(checkpoint, settings, has_text=text is not None)
    if checkpoint.config.model_type not in SUPPORTED_FAMILIES:
        require_family_parity(checkpoint.config)
    return checkpoint, plan, text if plan.needs_text else None


def _open(
    model: str | Path, settings: ConversionSettings, revision: str | None, trust_remote_code: bool
) -> tuple[DenseCheckpoint, Text | None]:
    """Open the dense model, and the calibration text of the settings."""
    require_device(settings.device)
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    if settings.calibration_data is None:
        # By default, a model without a tokenizer is converted without calibration.
        return checkpoint, default_text("calibration") if checkpoint.has_tokenizer else None
    return checkpoint, read_text(settings.calibration_data) if settings.calibration_data else None


def _require_text(text: Text | None) -> Text:
    if text is None:
        raise PlanError(
            "Choosing a layout needs a tokenizer and text to measure on. Give a model with a tokenizer, and leave out "
            "--calibration-data none."
        )
    return text


@dataclass(frozen=True)
class _CheckText:
    """Tokens of the text that a conversion is checked on.

    Attributes:
        name: Name of the text.
        tokenizer: Tokenizer of the model.
        windows: Token windows ``[N, T]``.
        prompt: Token ids of :data:`SAMPLE_PROMPT`, ``[1, n]``, with their attention mask.
    """

    name: str
    tokenizer: Any
    windows: Tensor
    prompt: dict[str, Tensor]


def _read_check_text(checkpoint: DenseCheckpoint) -> _CheckText | None:
    """Tokenize the text of the check, which can fail, before anything is written; None without a tokenizer."""
    if not checkpoint.has_tokenizer:
        return None
    tokenizer, text, vocab_size = load_tokenizer(checkpoint), default_text("held_out"), checkpoint.config.vocab_size
    length = min(CHECK_LENGTH, checkpoint.config.max_position_embeddings)
    windows = token_windows(tokenizer, text, length, max_tokens=CHECK_WINDOWS * length, vocab_size=vocab_size)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt", return_token_type_ids=False)
    require_known_tokens(prompt["input_ids"][0].tolist(), vocab_size, tokenizer)
    return _CheckText(text.name, tokenizer, windows, dict(prompt))


def _check(checkpoint: DenseCheckpoint, target: Path, text: _CheckText | None, progress: Progress) -> ConversionCheck:
    """Compare the written model with the dense one; record the figures and a fingerprint of its outputs.

    The layers of one of them are in memory at a time.
    """
    if text is None:
        vocab_size = checkpoint.config.vocab_size
        windows = torch.randint(0, vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    else:
        windows = text.windows
    context = 1 if text is None else num_context(text.tokenizer)
    dense = checkpoint.stream_model()
    with _on_cpu(dense):
        precompute_states(dense, windows, progress=progress)
        model = RecursiveForCausalLM.from_pretrained(target).eval()
        with _on_cpu(model):
            comparison = compare(model, dense, windows, num_context=context, progress=progress)
    del dense
    entries: dict[str, Any] = {}
    name, sample = "random tokens (the model has no tokenizer)", ""
    if text is not None:
        tokens = model.generate(**text.prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)[0]
        name, sample = text.name, text.tokenizer.decode(tokens, skip_special_tokens=True)
        entries["evaluation"] = [comparison.as_evaluation(name)]
    update_record(target, **entries, fingerprint=take_fingerprint(model))
    return ConversionCheck(comparison, name, sample)


def _on_cpu(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Context in which ``model`` runs fast on a CPU: many multiply float16 at a fifth of the speed of float32."""
    return in_float32(model) if model.dtype == torch.float16 else nullcontext()
