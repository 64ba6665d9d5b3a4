"""Splitting of text before merging, by the name in ``tokenizer.ggml.pre``.

The names are llama.cpp's (``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp``). The expressions are those of the original
``tokenizer.json``, which llama.cpp rewrites where its own engine lacks a class. Several are applied one after the
other, each within the pieces of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", DIGIT)
SEED_CODER = QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|{DIGIT}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", DIGIT)


@dataclass(frozen=True)
class PreTokenizerRule:
    """Meaning of a name in ``tokenizer.ggml.pre``.

    Attributes:
        patterns: Regular expressions whose matches become pieces, applied in turn.
        ignore_merges: A piece that is a token as a whole is not merged from its parts.
        add_bos: The sequence begins with BOS, if the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> PreTokenizer:
        """Pre-tokenizer of a byte-level vocabulary."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_RULES = {
    PreTokenizerRule((GPT2,)): "gpt-2 phi-2 olmo mpt jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling",
    PreTokenizerRule((DIGIT, GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    PreTokenizerRule((LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama3 llama-v3 llama-bpe falcon3 pixtral midm-2.0"
    ),
    PreTokenizerRule((LLAMA3,)): "dbrx smaug-bpe",
    PreTokenizerRule((QWEN2,)): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2",
    PreTokenizerRule((SEED_CODER,)): "seed-coder",
    PreTokenizerRule((TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizerRule((GPT4O,)): "gpt-4o llama4 kanana2",
    PreTokenizerRule(FALCON): "falcon",
    PreTokenizerRule(DEFAULT): "default",
    PreTokenizerRule(DEEPSEEK_CODER): "deepseek-coder",
}

PRE_TOKENIZERS = {name: rule for rule, names in _RULES.items() for name in names.split()}
"""Rules by the name in ``tokenizer.ggml.pre``; a file without one is split as ``default``."""
