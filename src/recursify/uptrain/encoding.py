"""Tokens and labels of a row: plain text, a prompt with its completion, or a chat."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from recursify.chat_template import check_template_kwargs, render_chat
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.errors import SettingsError, TextError
from recursify.evaluation import rows
from recursify.evaluation.text import text_start

IGNORED = -100
"""Label of a token without loss."""

Form: TypeAlias = Literal["text", "completion", "chat"]
Tokens: TypeAlias = dict[str, list[int]]
"""``input_ids`` and ``labels`` of a row."""


def form_of(fields: dict[str, Any]) -> Form:
    """Form of a row with these fields; a field that is null counts only if there is no other form.

    Raises:
        TextError: The fields belong to none.
    """
    for names in ({name for name, value in fields.items() if value is not None}, set(fields)):
        if "messages" in names:
            return "chat"
        if {"prompt", "completion"} <= names:
            return "completion"
        if names & {"text", "content"}:
            return "text"
    raise TextError(
        f"a row has the fields {', '.join(fields)}. Give rows with 'text', with 'prompt' and 'completion', or with "
        f"'messages'."
    )


class RowEncoder:
    """Encoder of rows of every form.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Number of rows of the model's embedding.
        length: Tokens per sequence.
        completions_only: True to give labels to completions and assistant turns alone.

    Raises:
        TextError: ``completions_only`` is not possible with this tokenizer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, length: int, *, completions_only: bool = False
    ):
        if completions_only and not tokenizer.is_fast:
            raise TextError(
                "completions_only needs a fast tokenizer (tokenizer.json), and the model's cannot tell where its "
                "tokens are in the text. Turn completions_only off, or convert the tokenizer."
            )
        self.tokenizer, self.vocab_size, self.completions_only = tokenizer, vocab_size, completions_only
        self.length, self.start = length, text_start(tokenizer)
        self._code = _code()  # datasets finds prepared rows by the encoder's attributes

    def __call__(self, fields: dict[str, Any], place: str) -> Tokens:
        """Encode a row; ``place`` is where it is, for the message of an error.

        Raises:
            TextError: The row has the wrong form, the chat template rejects it, or the model does not know a token.
        """
        encode = {"text": self._encode_text, "completion": self._encode_completion, "chat": self._encode_chat}
        try:
            tokens = encode[form_of(fields)](fields)
            require_known_tokens(tokens["input_ids"], self.vocab_size, self.tokenizer)
        except (TextError, SettingsError) as error:
            raise TextError(f"{place}: {error}") from error
        return tokens

    def sequences(self, fields: dict[str, Any], place: str, *, is_whole: bool) -> list[Tokens]:
        """Encode a row of data whose rows are all chats and completions (``is_whole``), or all text.

        Text that is longer than a sequence is split, and each part begins as the tokenizer begins a text.

        Raises:
            TextError: As for a call, and if the row has not the form of the others.
        """
        tokens = self(fields, place)
        if (form_of(fields) != "text") != is_whole:
            others, harm = ("chats or completions", "cut") if is_whole else ("text", "split")
            raise TextError(
                f"{place}: a row of the form '{form_of(fields)}' in a file of {others} would be {harm}. Put text and "
                f"chats or completions into separate files."
            )
        ids, count = tokens["input_ids"], len(self.start)
        if is_whole or not count or count >= self.length or len(ids) <= self.length or ids[:count] != self.start:
            return [tokens]
        step = self.length - count
        parts = [self.start + ids[first : first + step] for first in range(count, len(ids), step)]
        return [{"input_ids": part, "labels": [IGNORED] * count + part[count:]} for part in parts]

    def _encode_text(self, fields: dict[str, Any]) -> Tokens:
        name = "text" if fields.get("text") is not None or "content" not in fields else "content"
        ids = self._with_end(self.tokenizer(_string(fields, name), verbose=False)["input_ids"])
        return {"input_ids": ids, "labels": list(ids)}

    def _encode_completion(self, fields: dict[str, Any]) -> Tokens:
        if any(isinstance(fields[name], list) for name in ("prompt", "completion")):
            messages = [*_messages(fields, "prompt"), *_messages(fields, "completion")]
            return self._encode_chat({**fields, "messages": messages}, len(fields["prompt"]))
        prompt = _string(fields, "prompt")
        text = prompt + _string(fields, "completion")
        encoded = self._encode(text, add_special_tokens=True)
        ids = self._with_end(encoded["input_ids"])
        if not self.completions_only:
            return {"input_ids": ids, "labels": list(ids)}
        offsets = self._offsets(encoded, text, [len(prompt)])
        # Special tokens that the tokenizer adds are at 0: those after the text end the completion.
        last = max((index for index, (_, end) in enumerate(offsets) if end), default=-1)
        learned = [end > len(prompt) or index > last for index, (_, end) in enumerate(offsets)]
        return _labelled(ids, learned + [True] * (len(ids) - len(learned)))

    def _encode_chat(self, fields: dict[str, Any], first: int = 0) -> Tokens:
        """Tokens of the rendered chat template; only assistant turns from message ``first`` on are completions."""
        if not self.tokenizer.chat_template:
            raise TextError(
                "a row is a chat, but the model's tokenizer has no chat template. Give text or prompt/completion rows, "
                "or put a chat_template.jinja into the model's folder."
            )
        messages = _messages(fields, "messages")
        variables = _json(fields, "chat_template_kwargs", dict) or {}
        check_template_kwargs(variables)
        options = {"tools": _json(fields, "tools", list), **variables}
        text = self._render(messages, options)
        encoded = self._encode(text, add_special_tokens=False)  # the template has them
        ids = encoded["input_ids"]
        if not self.completions_only:
            return {"input_ids": ids, "labels": list(ids)}
        spans = self._assistant_spans(messages, first, text, options)
        offsets = self._offsets(encoded, text, [start for start, _ in spans])
        return _labelled(ids, [any(start < b and end > a for a, b in spans) for start, end in offsets])

    def _assistant_spans(
        self, messages: list[dict], first: int, text: str, options: dict[str, Any]
    ) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages):
            if index < first or message["role"] != "assistant":
                continue
            before = self._render(messages[:index], options, add_generation_prompt=True)
            until = self._render(messages[: index + 1], options)
            if not (text.startswith(before) and text.startswith(until)):
                raise TextError(
                    "the chat template renders a turn differently when another follows, so assistant turns cannot be "
                    "located. Give prompt/completion rows, or turn off completions_only."
                )
            spans.append((len(before), len(until)))
        return spans

    def _render(self, messages: list[dict], options: dict[str, Any], **more: Any) -> str:
        return render_chat(self.tokenizer, messages, tokenize=False, **options, **more)

    def _encode(self, text: str, *, add_special_tokens: bool) -> Any:
        return self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=self.completions_only,
            verbose=False,
        )

    def _offsets(self, encoded: Any, text: str, boundaries: Sequence[int]) -> list[tuple[int, int]]:
        """Start and end of each token in ``text``, right at the boundaries.

        Byte-level tokenizers leave out white space at both ends of a token, which may be on both sides of a boundary.
        """
        offsets = [(min(start, max(end - 1, 0)), end) for start, end in encoded["offset_mapping"]]
        for boundary in boundaries:
            index = max((i for i, (_, end) in enumerate(offsets) if 0 < end <= boundary), default=None)
            if index is not None:
                start, end = offsets[index]
                piece = self.tokenizer.decode([encoded["input_ids"][index]], clean_up_tokenization_spaces=False)
                if text.startswith(piece.lstrip(), start):
                    offsets[index] = start, max(end, start + len(piece.lstrip()))
        return offsets

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


@functools.cache
def _code() -> str:
    """Hash of the code that reads and encodes rows."""
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in (rows.__file__, __file__))).hexdigest()


def _labelled(ids: list[int], learned: list[bool]) -> Tokens:
    return {"input_ids": ids, "labels": [token if keep else IGNORED for token, keep in zip(ids, learned, strict=True)]}


def _string(fields: dict[str, Any], name: str) -> str:
    if not isinstance(fields[name], str):
        raise TextError(f"'{name}' is {type(fields[name]).__name__}, not a string. Fix the row.")
    return fields[name]


def _json(fields: dict[str, Any], name: str, kind: type) -> Any:
    """A field of this type, or its JSON text, as tables hold it; None without the field."""
    value = fields.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise TextError(f"'{name}' is not JSON ({error}). Fix the row.") from error
    if value is not None and not isinstance(value, kind):
        raise TextError(f"'{name}' is {type(value).__name__}, not {kind.__name__}. Fix the row.")
    return value


def _messages(fields: dict[str, Any], name: str) -> list[dict]:
    """Messages without null fields; a call of tools needs no content."""
    value = fields[name]
    if not isinstance(value, list) or not value:
        raise TextError(f"'{name}' must be a list of at least one message, and is {value!r:.60}. Fix the row.")
    for message in value:
        for field in ("role", "content"):
            calls = field == "content" and isinstance(message, dict) and message.get("tool_calls")
            if not calls and (not isinstance(message, dict) or not isinstance(message.get(field), str)):
                raise TextError(f"a message has no string '{field}'. Fix the row.")
    return [{name: item for name, item in message.items() if item is not None} for message in value]
