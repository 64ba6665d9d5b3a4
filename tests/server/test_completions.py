"""``/v1/completions`` through OpenAI's own client: what it says is what the engine says."""

from __future__ import annotations

import openai
import pytest
import torch

from helpers.running import NAME, build, running, tokenizer
from helpers.schedules import model_of
from recursify.engine import SamplingParams
from recursify.modeling import ExitSettings, make_policy
from recursify.server.engine_process.scoring import score_prompt

EXITS = {"policy": "confidence", "threshold": 0.1}


def exits() -> ExitSettings:
    """What the engine makes of that."""
    return ExitSettings(make_policy("confidence", 0.1))


@pytest.fixture(scope="module")
def engine():
    """The server's twin."""
    return build()()


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0.8, "top_p": 0.9, "seed": 5}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}),
        ({"seed": 7}, {"temperature": 1.0, "seed": 7}),
        ({"temperature": 0, "extra_body": {"exit": EXITS}}, {"exit": exits()}),
        ({"temperature": 0, "extra_body": {"exit": {"max_depth": 0}}}, {"max_depth": 0}),
        ({"temperature": 0.5, "seed": 1, "extra_body": {"top_k": 3}}, {"temperature": 0.5, "seed": 1, "top_k": 3}),
        ({"temperature": 0, "extra_body": {"stop_token_ids": [24]}}, {"stop_token_ids": (24,)}),
    ],
)
def test_whole_and_streamed_answers_are_the_engines(server, engine, asked, params):
    """Text, depths, finish reason and usage, in one piece or in events."""
    (expected,) = engine.generate(["hello there"], SamplingParams(max_tokens=20, **params))
    arguments = {"model": NAME, "prompt": "hello there", "max_tokens": 20, **asked}
    whole = server.client.completions.create(**arguments)
    events = list(server.client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.recursify["depths"] == expected.depths
    choices = [event.choices[0] for event in events[:-1]]
    assert "".join(each.text for each in choices) == expected.text
    assert [depth for each in choices for depth in each.recursify["depths"]] == expected.depths
    assert choices[-1].finish_reason == expected.finish_reason
    assert [each.finish_reason for each in choices[:-1]] == [None] * (len(choices) - 1)
    for usage in (whole.usage, events[-1].usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (11, len(expected.token_ids))
        assert usage.mean_depth == pytest.approx(sum(expected.depths) / len(expected.depths), abs=1e-4)
    assert events[-1].choices == []


def test_exits_are_taken(engine):
    """The policy of these tests has tokens at several depths, or they would say nothing."""
    (output,) = engine.generate(["hello there"], SamplingParams(max_tokens=20, exit=exits()))
    assert len(set(output.depths)) > 1


def test_pieces_are_the_text(server):
    """Where an event has several tokens, it has the text of each."""
    stream = server.client.completions.create(model=NAME, prompt="abc", max_tokens=40, stream=True, temperature=0)
    for event in stream:
        (choice,) = event.choices
        pieces = choice.recursify.get("pieces", [choice.text])
        assert "".join(pieces) == choice.text
        assert len(pieces) == len(choice.recursify["depths"])


def test_prompts_and_choices_have_places(server, engine):
    """Two prompts, as text or ids, two choices each: the first choice has the seed that was given."""
    prompts = ["first", "and second"]
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3)
    expected = [output.text for output in engine.generate(prompts, params)]
    ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    for asked in (prompts, ids):
        answer = server.client.completions.create(model=NAME, prompt=asked, max_tokens=6, seed=3, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [answer.choices[index].text for index in (0, 2)] == expected
        assert answer.choices[0].text != answer.choices[1].text
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 24


def test_streamed_choices_are_those_of_the_whole(server):
    """Events say which choice they are of."""
    arguments = {"model": NAME, "prompt": ["one", "two"], "max_tokens": 8, "seed": 1, "n": 2}
    whole = [choice.text for choice in server.client.completions.create(**arguments).choices]
    texts = [""] * 4
    for event in server.client.completions.create(**arguments, stream=True):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == whole


def test_a_stop_string_ends_the_text(server, engine):
    """It is not part of it, and no part of it has been streamed."""
    (expected,) = engine.generate(["hello"], SamplingParams(max_tokens=30))
    stop = next(
        each for each in (expected.text[i : i + 2] for i in range(8, 20)) if each.isascii() and "\ufffd" not in each
    )
    arguments = {"model": NAME, "prompt": "hello", "max_tokens": 30, "temperature": 0, "stop": [stop, "never comes"]}
    choice = server.client.completions.create(**arguments).choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text[: expected.text.index(stop)], "stop")
    streamed = list(server.client.completions.create(**arguments, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == choice.text
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_log_probabilities(server, engine):
    """Those of the engine, streamed or not."""
    (expected,) = engine.generate(["hello"], SamplingParams(max_tokens=5, logprobs=2))
    arguments = {"model": NAME, "prompt": "hello", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    found = server.client.completions.create(**arguments).choices[0].logprobs
    values = [row[token] for row, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert found.token_logprobs == pytest.approx(values)
    assert [max(top.values()) for top in found.top_logprobs] == pytest.approx(
        [max(row.values()) for row in expected.logprobs]
    )
    streamed = [event.choices[0].logprobs for event in server.client.completions.create(**arguments, stream=True)]
    assert [value for each in streamed for value in each.token_logprobs] == pytest.approx(values)


@pytest.mark.parametrize(("family", "kv"), [("llama", "deferred"), ("gemma2", "deferred"), ("qwen3", "recursion_wise")])
def test_a_prompt_is_scored_as_the_model_does(family, kv):
    """Its log-probabilities are those of the whole model's logits; Gemma caps its logits."""
    engine = build(family, kv)()
    ids = list(range(3, 40))
    with torch.inference_mode():
        logits = model_of(family, kv)(torch.tensor([ids])).logits[0].log_softmax(-1)
    rows = score_prompt(engine, ids, 3)
    assert rows[0] is None
    expected = [float(logits[place - 1, ids[place]]) for place in range(1, len(ids))]
    assert [row[token] for row, token in zip(rows[1:], ids[1:], strict=True)] == pytest.approx(expected, abs=1e-4)
    assert [max(row.values()) for row in rows[1:]] == pytest.approx(logits[:-1].max(-1).values.tolist(), abs=1e-4)


def test_an_echo_repeats_the_prompt(server, engine):
    """With its scores, as evaluations read them."""
    (expected,) = engine.generate(["hello"], SamplingParams(max_tokens=1))
    choice = server.client.completions.create(
        model=NAME, prompt="hello", max_tokens=1, temperature=0, echo=True, logprobs=1
    ).choices[0]
    assert choice.text == "hello" + expected.text
    assert choice.logprobs.tokens[:5] == list("hello")
    assert choice.logprobs.token_logprobs[0] is None
    scored = score_prompt(engine, tokenizer()("hello")["input_ids"], 1)
    assert choice.logprobs.token_logprobs[1:5] == pytest.approx([min(row.values()) for row in scored[1:]])


@pytest.mark.parametrize(
    ("prompt", "more"),
    [
        ("héllo €5, 日本", {"seed": 4, "temperature": 1.5}),
        ("hello", {"temperature": 0}),
        ("😀 x", {"temperature": 0, "logit_bias": {"1": 100}, "extra_body": {"skip_special_tokens": False}}),
    ],
)
def test_offsets_are_those_of_the_characters(server, engine, prompt, more):
    """The text before a token, in characters: several tokens of one have its offset; with an echo after the prompt."""
    words, shows = tokenizer(), "extra_body" in more

    def check(tokens: list[int], text: str, offsets: list[int]) -> None:
        assert len(tokens) == len(offsets)
        for end, offset in enumerate(offsets):
            before = words.decode(tokens[:end], skip_special_tokens=not shows)
            common = next((i for i in range(len(before)) if before[i] != text[i : i + 1]), len(before))
            # Of bytes that form no character, the first has an offset of its own.
            assert offset == common or text[common - 1] == text[offset] == "\ufffd"

    params = {name: value for name, value in more.items() if name in ("seed", "temperature")}
    if shows:
        params |= {"logit_bias": {1: 100.0}, "skip_special_tokens": False}
    (expected,) = engine.generate([prompt], SamplingParams(max_tokens=24, **params))
    arguments = {"model": NAME, "prompt": prompt, "max_tokens": 24, "logprobs": 0, **more}
    plain = server.client.completions.create(**arguments).choices[0]
    assert plain.text == expected.text
    check(expected.token_ids, plain.text, plain.logprobs.text_offset)
    echoed = server.client.completions.create(**arguments, echo=True).choices[0]
    ids = words(prompt)["input_ids"]
    assert echoed.text == prompt + plain.text
    check(ids, prompt, echoed.logprobs.text_offset[: len(ids)])
    assert echoed.logprobs.text_offset[len(ids) :] == [len(prompt) + each for each in plain.logprobs.text_offset]
    streamed = [event.choices[0].logprobs for event in server.client.completions.create(**arguments, stream=True)]
    assert [each for part in streamed if part for each in part.text_offset] == plain.logprobs.text_offset


def test_other_models_and_routed_models(server):
    """A name that is not there is refused; a routed model answers, with the depths that its routers chose."""
    with pytest.raises(openai.NotFoundError, match=r"Model not found\. This server serves 'tiny'"):
        server.client.completions.create(model="gpt-7", prompt="x")
    with running(build("qwen3", "shared")) as routed:
        choice = routed.client.completions.create(model=NAME, prompt="hello", max_tokens=12).choices[0]
        assert len(set(choice.recursify["depths"])) > 1
        with pytest.raises(openai.BadRequestError, match="has routers, which decide how far a token goes"):
            routed.client.completions.create(model=NAME, prompt="x", extra_body={"exit": EXITS})
        assert routed.is_idle()


def test_a_default_exit_can_be_turned_off():
    """It is for requests that do not say; null says that tokens go all the way."""
    with running(max_depth=0) as made:
        arguments = {"model": NAME, "prompt": "x", "max_tokens": 5, "temperature": 0}
        first = made.client.completions.create(**arguments)
        whole = made.client.completions.create(**arguments, extra_body={"exit": None})
        assert set(first.choices[0].recursify["depths"][1:]) == {0}
        assert set(whole.choices[0].recursify["depths"]) == {2}
        assert first.usage.num_recursions == 3
