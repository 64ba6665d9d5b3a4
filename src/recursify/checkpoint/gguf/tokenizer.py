"""Tokenizer of a ``.gguf``, built from its vocabulary as llama.cpp reads it (``llama_vocab::impl::load``)."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from recursify.errors import CheckpointError

from .file import GgufFile
from .pre_tokenizers import PRE_TOKENIZERS
from .vocabulary import SENTENCEPIECE, TokenKind, Vocabulary, read_vocabulary, require_tokenizer, special_id

SPACE = "▁"  # U+2581, a space in SentencePiece
NOT_MERGED = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN, TokenKind.BYTE)
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
STRIPPING_NAMES = ("phi-3", "phi3")
NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


def build_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Tokenizer of the model in ``file``, from that file alone.

    Raises:
        CheckpointError: Its vocabulary is damaged.
        UnsupportedModelError: Its kind, pre-tokenizer or an option is not supported.
    """
    require_tokenizer(file)
    vocabulary = read_vocabulary(file)
    sentencepiece = file.get("tokenizer.ggml.model") == SENTENCEPIECE
    try:
        backend = _sentencepiece(file, vocabulary) if sentencepiece else _byte_level(file, vocabulary)
    except Exception as error:  # the tokenizers library raises Exception itself
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"The tokenizer in '{file.path}' is damaged: {error}. Fetch the model again.") from error
    _add_tokens(backend, file, vocabulary)
    ids = {name: special_id(file, f"{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    tokens = vocabulary.tokens
    named = {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}
    add_bos = sentencepiece or PRE_TOKENIZERS[file.get("tokenizer.ggml.pre", "default")].add_bos
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(file.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in named,
        add_eos_token=bool(file.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in named,
        chat_template=_chat_template(file),
        clean_up_tokenization_spaces=False,
        **dict.fromkeys(SPECIAL_TOKENS) | named,
    )


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.merges is None:
        raise CheckpointError(f"'{file.path}' has a byte-level tokenizer without merges. Fetch the model again.")
    rule = PRE_TOKENIZERS[file.get("tokenizer.ggml.pre", "default")]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    backend = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=rule.ignore_merges))
    backend.pre_tokenizer = rule.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    unknown = special_id(file, "unknown_token_id")
    has_bytes = TokenKind.BYTE in vocabulary.kinds
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(vocabulary.tokens)},
            vocabulary.merges if vocabulary.merges is not None else _merges_by_score(file, vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    # Before each piece between added tokens, as llama.cpp does.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return backend


def _merges_by_score(file: GgufFile, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Merges of a SentencePiece vocabulary: every split of a token into two, the best-scored token first."""
    tokens, scores = vocabulary.tokens, vocabulary.scores
    merged = [index for index, kind in enumerate(vocabulary.kinds) if kind not in NOT_MERGED and len(tokens[index]) > 1]
    if scores is None or (len(merged) > 1 and len({scores[index] for index in merged}) == 1):
        raise CheckpointError(
            f"'{file.path}' has a SentencePiece tokenizer without scores or merges, so the order of its merges is "
            f"lost. Convert the original checkpoint instead."
        )
    ids = {token: index for index, token in enumerate(tokens) if vocabulary.kinds[index] not in NOT_MERGED}
    merges = []
    for index in sorted(merged, key=lambda index: (-scores[index], index)):
        token = tokens[index]
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _add_tokens(backend: Tokenizer, file: GgufFile, vocabulary: Vocabulary) -> None:
    """Tokens that are found in the text before it is split: control tokens, and those that a user defined."""
    # The files of Phi-3 do not say that its tokens swallow the space behind them; llama.cpp goes by the name.
    name = str(file.get("general.name", "")).lower()
    strips = any(part in name for part in STRIPPING_NAMES)
    added = [
        AddedToken(
            token,
            special=kind != TokenKind.USER_DEFINED,
            normalized=False,
            rstrip=strips and token not in NOT_STRIPPING,
        )
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
    ]
    backend.add_tokens(added)


def _chat_template(file: GgufFile) -> str | dict[str, str] | None:
    """The chat template; by name if there are several."""
    default = file.get("tokenizer.chat_template")
    names = file.get("tokenizer.chat_templates", [])
    others = {name: file.get(f"tokenizer.chat_template.{name}") for name in names}
    others = {name: text for name, text in others.items() if text is not None}
    if not others:
        return default
    return others if default is None else {"default": default, **others}
