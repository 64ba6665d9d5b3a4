"""``/v1/chat/completions`` through OpenAI's own client."""

from __future__ import annotations

import openai
import pytest

from helpers.running import NAME, build, running, tokenizer
from recursify.engine import SamplingParams

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
]
PROMPT = "<system>Be brief.\n<user>Hello\n<assistant>"


@pytest.fixture(scope="module")
def engine():
    """The server's twin."""
    return build()()


def test_a_conversation_goes_through_the_template(server, engine):
    """The prompt is the template's, and the answer the engine's."""
    (expected,) = engine.generate([PROMPT], SamplingParams(max_tokens=12, logprobs=2))
    answer = server.client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_completion_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert (choice.message.content, choice.finish_reason) == (expected.text, "length")
    assert answer.usage.prompt_tokens == len(tokenizer()(PROMPT)["input_ids"])
    entries = choice.logprobs.content
    values = [row[token] for row, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert [entry.logprob for entry in entries] == pytest.approx(values)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.bytes in (None, list(entry.token.encode())) for entry in entries)


def test_a_stream_says_the_same(server, engine):
    """First the role, then the text, then why it ended."""
    (expected,) = engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=1.0, seed=2))
    stream = server.client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=12, seed=2, stream=True)
    first, *rest = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(event.choices[0].delta.content or "" for event in rest) == expected.text
    assert rest[-1].choices[0].finish_reason == "length"
    assert rest[-1].object == "chat.completion.chunk"


def test_the_helper_for_streams_understands_it(server, engine):
    """OpenAI's accumulating helper puts the chunks together."""
    (known,) = engine.generate([PROMPT], SamplingParams(max_tokens=9))
    stops = {"stop_token_ids": [known.token_ids[-1]]}
    arguments = {"model": NAME, "messages": MESSAGES, "max_tokens": 9, "temperature": 0, "extra_body": stops}
    with server.client.chat.completions.stream(**arguments) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert known.text.startswith(text)
    assert text
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (text, "stop")


def test_it_goes_on_to_the_end_of_the_context(server):
    """Without max_tokens, an answer may be as long as there is room."""
    answer = server.client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0)
    assert answer.usage.total_tokens == 256


def test_choices_differ(server):
    """n of them, each with a seed of its own."""
    answer = server.client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=8, n=3, seed=1)
    assert len({choice.message.content for choice in answer.choices}) == 3


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: List should have at least 1 item"),
        ([{"role": "wizard", "content": "x"}], "messages.0.role: Input should be 'system', 'developer', 'user' or"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type: Input should be 'text'"),
        ([{"role": "developer", "content": "x"}], "The model's chat template rejects the messages: no developers here"),
        ([{"role": "user", "content": "x" * 400}], r"It has 4\d\d tokens; at most 255 are allowed"),
    ],
)
def test_what_is_no_conversation_is_refused(server, messages, message):
    """With what is wrong."""
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.chat.completions.create(model=NAME, messages=messages)


def test_a_model_without_a_template_has_no_chat():
    """It is told where to go."""
    with running(build(template=None)) as made, pytest.raises(openai.BadRequestError, match="Use /v1/completions"):
        made.client.chat.completions.create(model=NAME, messages=MESSAGES)
