"""Small random dense models of every supported family, built offline."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from recursify.convert.pipeline import convert_model
from recursify.modeling import LayerLayout, RecursiveConfig, RecursiveForCausalLM

SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # random weights of the usual 0.02 make logits too alike for a test of parity
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1], "use_sliding_window": False},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {"rotary_pct": 0.25, "use_parallel_residual": True},
}


def tiny_config(family: str, **overrides) -> PreTrainedConfig:
    """A config of ``family`` with six layers of width 32."""
    fields = {**SMALL, **FAMILIES[family], **overrides}
    if family == "gpt_neox":
        for name in ("head_dim", "num_key_value_heads"):
            fields.pop(name)
    return AutoConfig.for_model(family, **fields)


def tiny_dense(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random float32 dense model of ``family`` in eval mode, its biases and norms random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.float().eval()


def tiny_recursive(
    family: str = "llama",
    recursions: int = 2,
    sharing: str | None = None,
    *,
    varied: bool = False,
    seed: int = 0,
    **fields,
) -> RecursiveForCausalLM:
    """A random recursive model of six layers in eval mode.

    Args:
        family: Dense family.
        recursions: Number of recursions.
        sharing: Sharing scheme; None takes ``middle_cycle`` where the inner layers divide, else ``cycle``.
        varied: Flag to give depths different residuals, norms and biases.
        seed: Seed of the weights.
        fields: Fields of the configuration; the LoRA rank is 2.
    """
    sharing = sharing or ("middle_cycle" if recursions in (2, 4) else "cycle")
    layout = LayerLayout.fold(SMALL["num_hidden_layers"], recursions, sharing)
    torch.manual_seed(seed)
    config = RecursiveConfig.from_dense(tiny_config(family), layout, **{"lora_rank": 2, **fields})
    model = RecursiveForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters() if varied else ():
            if parameter.ndim != 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0, vocab_size: int = SMALL["vocab_size"]) -> torch.Tensor:
    """Token ids ``[batch, length]``, none of them the pad token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (batch, length), generator=generator)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes and a few special tokens, made on the spot.

    ``template`` is the text with the special tokens that the tokenizer adds, for instance ``"<s> $A"``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1} | {character: index + 2 for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("<pad>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", padding_side="left")


def save_tiny(folder: Path, family: str = "llama", *, max_shard_size: str = "5GB", **overrides) -> PreTrainedModel:
    """Write a tiny dense model with its tokenizer into ``folder``."""
    dense = tiny_dense(family, **overrides)
    dense.save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return dense


def save_multimodal(folder: Path) -> None:
    """Write a tiny Gemma 3 with its vision tower and a tokenizer into ``folder``."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tiny_config("gemma3_text").to_dict()
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def convert_tiny(source: Path, target: Path, **settings) -> RecursiveForCausalLM:
    """Convert without text unless asked, and load the result."""
    chosen = {"initialization": "average", "relaxation": "svd", "calibration_data": [], **settings}
    convert_model(source, target, check=False, overwrite=True, **chosen)
    return RecursiveForCausalLM.from_pretrained(target).eval()
