"""Request bodies of known clients: conversations, fields that ask for nothing, and those that are refused by name."""

from __future__ import annotations

import json

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from helpers.running import NAME, build, running, tokenizer
from recursify.engine import SamplingParams

LETTERS = {str(tokenizer()(letter)["input_ids"][0]): 100.0 for letter in "aehnost"}
"""Biases that keep the random model to a few letters, so that ten answers fit into its context."""


@pytest.fixture(scope="module")
def engine():
    """The server's twin."""
    return build()()


def rendered(messages: list[dict[str, str]]) -> str:
    """The prompt of a conversation, as the template writes it."""
    return "".join(f"<{each['role']}>{each['content']}\n" for each in messages) + "<assistant>"


def whole(answer) -> object:
    """The message of a response."""
    return answer.choices[0].message


def streamed(events) -> object:
    """The message that OpenAI's own accumulator makes of a stream."""
    state = ChatCompletionStreamState()
    for event in events:
        state.handle_chunk(event)
    return state.current_completion_snapshot.choices[0].message


def joined(events) -> object:
    """The message that a program puts together from the deltas, whose fields it keeps."""
    message: dict[str, object] = {}
    for event in events:
        for name, value in event.choices[0].delta.model_dump().items():
            message[name] = message.get(name, "") + value if name == "content" and value else message.get(name) or value
    return message


@pytest.mark.parametrize(
    ("stream", "message_of"),
    [
        (False, whole),
        (False, lambda answer: whole(answer).model_dump()),
        (False, lambda answer: whole(answer).to_dict()),
        (False, lambda answer: json.loads(whole(answer).model_dump_json())),
        (True, streamed),
        (True, joined),
    ],
)
def test_ten_turns_by_appending_the_message(server, engine, stream, message_of):
    """What came back goes back as it is; each answer is the engine's for the conversation so far."""
    messages, known = [], []
    params = SamplingParams(max_tokens=3, logit_bias={int(key): value for key, value in LETTERS.items()})
    for turn in range(10):
        messages.append({"role": "user", "content": str(turn)})
        known.append({"role": "user", "content": str(turn)})
        answer = server.client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=3, temperature=0, logit_bias=LETTERS, stream=stream
        )
        messages.append(message_of(answer))
        (expected,) = engine.generate([rendered(known)], params)
        known.append({"role": "assistant", "content": expected.text})
        content = messages[-1]["content"] if isinstance(messages[-1], dict) else messages[-1].content
        assert content == expected.text
    assert len({each["content"] for each in known}) > 12


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]

OPEN_WEBUI = [
    # A chat whose settings were not touched: its own fields are removed before it asks.
    {"model": NAME, "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
    # A chat with every setting of its panel; `repeat_penalty` is Ollama's and not sent here.
    {
        "model": NAME,
        "messages": MESSAGES,
        "stream": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 8,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "seed": 42,
        "stop": ["###"],
        "logit_bias": {"5": 1},
    },
    # A title of the chat.
    {
        "model": NAME,
        "messages": [{"role": "user", "content": "### Task:\nWrite a title.\n"}],
        "stream": False,
        "max_completion_tokens": 8,
        "user": "3c6e0b8a",
    },
]
"""Bodies of Open WebUI, by its module that writes them (``backend/open_webui/utils/payload.py``)."""

LANGCHAIN = [
    {"model": NAME, "stream": False, "messages": [{"content": "Hello", "role": "user"}]},
    {
        "model": NAME,
        "stream": False,
        "messages": [
            {"content": "Be brief.", "role": "system"},
            {"content": [{"type": "text", "text": "Hello"}], "role": "user"},
            {"content": "hi", "role": "assistant"},
            {"content": "Bye", "name": "bob", "role": "user"},
        ],
        "frequency_penalty": 0.2,
        "logprobs": True,
        "max_completion_tokens": 20,
        "n": 1,
        "presence_penalty": 0.1,
        "seed": 3,
        "stop": ["x"],
        "temperature": 0.2,
        "top_logprobs": 2,
        "top_p": 0.9,
    },
    {
        "model": NAME,
        "stream": True,
        "messages": [{"content": "Hello", "role": "user"}],
        "stream_options": {"include_usage": True},
    },
]
"""Bodies that ``ChatOpenAI`` of langchain-openai 1.7.4 sent, with its defaults and with all of its settings."""


def expected_text(engine, body: dict) -> str:
    """The engine's text for a body with a seed."""
    messages = [
        {"role": each["role"], "content": each["content"] if isinstance(each["content"], str) else "Hello"}
        for each in body["messages"]
    ]
    names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "seed", "stop")
    params = {name: body[name] for name in names if name in body}
    biases = {int(token): bias for token, bias in body.get("logit_bias", {}).items()}
    limit = body.get("max_tokens") or body["max_completion_tokens"]
    (output,) = engine.generate([rendered(messages)], SamplingParams(max_tokens=limit, logit_bias=biases, **params))
    return output.text


@pytest.mark.parametrize("body", [*OPEN_WEBUI, *LANGCHAIN], ids=lambda body: "-".join(body)[:60])
def test_bodies_of_open_webui_and_langchain(server, engine, body):
    """200, and where the body has a seed the engine's text."""
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if body["stream"]:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        assert ("stream_options" in body) == bool(events[-1]["usage"])
    else:
        text = answer.json()["choices"][0]["message"]["content"]
    assert text
    if "seed" in body:
        assert text == expected_text(engine, body)


def test_the_completions_of_langchain(server):
    """``OpenAI`` of langchain-openai 1.7.4, and of the versions before, with ``best_of`` and ``logit_bias``."""
    body = {"model": NAME, "prompt": ["hello"], "frequency_penalty": 0, "logprobs": None, "max_tokens": 25, "n": 1}
    body |= {"presence_penalty": 0, "seed": None, "temperature": 0.7, "top_p": 1}
    for more in ({}, {"best_of": 1, "logit_bias": {}, "stop": None}):
        answer = server.http.post("/v1/completions", json=body | more)
        assert answer.status_code == 200, answer.text


NEUTRAL = {
    "audio": None,
    "bad_words": [],
    "best_of": 2,
    "early_stopping": False,
    "exit": None,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "logit_bias": {},
    "metadata": {"chat": "1"},
    "min_p": 0,
    "min_tokens": 0,
    "modalities": ["text"],
    "n": 2,
    "parallel_tool_calls": True,
    "prediction": None,
    "presence_penalty": 0.0,
    "prompt_cache_key": "k",
    "prompt_logprobs": None,
    "reasoning_effort": None,
    "repetition_penalty": 1.0,
    "response_format": {"type": "text"},
    "safety_identifier": "me",
    "seed": -1,
    "service_tier": "auto",
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": "",
    "stop_token_ids": [],
    "store": False,
    "stream_options": {"include_usage": True},
    "suffix": "",
    "tool_choice": "auto",
    "tools": [],
    "top_k": -1,
    "top_p": 1,
    "use_beam_search": False,
    "user": "",
    "web_search_options": None,
    "a_field_of_tomorrow": None,
}


def test_fields_that_ask_for_nothing_change_nothing(server):
    """Each alone, and all together, at both endpoints: the same text as without them."""
    for path, prompt in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": MESSAGES[1:]})):
        body = {**prompt, "max_tokens": 3, "temperature": 0}

        def text(more: dict, path: str = path, body: dict = body) -> str:
            answer = server.http.post(f"/v1/{path}", json=body | more)
            assert answer.status_code == 200, (more, answer.text)
            choice = answer.json()["choices"][0]
            return choice["text"] if "text" in choice else choice["message"]["content"]

        expected = text({})
        assert text(NEUTRAL) == expected
        assert text(dict.fromkeys(NEUTRAL)) == expected
        for name, value in NEUTRAL.items():
            assert text({name: value} | ({"n": 2} if name == "best_of" else {})) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"best_of": 2}, "best_of is not supported by this server, unless it equals n"),
        ({"tools": [{"type": "function"}]}, "tools is not supported by this server. Remove it"),
        ({"tool_choice": "required"}, "tool_choice is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported by this server"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported by this server"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is not supported by this server"),
        ({"chat_template": "{{ 1 }}"}, "chat_template is not supported by this server"),
        ({"top_k": -2}, "top_k: Input should be greater than or equal to -1"),
        ({"min_p": 2}, "min_p: Input should be less than or equal to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: Input should be greater than 0"),
        ({"frequency_penalty": 3}, "frequency_penalty: Input should be less than or equal to 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: Input should be less than or equal to 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias: The keys are token ids, as decimal numbers"),
        ({"logit_bias": {"999": 1}}, "Token 999 of logit_bias is not in the model's vocabulary of 260"),
        ({"stop_token_ids": [999]}, "Token 999 of stop_token_ids is not in the model's vocabulary of 260"),
        ({"stop": ["a", ""]}, "stop: A stop string is empty. Remove it"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize' is not a variable of a template"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "excludes add_generation_prompt=true"),
    ],
)
def test_fields_that_ask_for_something_else_are_refused_by_name(server, more, message):
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2, extra_body=more)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls is not supported by this"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "refusal is not supported by this server"),
        ({"role": "user", "content": None}, "A message of role 'user' needs content"),
        ({"role": "user"}, "A message of role 'user' needs content"),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "is not supported|Input should be"),
    ],
)
def test_messages_that_ask_for_something_else_are_refused(server, message, error):
    with pytest.raises(openai.BadRequestError, match=error):
        server.client.chat.completions.create(model=NAME, messages=[message], max_tokens=2)


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"frequency_penalty": 1.5, "presence_penalty": -0.5}, {"frequency_penalty": 1.5, "presence_penalty": -0.5}),
        ({"logit_bias": {"77": 4.5, "80": -100}}, {"logit_bias": {77: 4.5, 80: -100.0}}),
        ({"extra_body": {"repetition_penalty": 1.3}}, {"repetition_penalty": 1.3}),
        ({"seed": 3, "temperature": 1.2, "extra_body": {"min_p": 0.2}}, {"seed": 3, "temperature": 1.2, "min_p": 0.2}),
        ({"extra_body": {"stop_token_ids": [63], "min_tokens": 9}}, {"stop_token_ids": (63,), "min_tokens": 9}),
        ({"extra_body": {"skip_special_tokens": False}, "logit_bias": {"1": 9}}, {"logit_bias": {1: 9.0}}),
    ],
)
def test_penalties_and_biases_are_the_engines(server, engine, asked, params):
    """Whole and streamed, beside other requests or alone."""
    if "skip_special_tokens" in asked.get("extra_body", {}):
        params = params | {"skip_special_tokens": False}
    (expected,) = engine.generate(["hello there"], SamplingParams(max_tokens=20, **params))
    (plain,) = engine.generate(["hello there"], SamplingParams(max_tokens=20))
    arguments = {"model": NAME, "prompt": "hello there", "max_tokens": 20, "temperature": 0, **asked}
    choice = server.client.completions.create(**arguments).choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    events = list(server.client.completions.create(**arguments, stream=True))
    assert "".join(event.choices[0].text for event in events) == expected.text
    assert expected.token_ids != plain.token_ids


def test_seeds_of_all_integers(server):
    """-1 is none, as in vLLM and other programs; other negative ones are seeds like any."""
    arguments = {"model": NAME, "prompt": "x", "max_tokens": 12}

    def texts(seed: int) -> list[str]:
        answer = server.client.completions.create(**arguments, seed=seed, n=2)
        return [choice.text for choice in answer.choices]

    assert texts(-1) != texts(-1)
    assert texts(-5) == texts(-5)
    assert texts(-5)[1] == texts(-4)[0]
    assert texts(2**63 - 1)[1] == texts(0)[0]


def test_a_special_token_as_a_stop_string(server):
    """It ends the text although the text leaves it out; with ``skip_special_tokens: false`` too."""
    forced = {"model": NAME, "prompt": "x", "max_tokens": 9, "temperature": 0, "logit_bias": {"1": 100}}
    assert server.client.completions.create(**forced).choices[0].finish_reason == "length"
    for more in ({}, {"skip_special_tokens": False}):
        choice = server.client.completions.create(**forced, stop="<s>", extra_body=more).choices[0]
        assert (choice.text, choice.finish_reason) == ("", "stop")
    shown = server.client.completions.create(**forced, extra_body={"skip_special_tokens": False}).choices[0]
    assert shown.text == "<s>" * 9


# --- Templates ---------------------------------------------------------------------------------------------------

PLAIN = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)


def test_developer_is_the_system_where_the_template_does_not_know_it(engine):
    """Qwen's template leaves out a message of a role that it does not know, without a word."""
    template = (
        PLAIN + "{% if add_generation_prompt %}!{% endif %}{{ mood }}{% if half is defined %}{{ 1 / half }}{% endif %}"
    )
    with running(build(template=template)) as made:

        def asked(role: str, **more) -> str:
            messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
            arguments = {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0}
            return made.client.chat.completions.create(**arguments, extra_body=more).choices[0].message.content

        def answer(prompt: str) -> str:
            return engine.generate([prompt], SamplingParams(max_tokens=8))[0].text

        assert asked("developer") == asked("system") == answer("<system>Be brief.<user>Hi!")
        assert asked("system", add_generation_prompt=False) == answer("<system>Be brief.<user>Hi")
        assert asked("system", chat_template_kwargs={"mood": "?"}) == answer("<system>Be brief.<user>Hi!?")
        for wrong, message in (({"half": "x"}, "unsupported operand"), ({"half": 0}, "by zero"), ({"messages": 1}, "")):
            with pytest.raises(openai.BadRequestError, match=f"template rejects the messages: .*{message}"):
                asked("system", chat_template_kwargs=wrong)


def test_a_message_is_continued(server, engine):
    """The last message stays open, and the answer goes on where it ends."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well"}]
    arguments = {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0}
    found = server.client.chat.completions.create(**arguments, extra_body={"continue_final_message": True})
    (expected,) = engine.generate(["<user>Hello\n<assistant>Well"], SamplingParams(max_tokens=8))
    assert found.choices[0].message.content == expected.text
