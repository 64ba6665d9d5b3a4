"""Self-speculation: the whole model's output, exactly, from fewer of its calls."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, TextStreamer

from helpers.early_exit import STEPS, Waits, generate, left_padded, tiny_exits
from helpers.tiny_models import byte_tokenizer, random_ids
from recursify.modeling import SpeculationSettings
from recursify.modeling.recursive_speculation import DraftLength, Speculator


@pytest.mark.parametrize("through_coda", [True, False])
def test_output_is_greedy_output_in_every_family(family, through_coda):
    """Prompts of unlike lengths in one batch, whose rows keep different numbers of drafts; 64 steps."""
    model = tiny_exits(family, recursions=2, through_coda=through_coda)
    ids, mask = left_padded((9, 4, 7))
    found = generate(model, ids, mask, speculate=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids, mask))
    assert (found.accepted <= found.drafted).all()
    # Every token but the prompt's own is a kept draft or the whole model's choice of a round.
    assert (found.accepted + found.rounds >= 63).all()


@pytest.mark.parametrize(
    "settings",
    [
        SpeculationSettings(num_drafts=1, adaptive=False),
        SpeculationSettings(num_drafts=7, adaptive=False),
        SpeculationSettings(depth=2, num_drafts=3),
        SpeculationSettings(layers=4),
    ],
)
def test_output_is_greedy_output_with_any_settings(settings):
    """One draft or many, a later exit, an exit inside the block."""
    model = tiny_exits()
    ids, mask = left_padded((9, 4))
    found = generate(model, ids, mask, speculate=settings, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids, mask))
    if not settings.adaptive:
        assert int((found.drafted / found.rounds).max()) <= settings.num_drafts


def test_a_model_of_one_recursion_drafts_after_some_of_its_layers():
    """FREE's shallow part as the draft of a plain dense model."""
    model = tiny_exits(recursions=1, heads=False)
    ids = random_ids(2, 7)
    assert torch.equal(generate(model, ids, speculate=SpeculationSettings(layers=2)), generate(model, ids))


def test_an_exit_that_is_right_saves_calls():
    """Deeper layers that change nothing: every draft is kept, and drafts grow longer."""
    model = tiny_exits(recursions=2)
    with torch.no_grad():
        # What a layer adds to its input goes through these two maps.
        for layer in model.model.block:
            for path in (layer.self_attn.o_proj, layer.mlp.down_proj):
                path.linear.weight.zero_()
                path.lora_b[1].zero_()
                path.lora_b[0].normal_(std=0.3)
        model.exit_heads[0].norm.load_state_dict(model.model.norm.state_dict())
    ids = random_ids(2, 5)
    found = generate(model, ids, speculate=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids))
    assert torch.equal(found.accepted, found.drafted)
    assert int(found.rounds.max()) < 8


def test_generate_keeps_its_other_arguments(capsys):
    """End of text by row, processors that read the text, a minimum, a streamer."""
    model = tiny_exits(recursions=2)
    ids, mask = left_padded((9, 4, 6))
    stop = int(generate(model, ids, mask)[1, 9 + 5])
    for more in (
        {"eos_token_id": stop},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": stop, "max_new_tokens": 20},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ):
        found, wanted = generate(model, ids, mask, speculate=True, **more), generate(model, ids, mask, **more)
        assert torch.equal(found, wanted), more
    tokenizer = byte_tokenizer()
    generate(model, ids[:1], speculate=True, streamer=TextStreamer(tokenizer), max_new_tokens=8)
    streamed = capsys.readouterr().out
    written = generate(model, ids[:1], max_new_tokens=8)[0]
    assert streamed.strip("\n") == tokenizer.decode(written).strip("\n")


def test_sampling_keeps_the_distribution():
    """Drafts from one distribution, checked against another: what is kept or drawn anew follows the other."""
    model = tiny_exits(recursions=2)
    settings, mask = SpeculationSettings(num_drafts=1, adaptive=False), torch.ones(1, 4, dtype=torch.long)
    config = GenerationConfig(do_sample=True, max_length=10)
    speculator = Speculator(model, settings, mask, LogitsProcessorList(), config)
    q = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0])
    p = torch.tensor([[0.1, 0.3, 0.2, 0.1, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]])
    torch.manual_seed(0)
    counts, kept, number = torch.zeros(5), 0, 20_000
    for draft in torch.multinomial(q, number, replacement=True):
        tokens, count = speculator._settle(draft[None], [q], torch.tensor([0, 3]), p)
        counts[tokens[0]] += 1
        kept += int(count)
    # Five standard errors.
    assert float((counts / number - p[0]).abs().max()) < 5 * (0.25 / number) ** 0.5
    assert kept / number == pytest.approx(float(torch.minimum(p[0], q).sum()), abs=0.02)


def test_sampling_follows_the_seed():
    """And its processors: a temperature near 0 is greedy."""
    model = tiny_exits(recursions=2)
    ids, mask = left_padded((9, 4))
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(generate(model, ids, mask, speculate=True, do_sample=True, top_k=5))
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], generate(model, ids, mask))
    cold = generate(model, ids, mask, speculate=True, do_sample=True, temperature=1e-4)
    assert torch.equal(cold, generate(model, ids, mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculate": True, "exit_policy": "confidence"}, "exit_policy, which is lossy, or speculate, which is not"),
        ({"speculate": True, "num_beams": 2}, "Speculation works with one beam, and num_beams is 2"),
        ({"speculate": SpeculationSettings(depth=1)}, "no exit after depth 1 to draft by: the model has 1"),
        ({"speculate": SpeculationSettings(layers=9)}, r"layers=\(9,\) must be rising numbers"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    """One clear error each."""
    with pytest.raises(ValueError, match=message):
        tiny_exits(recursions=2).generate(random_ids(1, 3), max_new_tokens=4, pad_token_id=0, **arguments)


def test_settings_out_of_range_are_refused():
    """With the values."""
    with pytest.raises(ValueError, match="num_drafts must be from 1 to max_drafts, got 0"):
        SpeculationSettings(num_drafts=0)


def test_a_round_waits_for_the_device_once_for_all_rows():
    """How many drafts of each row are kept comes over together, sampled or not."""
    model = tiny_exits(recursions=2)
    ids, mask = left_padded((9, 4, 7))
    for sampled in (False, True):
        config = GenerationConfig(do_sample=sampled, max_length=100)
        speculator = Speculator(model, SpeculationSettings(), mask, [], config)
        rows, texts = [0, 1, 2], list(ids)
        first = speculator.choose(rows, texts, speculator.decoder.prefill(ids))[0]
        texts = [torch.cat([text, first[row : row + 1]]) for row, text in enumerate(texts)]
        with Waits() as waits:
            for _ in range(4):
                new = speculator.round(texts, rows)
                texts = [torch.cat([text, chosen]) for text, chosen in zip(texts, new, strict=True)]
        assert waits.fetched == 4


def test_drafts_are_as_many_as_pay():
    """Twice as many tokens where all are kept, none where too few are, and a try now and then."""
    length = DraftLength(SpeculationSettings(num_drafts=2, max_drafts=7), cost=0.5)
    seen = []
    for _ in range(5):
        seen.append(length.length)
        length.learn(length.length, length.length)
    assert seen == [2, 4, 6, 7, 7]
    for _ in range(12):  # each draft is kept four times out of five: 0.8 ** 3 > 0.5 > 0.8 ** 4
        length.learn(4, 4)
        length.learn(1, 0)
    assert length.length == 3

    never = DraftLength(SpeculationSettings(num_drafts=4), cost=0.5)
    drafted = []
    for _ in range(200):
        drafted.append(never.length)
        never.learn(never.length, 0)
    tries = [step for step, count in enumerate(drafted) if count]
    assert max(drafted[tries[1] :]) == 1
    gaps = [after - before for before, after in pairwise(tries)]
    assert gaps[-1] > 60, "it tries ever more rarely"
    while not never.length:
        never.learn(0, 0)
    for _ in range(30):
        never.learn(1, 1)
    assert never.length > 1, "and goes on where a try is kept"

    fixed = DraftLength(SpeculationSettings(num_drafts=4, adaptive=False), cost=0.5)
    fixed.learn(4, 0)
    assert fixed.length == 4


@pytest.mark.parametrize("through_coda", [True, False])
def test_what_a_draft_costs_is_counted_in_weights(through_coda):
    """Three layers of six, the coda's one where exits run it, and the head, which both read."""
    model = tiny_exits(recursions=2, through_coda=through_coda)
    mask = torch.ones(1, 4, dtype=torch.long)
    config = GenerationConfig(max_length=10)
    speculator = Speculator(model, SpeculationSettings(), mask, LogitsProcessorList(), config)
    layer = sum(weight.numel() for weight in model.model.prelude[0].parameters() if weight.ndim == 2)
    head = model.lm_head.weight.numel()
    expected = ((4 if through_coda else 3) * layer + head) / (6 * layer + head)
    assert speculator.lengths[0].cost == pytest.approx(expected)


def test_seldom_kept_drafts_are_hardly_made():
    """An exit that is never right costs a few drafts, and no token."""
    model = tiny_exits(recursions=2)
    with torch.no_grad():
        model.exit_heads[0].norm.weight.neg_()
    ids = random_ids(2, 5)
    found = generate(model, ids, speculate=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids))
    assert int(found.accepted.max()) <= 1
    assert int(found.drafted.max()) < STEPS / 4
