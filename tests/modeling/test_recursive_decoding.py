"""Early exit in batches: every row as if it were alone, and exact where that is promised."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TextStreamer

from helpers.early_exit import STEPS, Waits, generate, left_padded, tiny_exits
from helpers.tiny_models import byte_tokenizer, random_ids
from helpers.tolerances import LOGITS
from recursify.experiments.adaptive_thresholds import AdaptiveThresholds
from recursify.modeling import (
    EXIT_POLICIES,
    KV_MODES,
    DepthDecoder,
    ExitLimits,
    ExitSettings,
    RecursiveForCausalLM,
    decide_exits,
    make_policy,
)

THRESHOLDS = {
    "confidence": 0.02,
    "entropy": 0.02,
    "saturation": 0.8,
    "convergence": 0.3,
    "divergence": 0.8,
    "head": 0.5,
    "fixed": 1,
    "oracle": 0.5,
}
"""At which a random model of four recursions exits here and there."""


def alone_and_together(model: RecursiveForCausalLM, settings: ExitSettings, lengths=(9, 4, 7)) -> list[int]:
    """Check that every row of a batch is what it is alone; returns how many tokens left by each exit."""
    ids, mask = left_padded(lengths)
    together = generate(model, ids, mask, exit_policy=settings, return_dict_in_generate=True)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, -length:], exit_policy=settings, return_dict_in_generate=True)
        assert torch.equal(together.sequences[row, -length - STEPS :], alone.sequences[0])
        assert torch.equal(together.exit_depths[row], alone.exit_depths[0])
        assert together.layers_run[row] == alone.layers_run[0]
    return torch.bincount(together.exit_depths.flatten(), minlength=model.config.num_recursions).tolist()


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("policy", EXIT_POLICIES)
def test_batched_is_one_by_one(policy, kv):
    """Every policy with every source of skipped keys and values, 64 steps, prompts of unlike lengths."""
    model = tiny_exits()
    counts = alone_and_together(model, ExitSettings(make_policy(policy, THRESHOLDS[policy]), kv=kv))
    assert sum(count > 0 for count in counts) > 1, f"{counts}: or the test would say nothing about rows that part"


@pytest.mark.parametrize("through_coda", [True, False])
def test_batched_is_one_by_one_in_every_family(family, through_coda):
    """Sliding windows, several RoPE bases, parallel residuals, fused projections."""
    model = tiny_exits(family, recursions=2, through_coda=through_coda)
    alone_and_together(model, ExitSettings(make_policy("confidence", 0.02)))


def test_no_exit_is_greedy_decoding(family):
    """A threshold of 1: the same tokens as generate without a policy, from the same number of layers."""
    model = tiny_exits(family, recursions=2)
    ids, mask = left_padded((9, 4))
    found = generate(model, ids, mask, exit_policy=make_policy("confidence", 1.0), return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids, mask))
    # The first token is the prompt's, which is not counted. Asking the exit runs the one layer of the coda.
    assert found.layers_run.tolist() == [(6 + 1) * (STEPS - 1)] * 2
    assert set(found.exit_depths.flatten().tolist()) == {1}


def test_every_exit_is_static_shallow_decoding():
    """A threshold below 0: after the first token, which is the prompt's, the model run at its first exit."""
    model = tiny_exits(recursions=2, through_coda=False)
    ids = random_ids(2, 7)
    found = generate(
        model,
        ids,
        exit_policy=ExitSettings(make_policy("confidence", -1.0), max_pending=1000),
        return_dict_in_generate=True,
    )
    first = torch.cat([ids, generate(model, ids, max_new_tokens=1)[:, -1:]], dim=1)
    assert torch.equal(found.sequences, generate(model, first, exit_depth=0, max_new_tokens=STEPS - 1))
    assert found.layers_run.tolist() == [3 * (STEPS - 1)] * 2
    assert found.exit_depths[:, 1:].eq(0).all()


def decoder_after(model: RecursiveForCausalLM, settings: ExitSettings, steps: int, lengths=(6, 4)):
    """A decoder that has taken ``steps`` given tokens, with all tokens so far and what each of them left by."""
    ids, mask = left_padded(lengths)
    more = random_ids(len(lengths), steps, seed=1)
    decoder = DepthDecoder(model, [settings] * len(lengths), mask, max_length=ids.shape[1] + steps)
    with torch.no_grad():
        decoder.prefill(ids)
        exits = [
            decoder.step(token, list(range(len(lengths))), torch.ones(len(lengths), dtype=torch.bool)).exits
            for token in more.T
        ]
    return decoder, torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1), torch.stack(exits)


@pytest.mark.parametrize("through_coda", [True, False])
def test_deferred_keys_and_values_are_those_of_a_full_forward(through_coda):
    """After a row's flush; before it, deeper layers are as far as they say. Counters follow the block average."""
    model = tiny_exits(recursions=2, through_coda=through_coda)
    settings = ExitSettings(make_policy("confidence", 0.03))
    decoder, ids, mask, exits = decoder_after(model, settings, steps=20)
    with torch.no_grad():
        full = model.model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True)
        cache = full.cache if "cache" in full else full.past_key_values
    assert {0, 1} <= set(exits.flatten().tolist())
    for row in range(2):
        total = ids.shape[1]
        pending = next((n for n, left in enumerate(exits[:, row].flip(0).tolist()) if left == 1), 20)
        assert decoder.done[0][row] == total, "the shallow part has seen every token"
        assert decoder.done[1][row] == total - pending, "the deep part all but those that wait"
        first = int(decoder.first[row])
        for position in range(6):
            seen = decoder.done[0 if position < 3 else 1][row]
            for mine, theirs in (
                (decoder.cache.keys, cache.layers[position].keys),
                (decoder.cache.values, cache.layers[position].values),
            ):
                torch.testing.assert_close(
                    mine[position][row, :, first:seen], theirs[row, :, first:seen], atol=1e-5, rtol=0
                )
    deep = (exits == 1).sum(0)
    # Confidence is asked at every token, through the one layer of the coda where exits run it.
    assert decoder.layers_run == (deep * 6 + (20 - deep) * 3 + 20 * through_coda).tolist()


def test_copied_and_latest_keys_are_what_they_say():
    """Projected from the state at the exit; or those of the same layer at the depth before. Both differ from exact."""
    model = tiny_exits(recursions=2, through_coda=False)
    always = make_policy("confidence", -1.0)
    exact, ids, _, _ = decoder_after(model, ExitSettings(make_policy("confidence", 1.0)), steps=1)
    copied, *_ = decoder_after(model, ExitSettings(always, kv="copied"), steps=1)
    latest, *_ = decoder_after(model, ExitSettings(always, kv="latest"), steps=1)
    # Not the first layer that is skipped: to that one the state at the exit is what it would have had.
    last, position = ids.shape[1] - 1, model.config.layout.position(1, 1)
    twin = model.config.layout.position(1, 0)
    with torch.no_grad():
        state = copied.entering[1][:, last]
        view = model.model.block[1].views[1]
        value = view.self_attn.v_proj(view.input_layernorm(state)).view(2, 2, 8)
    found = copied.cache.values[position][:, :, last]
    torch.testing.assert_close(found, value, atol=1e-5, rtol=0)
    assert torch.equal(latest.cache.values[position][:, :, last], latest.cache.values[twin][:, :, last])
    for other in (copied, latest):
        assert float((other.cache.values[position] - exact.cache.values[position])[:, :, last].abs().max()) > 1e-2
        assert other.done[1] == [last + 1] * 2, "nothing waits"


@pytest.mark.parametrize("kv", KV_MODES)
def test_an_exit_through_the_coda_says_what_the_coda_makes_of_its_state(kv):
    """By hand, on the decoder's own keys and values: the coda's layer on the state at the exit, norm and head."""
    model = tiny_exits(recursions=4)
    decoder, ids, _, exits = decoder_after(model, ExitSettings(make_policy("fixed", 1), kv=kv), steps=6)
    assert exits.eq(1).all()
    last = ids.shape[1] - 1
    with torch.no_grad():
        state = decoder.entering[2][:, last : last + 1]
        rotation = model.model.rotations(state, (last - decoder.first)[:, None])
        layer = model.model.coda[0]
        normed = layer.input_layernorm(state)
        value = layer.self_attn.v_proj(normed).view(2, 1, 2, 8).transpose(1, 2)
        torch.testing.assert_close(decoder.cache.values[5][:, :, last : last + 1], value, atol=1e-5, rtol=0)
        columns = torch.arange(last + 1)
        hidden = (columns < decoder.first[:, None])[:, None, None]

        class Seen:
            def update(self, *_, **__):
                return decoder.cache.keys[5][:, :, : last + 1], decoder.cache.values[5][:, :, : last + 1]

        mask = torch.zeros(2, 1, 1, last + 1).masked_fill(hidden, torch.finfo(torch.float32).min)
        arguments = {model.model.cache_argument: Seen(), "use_cache": True}
        out = layer(state, attention_mask=mask, position_embeddings=rotation, **arguments)
        wanted = model.compute_exit_logits(1, out[:, 0])
        found = decoder.compute_exit_logits(1, state[:, 0], [0, 1])
    torch.testing.assert_close(found, wanted, atol=LOGITS[torch.float32], rtol=0)


def test_latest_keys_are_those_of_the_deepest_depth_that_ran():
    """With four recursions, after an exit at depth 1: depths 2 and 3 have what depth 1 has, and not depth 0."""
    model = tiny_exits(recursions=4)
    decoder, ids, *_ = decoder_after(model, ExitSettings(make_policy("fixed", 1), kv="latest"), steps=3)
    last, layout = ids.shape[1] - 1, model.config.layout
    at = [decoder.cache.values[layout.position(0, depth)][:, :, last] for depth in range(4)]
    assert torch.equal(at[2], at[1])
    assert torch.equal(at[3], at[1])
    assert not torch.equal(at[1], at[0])


def test_what_waits_is_bounded():
    """With max_pending 3 every fourth token at the latest runs all layers."""
    model = tiny_exits(recursions=2)
    settings = ExitSettings(make_policy("confidence", -1.0), max_pending=3)
    found = generate(model, random_ids(2, 5), exit_policy=settings, return_dict_in_generate=True)
    assert found.exit_depths[0, 1:].tolist() == ([0, 0, 0, 1] * STEPS)[: STEPS - 1]
    alone_and_together(model, settings)


def test_an_oracle_says_what_the_whole_model_says():
    """Its tokens are those of full depth, at full cost; its exits agree with them."""
    model = tiny_exits()
    ids, mask = left_padded((9, 4))
    found = generate(model, ids, mask, exit_policy="oracle", return_dict_in_generate=True)
    assert torch.equal(found.sequences, generate(model, ids, mask))
    assert found.layers_run.tolist() == [(6 + 3) * (STEPS - 1)] * 2, "all layers, and the coda for three exits"
    assert found.exit_depths.unique().numel() > 1


def test_exits_after_any_layer_of_a_dense_model():
    """FREE on a model of one recursion, read out by its own norm and head after a third of its layers."""
    model = tiny_exits(recursions=1, heads=False)
    settings = ExitSettings(make_policy("confidence", 0.02), layers=(2,))
    counts = alone_and_together(model, settings)
    assert min(counts[:2]) > 0
    never = ExitSettings(make_policy("confidence", 1.0), layers=(2, 4))
    ids = random_ids(2, 7)
    assert torch.equal(generate(model, ids, exit_policy=never), generate(model, ids))


def test_requests_have_settings_of_their_own():
    """One row never exits, one always does, in one batch."""
    model = tiny_exits(recursions=2)
    never, always = (ExitSettings(make_policy("confidence", value), max_pending=1000) for value in (1.0, -1.0))
    ids = random_ids(2, 7)
    found = generate(model, ids, exit_policy=[never, always], return_dict_in_generate=True)
    assert found.exit_depths[:, 1:].unique(dim=1).tolist() == [[1], [0]]
    assert torch.equal(found.sequences[0], generate(model, ids[:1])[0])
    late = ExitSettings(make_policy("confidence", -1.0), min_depth=1)
    found = generate(tiny_exits(), ids, exit_policy=late, return_dict_in_generate=True)
    assert int(found.exit_depths.min()) == 1


def test_a_fixed_depth_for_each_request():
    """And one per prompt where a prompt has several rows."""
    model, ids = tiny_exits(), random_ids(2, 5)
    first, last = (ExitSettings(make_policy("fixed", depth)) for depth in (0, 2))
    for order in ([first, last], [last, first]):
        found = generate(model, ids, exit_policy=order, return_dict_in_generate=True, max_new_tokens=5)
        depths = [0 if settings is first else 2 for settings in order]
        assert found.exit_depths[:, 1:].tolist() == [[depth] * 4 for depth in depths]
    found = generate(
        model,
        ids,
        exit_policy=[first, last],
        num_return_sequences=2,
        do_sample=True,
        return_dict_in_generate=True,
        max_new_tokens=3,
    )
    assert found.exit_depths[:, 1].tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([make_policy("fixed", 0)] * 3, "exit_policy has 3 settings for 2 rows"),
        ([], "exit_policy has 0 settings for 2 rows"),
        (
            [make_policy("fixed", 0), make_policy("confidence")],
            "share one kind of policy, vocabulary, kv, layers and adapt",
        ),
        ([ExitSettings(make_policy("entropy")), ExitSettings(make_policy("entropy"), kv="copied")], "share one kind"),
        ([0.9], r"takes a name, a policy or ExitSettings, or a list of those, not 0\.9"),
        ([make_policy("confidence", [0.5, 0.6])], "has 2 thresholds, and the model 3 exits"),
        ([make_policy("fixed", 17)], "no exit after depth 17: the model has 3, after depths 0 to 2"),
        ([ExitSettings(make_policy("confidence"), min_depth=3)], "no exit after depth 3"),
    ],
)
def test_settings_that_rows_cannot_have_are_refused(policies, message):
    """Their number, their kinds, and exits that are not there."""
    with pytest.raises(ValueError, match=message):
        generate(tiny_exits(), random_ids(2, 5), exit_policy=policies)


@pytest.mark.parametrize("how", [{"exit_policy": "confidence"}, {"speculate": True}])
def test_prompts_and_arguments_that_would_be_ignored_are_refused(how):
    """Embeddings, an assistant, a number of recursions, a mask with a hole, an empty prompt."""
    model, ids = tiny_exits(recursions=2), random_ids(2, 4)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds works neither"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2, **how)
    for name, value in (("assistant_model", model), ("num_recursions", 1), ("prompt_lookup_num_tokens", 3)):
        with pytest.raises(ValueError, match=f"{name} works neither"):
            model.generate(ids, max_new_tokens=2, **{name: value}, **how)
    for mask in ([[1, 1, 1, 1], [1, 0, 1, 1]], [[1, 1, 1, 1], [0, 0, 0, 0]]):
        with pytest.raises(ValueError, match="A prompt is empty, or has padding elsewhere"):
            generate(model, ids, torch.tensor(mask), **how)


def test_logits_are_returned_and_criteria_see_scores():
    """As generate does without a policy."""
    model, ids = tiny_exits(recursions=2), random_ids(2, 4)
    seen = []

    def criterion(input_ids, scores, **_):
        seen.append(len(scores))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    more = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    never = make_policy("confidence", 1.0)
    found = generate(model, ids, exit_policy=never, stopping_criteria=[criterion], **more)
    wanted = generate(model, ids, **more)
    assert seen == [1, 2, 3, 4]
    for mine, theirs in ((found.logits, wanted.logits), (found.scores, wanted.scores)):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=LOGITS[torch.float32], rtol=0)


def test_the_decaying_threshold_is_calms():
    """``0.9 λ + 0.1 λ exp(−τ t / N)``."""
    settings = ExitSettings(make_policy("confidence", 0.8), decay=4.0)
    assert settings.threshold_at(0, 1, 0, 100) == pytest.approx(0.8)
    assert settings.threshold_at(0, 1, 50, 100) == pytest.approx(0.72 + 0.08 * 0.1353353)
    each = ExitSettings(make_policy("confidence", [0.5, 0.7]))
    assert [each.threshold_at(depth, 2, 3, 9) for depth in range(2)] == [0.5, 0.7]


def test_generate_keeps_its_other_arguments(capsys):
    """End of text by row, processors, stopping, sampling by seed, a streamer: as without a policy when nobody exits."""
    model, never = tiny_exits(recursions=2), make_policy("confidence", 1.0)
    ids, mask = left_padded((9, 4, 6))
    plain = generate(model, ids, mask)
    stop = int(plain[1, 9 + 5])
    for more in (
        {"eos_token_id": stop},
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 10, "eos_token_id": stop, "max_new_tokens": 20},
        {"bad_words_ids": [[stop]]},
    ):
        assert torch.equal(generate(model, ids, mask, exit_policy=never, **more), generate(model, ids, mask, **more))
    assert generate(model, ids, mask, exit_policy=never, eos_token_id=stop)[1, 9 + 6] == 0
    sampled = []
    for policy in (None, never):
        torch.manual_seed(3)
        sampled.append(generate(model, ids, mask, exit_policy=policy, do_sample=True, temperature=0.7))
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], plain)
    tokenizer = byte_tokenizer()
    generate(model, ids[:1], exit_policy="confidence", streamer=TextStreamer(tokenizer), max_new_tokens=5)
    streamed = capsys.readouterr().out
    written = generate(model, ids[:1], exit_policy="confidence", max_new_tokens=5)[0]
    assert streamed.strip("\n") == tokenizer.decode(written).strip("\n")


def test_rows_that_finish_leave_the_others_alone():
    """With exits and an end of text, every row is what it is alone, and cost is counted to its end only."""
    model = tiny_exits(recursions=2)
    settings = ExitSettings(make_policy("confidence", 0.02))
    ids, mask = left_padded((9, 4, 6))
    stop = int(generate(model, ids, mask, exit_policy=settings)[1, 9 + 8])
    more = {"exit_policy": settings, "eos_token_id": stop, "return_dict_in_generate": True}
    together = generate(model, ids, mask, **more)
    for row, length in enumerate((9, 4, 6)):
        alone = generate(model, ids[row : row + 1, -length:], **more)
        new = alone.exit_depths.shape[1]
        assert torch.equal(together.exit_depths[row, :new], alone.exit_depths[0])
        assert together.exit_depths[row, new:].eq(-1).all()
        assert together.layers_run[row] == alone.layers_run[0]
        assert torch.equal(together.sequences[row, 9 : 9 + new], alone.sequences[0, length:])


def test_half_precision():
    """bfloat16 runs and says nothing but finite logits; exits there may part from float32's."""
    model = tiny_exits(recursions=2).to(torch.bfloat16)
    found = generate(
        model, random_ids(2, 5), exit_policy="confidence", output_scores=True, return_dict_in_generate=True
    )
    assert found.sequences.shape == (2, 5 + STEPS)
    assert all(bool(torch.isfinite(scores).all()) for scores in found.scores)


def test_a_prompt_is_read_as_generate_reads_it():
    """Logits after a left-padded prompt, on odd lengths."""
    model = tiny_exits("gemma3_text", recursions=2)
    ids, mask = left_padded((11, 3))
    decoder = DepthDecoder(model, [ExitSettings.from_options("confidence")] * 2, mask, max_length=12)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1]
        torch.testing.assert_close(decoder.prefill(ids), wanted, atol=LOGITS[torch.float32], rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_policy": "sure"}, r"Unknown exit policy 'sure'\. Use one of: head, confidence"),
        ({"exit_policy": "confidence", "num_beams": 2}, "works with one beam, and num_beams is 2"),
        (
            {"exit_policy": "confidence", "attention_mask": torch.tensor([[1, 1, 0]])},
            "padding elsewhere than on its left. Pad",
        ),
        (
            {"exit_policy": ExitSettings(make_policy("confidence"), layers=(9,))},
            r"layers=\(9,\) must be rising numbers",
        ),
        ({"exit_policy": ExitSettings(make_policy("head"), layers=(2,))}, "'head' works at recursion boundaries only"),
        ({"exit_policy": "confidence", "exit_depth": 0}, "exit_depth works neither with an exit policy nor"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    """One clear error each."""
    model = tiny_exits(recursions=2)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, pad_token_id=0, **arguments)


def test_models_that_cannot_exit_are_refused():
    """No heads for their policy, no boundaries, a fixed depth, an attention that takes no mask."""
    ids = random_ids(1, 3)
    with pytest.raises(ValueError, match="Policy 'head' needs exit heads, and the model has none"):
        tiny_exits(recursions=2, heads=False).generate(ids, exit_policy="head")
    with pytest.raises(ValueError, match="1 recursions in cycle sharing has no boundary to exit at"):
        tiny_exits(recursions=1, heads=False).generate(ids, exit_policy="confidence")
    model = tiny_exits(recursions=2)
    model.config.exit_depth = 0
    with pytest.raises(ValueError, match="set to exit after depth 0 always"):
        model.generate(ids, exit_policy="confidence")
    model = tiny_exits(recursions=2)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="and the model's is 'flex_attention'"):
        model.generate(ids, exit_policy="confidence")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_policy("confidence", 1.5), r"threshold 1\.5 is outside -1 \.\. 1, the range of policy 'confid"),
        (lambda: make_policy("confidence", float("nan")), "threshold nan is outside"),
        (lambda: make_policy("fixed", -1), r"threshold -1 is outside 0 \.\. inf"),
        (lambda: make_policy("confidence", [0.5, 2.0]), "threshold 2 is outside"),
        (lambda: ExitSettings(make_policy("head"), kv="lost"), r"Unknown kv 'lost'\. Use one of: deferred, copied"),
        (lambda: ExitSettings(make_policy("head"), max_pending=0), "max_pending must be at least 1, got 0"),
        (lambda: ExitSettings(make_policy("head"), decay=-1), "cannot be negative, got 0 and -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    """With the value and the range."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["shared", "low_rank", "full"])
@pytest.mark.parametrize("policy", ["confidence", "entropy", "divergence"])
def test_a_reduced_vocabulary_decides_and_the_whole_one_speaks(policy, kind):
    """Confidence is that of the first entries alone; what a token says is of all, and a batch is one by one."""
    model = tiny_exits(heads=False)
    model.add_exit_heads(kind)
    with torch.no_grad():
        for head in model.exit_heads:
            for parameter in head.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    chosen = make_policy(policy, THRESHOLDS[policy], vocabulary=50)
    counts = alone_and_together(model, ExitSettings(chosen))
    assert sum(count > 0 for count in counts) > 1

    ids = random_ids(2, 9)
    states = model.model(ids, exit_depths=(0,), use_cache=False).exit_states[0][:, -1]
    by_fifty, by_all = model.compute_exit_logits(0, states, 50), model.compute_exit_logits(0, states)
    torch.testing.assert_close(by_fifty, by_all[:, :50], atol=LOGITS[torch.float32], rtol=0)
    found = generate(model, ids, exit_policy=ExitSettings(make_policy(policy, -1.0, vocabulary=50)))
    assert torch.equal(found, generate(model, ids, exit_policy=ExitSettings(make_policy(policy, -1.0))))
    assert found[:, 9:].max() >= 50, "or the whole vocabulary would not have spoken"


def test_a_reduced_vocabulary_saves_the_readout_of_tokens_that_go_on():
    """No exit reads the whole head but for tokens that leave by it."""
    model = tiny_exits(recursions=2)
    read = []
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, output: read.append(len(inputs[0].flatten(0, -2)))
    )
    generate(model, random_ids(1, 9), exit_policy=ExitSettings(make_policy("confidence", 1.0, vocabulary=50)))
    hook.remove()
    assert sum(read) == STEPS


def test_a_vocabulary_that_means_nothing_is_refused():
    """A policy without logits, a single entry, more than there are."""
    with pytest.raises(ValueError, match=r"Policy 'head' does not use logits\. Leave vocabulary=50 out"):
        make_policy("head", vocabulary=50)
    with pytest.raises(ValueError, match="at least 2 entries of the vocabulary, got vocabulary=1"):
        make_policy("confidence", vocabulary=1)
    model = tiny_exits(recursions=2)
    with pytest.raises(ValueError, match="vocabulary=100000 is more than the model has"):
        generate(model, random_ids(1, 4), exit_policy=make_policy("confidence", vocabulary=100_000))


def test_thresholds_of_the_config_come_with_the_vocabulary_that_they_were_chosen_for():
    """Given by name; a threshold or a vocabulary of one's own stands alone."""
    config = tiny_exits(recursions=2).config
    config.exit_policy, config.exit_thresholds, config.exit_vocabulary = "confidence", [0.3], 50
    assert make_policy("confidence", config=config) == make_policy("confidence", [0.3], vocabulary=50)
    assert make_policy("confidence", config=config, vocabulary=50) == make_policy("confidence", [0.3], vocabulary=50)
    assert make_policy("confidence", 0.5, config) == make_policy("confidence", 0.5)
    assert make_policy("confidence", config=config, vocabulary=60).threshold == 0.9
    assert make_policy("entropy", config=config).vocabulary is None


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("policy", EXIT_POLICIES)
def test_a_step_waits_for_the_device_once_per_exit(policy, kv):
    """Decisions of all rows come over together, with which of them have ended; nothing else does."""
    model = tiny_exits()
    ids, mask = left_padded((9, 4, 7))
    decoder = DepthDecoder(model, [ExitSettings(make_policy(policy, THRESHOLDS[policy]), kv=kv)] * 3, mask, 100)
    tokens, goes_on = decoder.prefill(ids).argmax(-1), torch.ones(3, dtype=torch.bool)
    rows, fetches = [0, 1, 2], []
    for _ in range(12):
        with Waits() as waits:
            step = decoder.step(tokens, rows, goes_on)
            tokens, rows = step.logits.argmax(-1), step.rows
        reached = min(int(step.exits.max()) + 1, 3) if policy != "oracle" else 3
        fetches.append((waits.fetched, reached))
    assert all(fetched == exits for fetched, exits in fetches), fetches


def test_learning_thresholds_waits_for_nothing_more():
    """Samples stay on the device until the next generation begins."""
    model = tiny_exits(recursions=2)
    ids, mask = left_padded((9, 4, 7))
    settings = ExitSettings(make_policy("confidence"), adapt=AdaptiveThresholds(initial=0.02, minimum=2))
    decoder = DepthDecoder(model, [settings] * 3, mask, 100)
    tokens, goes_on = decoder.prefill(ids).argmax(-1), torch.ones(3, dtype=torch.bool)
    with Waits() as waits:
        for _ in range(12):
            tokens = decoder.step(tokens, [0, 1, 2], goes_on).logits.argmax(-1)
    assert waits.fetched == 12


def test_settings_are_made_from_options():
    config = tiny_exits().config
    settings = ExitSettings.from_options(
        "entropy", threshold=0.7, vocabulary=8, min_depth=1, kv="copied", config=config
    )
    assert settings == ExitSettings(make_policy("entropy", 0.7, vocabulary=8), kv="copied", min_depth=1)
    config.exit_kv = "latest"
    assert ExitSettings.from_options("head", max_pending=None, config=config).kv == "latest"
    assert ExitSettings.from_options(settings, kv="deferred", config=config) is settings
    assert ExitSettings.from_options(None, min_depth=0, max_pending=64) is None


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (None, {"threshold": 0.5, "min_depth": 1}, r"without a policy: threshold, min_depth\. Name a policy"),
        ("sure", {}, "Unknown exit policy 'sure'"),
        ("head", {"patience": 3}, "Unknown exit option 'patience'"),
        (make_policy("head"), {"threshold": 0.5}, "An exit policy and options of one"),
        (ExitSettings(make_policy("head")), {"min_depth": 1}, r"Exit settings and options \(min_depth\)"),
        (0.5, {}, "takes a name, a policy or ExitSettings"),
    ],
)
def test_options_that_make_no_settings(policy, options, message):
    with pytest.raises(ValueError, match=message):
        ExitSettings.from_options(policy, **options)


def test_the_exit_rule_is_one_for_numbers_and_tensors():
    torch.manual_seed(0)
    count = 500
    confidence = torch.rand(count)
    confidence[:50] = 0.5
    limits = ExitLimits(
        depth=torch.randint(0, 4, (count,)),
        last_depth=torch.full((count,), 3),
        threshold=torch.where(torch.rand(count) < 0.2, math.inf, 0.5),
        min_depth=torch.randint(0, 2, (count,)),
        pending=torch.randint(1, 5, (count,)),
        max_pending=torch.randint(1, 5, (count,)),
        forced_depth=torch.randint(-4, 4, (count,)),
    )
    found = decide_exits(confidence, limits)

    def rule(sure, depth, last_depth, threshold, min_depth, pending, max_pending, forced_depth):
        if depth >= last_depth:
            return True
        if forced_depth >= 0:
            return depth >= forced_depth
        return depth >= min_depth and pending <= max_pending and sure > threshold

    by_token = list(zip(*(values.tolist() for values in limits), strict=True))
    assert found.tolist() == [rule(sure, *numbers) for sure, numbers in zip(confidence.tolist(), by_token, strict=True)]
    numbers = [
        decide_exits(sure, ExitLimits(*token)) for sure, token in zip(confidence.tolist(), by_token, strict=True)
    ]
    assert found.tolist() == numbers
    assert {True, False} == set(numbers)
    on_meta = decide_exits(confidence.to("meta"), ExitLimits(*(values.to("meta") for values in limits)))
    assert (on_meta.dtype, on_meta.shape) == (torch.bool, (count,))


def test_generate_exits_by_the_one_rule(monkeypatch):
    """The engine's two paths: tests/engine/test_exit_rule.py."""
    model, inputs = tiny_exits(), torch.tensor([[5, 6, 7]])
    settings = ExitSettings(make_policy("confidence", 1.0))
    found = model.generate(inputs, exit_policy=settings, max_new_tokens=5, return_dict_in_generate=True)
    assert set(found.exit_depths[0, 1:].tolist()) == {3}
    monkeypatch.setattr("recursify.modeling.recursive_decoding.decide_exits", lambda _, limits: limits.depth >= 1)
    found = model.generate(inputs, exit_policy=settings, max_new_tokens=5, return_dict_in_generate=True)
    assert set(found.exit_depths[0, 1:].tolist()) == {1}
