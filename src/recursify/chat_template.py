"""Conversations as a model's chat template writes them: code of the model's author, which may refuse messages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from recursify.errors import SettingsError, TextError


def check_template_kwargs(given: Mapping[str, Any]) -> None:
    """Raise a SettingsError for a name in ``chat_template_kwargs`` that is a parameter of transformers' function; all
    others are variables of the template."""
    from transformers import PreTrainedTokenizerBase  # here, since importing the commands does not load it

    if reserved := sorted(given.keys() & inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters):
        raise SettingsError(f"chat_template_kwargs: '{reserved[0]}' is not a variable of a template. Remove it.")


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], /, **options: Any) -> Any:
    """Render ``messages``; text or token ids, by the ``options`` of transformers' ``apply_chat_template``.

    Raises:
        TextError: The template is damaged, or rejects the messages.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise errors of jinja, ValueError, TypeError ...
        raise TextError(f"The model's chat template rejects the messages: {error}") from error
