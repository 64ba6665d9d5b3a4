"""Sampling: distributions, seeds and log-probabilities."""

import pytest
import torch

from helpers.small_engine import greedy, prompts, recursive, small_engine
from recursify.engine import Engine, SamplingParams


def test_draws_do_not_depend_on_the_batch():
    """A seed names an answer, whatever else runs."""
    model = recursive()
    asked = prompts(5, 9, 4)
    limits = ({"top_p": 0.9, "top_k": 50}, {"min_p": 0.1}, {})
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=number, **limits[number]) for number in range(3)]
    alone = [Engine(model).generate([each], its)[0] for each, its in zip(asked, params, strict=True)]
    for loop in ({}, {"device_loop": True, "num_device_steps": 3}):
        together = small_engine(model, max_num_seqs=3, **loop).generate(asked, params)
        assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    other = Engine(model).generate(asked[:1], SamplingParams(max_tokens=8, temperature=1.0, seed=99))[0]
    assert other.token_ids != alone[0].token_ids


def test_sampling_follows_its_distribution():
    """Frequencies of 2,000 draws beside the probabilities, within top-k, top-p and temperature."""
    from recursify.engine.request import Request
    from recursify.engine.sampler import sample

    logits = torch.log(torch.tensor([[0.05, 0.4, 0.3, 0.2, 0.05]])).expand(2000, 5)
    cases = {
        (0, 1.0): [0.05, 0.4, 0.3, 0.2, 0.05],
        (2, 1.0): [0, 4 / 7, 3 / 7, 0, 0],
        (0, 0.75): [0, 4 / 9, 3 / 9, 2 / 9, 0],
    }
    for (top_k, top_p), expected in cases.items():
        params = [SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed) for seed in range(2000)]
        drawn = sample(logits, [Request([1], its, None, 1) for its in params])
        frequencies = torch.bincount(drawn, minlength=5) / 2000
        torch.testing.assert_close(frequencies, torch.tensor(expected), atol=0.04, rtol=0)
    hot = [Request([1], SamplingParams(temperature=100.0, seed=seed), None, 1) for seed in range(2000)]
    torch.testing.assert_close(
        torch.bincount(sample(logits, hot), minlength=5) / 2000, torch.full((5,), 0.2), atol=0.04, rtol=0
    )


def test_draws_are_the_requests_own():
    """Nothing is drawn from the user's generator, nor is it seeded; a tiny temperature is greedy."""
    model = recursive()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    engine = small_engine(model)
    engine.generate(prompts(5), SamplingParams(max_tokens=3, temperature=1.0))
    torch.testing.assert_close(torch.cat([first, torch.rand(1)]), expected, atol=0, rtol=0)
    for temperature in (1e-46, 1e-39, 1e-6):
        output = engine.generate(prompts(5), SamplingParams(max_tokens=5, temperature=temperature))[0]
        assert output.token_ids == greedy(model, prompts(5)[0], 5)


def test_log_probabilities():
    """Those of the model, of the first choices and of what was chosen."""
    model = recursive()
    prompt = prompts(6)[0]
    params = SamplingParams(max_tokens=4, logprobs=3, temperature=2.0, seed=1)
    output = small_engine(model).generate([prompt, prompts(8)[0]], [params, SamplingParams(max_tokens=4)])[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for row, token, found in zip(expected, output.token_ids, output.logprobs, strict=True):
        best = row.topk(3).indices.tolist()
        assert set(found) == {*best, token}
        for each, value in found.items():
            assert value == pytest.approx(float(row[each]), abs=1e-4)
