"""Penalties, biases and minimum lengths, beside transformers' processors and OpenAI's formula."""

from collections import Counter

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from helpers.schedules import model_of
from helpers.small_engine import greedy, prompts, recursive, small_engine
from helpers.tiny_models import byte_tokenizer
from recursify.engine import Engine, SamplingParams
from recursify.engine.logits_processing import process_logits
from recursify.engine.request import Request
from recursify.engine.sampler import sample
from recursify.errors import EngineError
from recursify.modeling import ExitSettings, make_policy

LOOPS = [{}, {"device_loop": True, "num_device_steps": 4}, {"async_output": True}]
PROMPT, OUTPUT = [5, 6, 6, 7], [8, 8, 8, 5, 9]


def request(prompt=PROMPT, output=OUTPUT, ends=(), **params) -> Request:
    """A request that has generated ``output``."""
    made = Request(prompt, SamplingParams(**params), None, 1, ends=ends)
    made.tokens += output
    return made


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


def test_penalties_are_those_of_transformers_and_openai(logits):
    """In a batch whose rows ask for different ones; a row that asks for none keeps its logits."""
    rows = [
        request(repetition_penalty=1.3),
        request(),
        request(frequency_penalty=0.7, presence_penalty=-0.4),
        request([5, 30], [31], repetition_penalty=0.8),
        request(output=[], repetition_penalty=1.3, frequency_penalty=1.0),
        request(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.25),
    ]
    found = process_logits(logits, rows)

    def repeated(row: int, penalty: float) -> torch.Tensor:
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        return processor(torch.tensor([rows[row].tokens]), logits[row : row + 1].clone())[0]

    def penalized(scores: torch.Tensor, frequency: float, presence: float) -> torch.Tensor:
        scores = scores.clone()
        for token, count in Counter(OUTPUT).items():
            scores[token] -= count * frequency + presence  # OpenAI's formula
        return scores

    expected = [
        repeated(0, 1.3),
        logits[1],
        penalized(logits[2], 0.7, -0.4),
        repeated(3, 0.8),
        repeated(4, 1.3),
        penalized(repeated(5, 1.3), 0.5, 0.25),
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_biases_are_added_and_ends_are_ruled_out(logits):
    """Until there are ``min_tokens``; a bias comes before the repetition penalty, as in vLLM and transformers."""
    rows = [
        request(logit_bias={3: 2.5, 39: -100.0}),
        request(ends=(2, 11), min_tokens=6),
        request(ends=(2, 11), min_tokens=5),
        request(logit_bias={8: 50.0}, repetition_penalty=2.0),
        request(),
        request(logit_bias={2: 1.0}, ends=(2,), min_tokens=9),
    ]
    found, expected = process_logits(logits, rows), logits.clone()
    expected[0, 3] += 2.5
    expected[0, 39] -= 100
    expected[1, [2, 11]] = -torch.inf
    expected[3, 8] += 50
    expected[3] = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([rows[3].tokens]), expected[3:4])[0]
    expected[5, 2] = -torch.inf
    torch.testing.assert_close(found, expected)


def test_without_a_change_the_logits_are_the_models(logits):
    """The same tensor, in its own dtype: no copy."""
    rows = [request(repetition_penalty=1.0, frequency_penalty=0.0, logit_bias={}, min_tokens=5)] * len(logits)
    assert process_logits(logits.bfloat16(), rows).dtype == torch.bfloat16
    assert process_logits(logits, rows) is logits


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_the_tokens_that_transformers_keeps(logits, min_p):
    """After the temperature: the tokens that 3,000 draws find are those that the warpers leave."""
    scores = logits[:1]
    warped = MinPLogitsWarper(min_p)(None, TemperatureLogitsWarper(1.5)(None, scores.clone()))
    probabilities = warped.softmax(-1)[0]
    rows = [request(temperature=1.5, min_p=min_p, seed=seed) for seed in range(3000)]
    drawn = sample(scores.expand(3000, -1), rows)
    frequencies = torch.bincount(drawn, minlength=40) / 3000
    assert not frequencies[probabilities == 0].any()
    torch.testing.assert_close(frequencies, probabilities, atol=0.04, rtol=0)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_engine_repeats_no_more_than_generate(loop):
    """Tokens of ``generate(repetition_penalty=…)``, in a batch with requests that change other things or nothing."""
    model = recursive()
    asked = prompts(5, 9, 4, 7)
    params = [
        SamplingParams(max_tokens=12, repetition_penalty=1.4),
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=12, repetition_penalty=0.7),
        SamplingParams(max_tokens=12, logit_bias={77: 1000.0}),
    ]
    outputs = [output.token_ids for output in small_engine(model, **loop).generate(asked, params)]
    expected = [greedy(model, asked[0], 12, repetition_penalty=1.4), greedy(model, asked[1], 12)]
    expected += [greedy(model, asked[2], 12, repetition_penalty=0.7), [77] * 12]
    assert outputs == expected
    assert greedy(model, asked[0], 12) != expected[0]


def test_penalties_hold_under_early_exit():
    """Tokens and depths of ``generate`` with the same policy and penalty; exits are decided by the model's logits."""
    model = model_of("llama", "deferred")
    exits = ExitSettings(make_policy("confidence", 0.1))
    prompt = prompts(6)[0]
    expected = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        exit_policy=exits,
        return_dict_in_generate=True,
    )
    params = SamplingParams(max_tokens=12, repetition_penalty=1.5, exit=exits)
    (output, _) = small_engine(model).generate([prompt, prompts(8)[0]], [params, SamplingParams(max_tokens=5)])
    assert output.token_ids == expected.sequences[0, len(prompt) :].tolist()
    assert output.depths == expected.exit_depths[0].tolist()
    assert len(set(output.depths)) > 1
    assert output.token_ids != greedy(model, prompt, 12, exit_policy=exits)


def test_openais_penalties_in_the_engine():
    """A frequency penalty that is larger than any logit: no token occurs twice, and a preemption changes nothing."""
    model = recursive()
    asked = prompts(5, 9, 4)
    params = SamplingParams(max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0)
    plain = Engine(model).generate(asked, [params] * 3)
    crowded = small_engine(model, num_pages=16, max_num_seqs=3)
    outputs = crowded.generate(asked, [params] * 3)
    assert crowded.stats.preemptions
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    for output, prompt in zip(outputs, asked, strict=True):
        ids = list(prompt)
        for number, token in enumerate(output.token_ids):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            for seen, count in Counter(output.token_ids[:number]).items():
                logits[seen] -= 2.0 * count + 2.0
            assert token == int(logits.argmax())
            ids.append(token)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_end_before_min_tokens(loop):
    """EOS and stop tokens are not sampled before; with the next token they may be, also on the device."""
    model = recursive()
    prompt = prompts(5)[0]
    plain = greedy(model, prompt, 12)
    stops = (plain[0], plain[1])
    first = Engine(model, **loop).generate([prompt], SamplingParams(max_tokens=12, stop_token_ids=stops))[0]
    params = SamplingParams(max_tokens=40, stop_token_ids=stops, min_tokens=4)
    engine = small_engine(model, **loop)
    later = engine.generate([prompt], params)[0]
    assert later.token_ids == Engine(model).generate([prompt], params)[0].token_ids
    if "device_loop" in loop and len(later.token_ids) > 6:
        assert engine.stats.loop_iterations
    assert first.token_ids == plain[:1]
    assert not set(stops) & set(later.token_ids[:4])
    assert len(later.token_ids) >= 4


def test_no_stop_string_before_min_tokens():
    """Nothing is cut off before; a stop string that comes later ends the text."""
    engine = Engine(recursive(), byte_tokenizer())
    letters = {int(token): 100.0 for token in byte_tokenizer()("ab")["input_ids"]}
    params = {"max_tokens": 24, "logit_bias": letters}
    prompt = prompts(5)[0]
    whole = engine.generate([prompt], SamplingParams(**params))[0].text
    stop = whole[3]
    for min_tokens in (0, 4, 9):
        (output,) = engine.generate([prompt], SamplingParams(stop=(stop,), min_tokens=min_tokens, **params))
        end = whole.find(stop, min_tokens)
        assert output.text == (whole if end < 0 else whole[:end])
        assert output.finish_reason == ("length" if end < 0 else "stop")


def test_log_probabilities_are_the_models():
    """Before biases and penalties, so that they can be compared between requests."""
    model, prompt = recursive(), prompts(6)[0]
    params = SamplingParams(max_tokens=3, logprobs=1, logit_bias={77: 1000.0}, frequency_penalty=1.0)
    output = small_engine(model).generate([prompt], params)[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)[:, 77].tolist()
    assert [row[77] for row in output.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {260: 1.0}}, "Token 260 of logit_bias is not in the model's vocabulary of 260"),
        ({"stop_token_ids": (999,)}, "Token 999 of stop_token_ids is not in the model's vocabulary of 260"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(params, message):
    with pytest.raises(EngineError, match=message):
        Engine(recursive(), byte_tokenizer()).add("x", SamplingParams(**params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_p": 1.5}, "min_p must be a number of at least 0 and at most 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, got 0"),
        ({"frequency_penalty": 3}, "frequency_penalty must be a number of at least -2 and at most 2, got 3"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be a number"),
        ({"logit_bias": {-1: 2}}, "logit_bias must be a mapping"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be a mapping"),
        ({"min_tokens": -1}, "min_tokens must be a whole number of at least 0, got -1"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens \(9\) is more than max_tokens \(8\)"),
    ],
)
def test_values_out_of_range_are_refused(params, message):
    with pytest.raises(EngineError, match=message):
        SamplingParams(**params)
