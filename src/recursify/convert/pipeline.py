"""A conversion from the settings to the figures at its end: what the command line calls, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recursify.checkpoint.dense_checkpoint import DenseCheckpoint, load_tokenizer, open_checkpoint
from recursify.checkpoint.record import update_record
from recursify.evaluation.fingerprint import take_fingerprint
from recursify.evaluation.perplexity import compare
from recursify.evaluation.text import Text, default_text, read_text, token_windows
from recursify.modeling import RecursiveForCausalLM
from recursify.settings import read_settings, require_device

from .converter import Progress, convert
from .parity import require_family_parity
from .plan import SUPPORTED_FAMILIES, ConversionPlan, make_plan
from .settings import ConversionSettings

CHECK_WINDOWS = 8
CHECK_LENGTH = 512
SAMPLE_PROMPT = "The capital of France is"
SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Conversion:
    """A checkpoint, its plan and the text to calibrate on."""

    checkpoint: DenseCheckpoint
    plan: ConversionPlan
    text: Text | None

    def write(self, target: Path, *, overwrite: bool, progress: Progress) -> dict[str, Any]:
        """Run the plan; see :func:`recursify.convert.converter.convert`."""
        return convert(self.checkpoint, self.plan, target, text=self.text, overwrite=overwrite, progress=progress)


def make_conversion(
    source: str,
    settings: dict[str, Any],
    *,
    config_file: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Open ``source`` and plan its conversion.

    Args:
        source: A folder, a ``.gguf``, a Hub id, or an embedded model.
        settings: Fields of :class:`ConversionSettings`; they win over ``config_file``.
        config_file: YAML with the same fields.
        revision: Of a Hub id.
        trust_remote_code: Run code that the folder brings along.

    Raises:
        RecursifyError: Anything wrong with the model, the settings or the text.
    """
    from_file = read_settings(config_file) if config_file else {}
    chosen = ConversionSettings.from_mapping({**from_file, **settings}, str(config_file or "the settings"))
    require_device(chosen.device)
    checkpoint = open_checkpoint(source, revision=revision, trust_remote_code=trust_remote_code)
    text = None
    if chosen.calibration_data is None:
        text = default_text("calibration") if _has_tokenizer(checkpoint) else None
    elif chosen.calibration_data:
        text = read_text(chosen.calibration_data)
    plan = make_plan(checkpoint, chosen, text_at_hand=text is not None)
    if checkpoint.config.model_type not in SUPPORTED_FAMILIES:
        require_family_parity(checkpoint.config)
    return Conversion(checkpoint, plan, text if plan.needs_text else None)


def _has_tokenizer(checkpoint: DenseCheckpoint) -> bool:
    """Without a tokenizer there is no calibration by default; asked for, it is an error."""
    path = checkpoint.location
    return path is not None and (path.suffix == ".gguf" or any(path.glob("tokenizer*")))


def check_conversion(conversion: Conversion, target: Path, *, progress: Progress) -> dict[str, Any]:
    """Compare what was written with the dense model on held-out text, and let it write a line.

    The figures, and a fingerprint of what the model says, go into ``recursify.json``. Both models are held in memory,
    in the dtype on disk.
    """
    model = RecursiveForCausalLM.from_pretrained(target).eval()
    control = conversion.checkpoint.load_model()
    if not _has_tokenizer(conversion.checkpoint):
        ids = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
        comparison = compare(model, control, ids)
        update_record(target, fingerprint=take_fingerprint(model.float()).to_dict())
        return {**comparison.to_dict(), "text": "random tokens (the model has no tokenizer)", "sample": ""}
    tokenizer = load_tokenizer(conversion.checkpoint)
    text = default_text("held_out")
    length = min(CHECK_LENGTH, model.config.max_position_embeddings)
    windows = token_windows(tokenizer, text, length, max_tokens=CHECK_WINDOWS * length)
    comparison = compare(model, control, windows, progress=progress)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    update_record(
        target,
        evaluation=[comparison.as_evaluation(text.name)],
        fingerprint=take_fingerprint(model.float()).to_dict(),
    )
    return {
        **comparison.to_dict(),
        "text": text.name,
        "sample": tokenizer.decode(written[0], skip_special_tokens=True),
    }
