"""Routers: what goes in and what does not, causal at inference, exact whatever the batch, padding and cache."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from helpers.tiny_models import random_ids, tiny_config, tiny_recursive
from helpers.tolerances import LOGITS
from recursify.evaluation.router_calibration import calibrate_thresholds
from recursify.modeling import (
    CACHE_ARGUMENT,
    ROUTED_KV,
    ROUTERS,
    LayerLayout,
    RecursiveConfig,
    RecursiveForCausalLM,
    RoutedCache,
)
from recursify.modeling.recursive_routing import (
    choose_above,
    choose_depths,
    choose_top_k,
    default_capacities,
    gated,
    tokens_of,
    warmed_up,
)

STEPS = 64
TRIALS = 100
MODES = [(kind, kv) for kind in ROUTERS for kv in ROUTED_KV]


def tiny_routed(family: str = "llama", kind: str = "expert_choice", recursions: int = 2, **fields):
    """One whose routers have opinions."""
    model = tiny_recursive(family, recursions)
    model.add_routers(kind, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in [*model.model.routers, *(model.model.auxiliary_routers or ())]:
            for parameter in router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of those lengths, and their mask."""
    ids = random_ids(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def forward(model, ids, mask=None, **more):
    """Logits and depths, without a cache."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        outputs = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **more)
        return model.compute_logits(outputs.last_hidden_state), outputs.routing.depths


def generate(model, ids, mask=None, **more):
    """Greedy, with the logits of each step and the depths of all tokens but the last."""
    cache = RoutedCache(model.config)
    arguments = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    asked = {"return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(ids) if mask is None else mask
    found = model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **{**arguments, **asked, **more})
    return found.sequences, torch.stack(found.logits, dim=1), cache


# --- Choosing ------------------------------------------------------------------------------------------------------


def test_capacities_and_counts():
    """``(R − r + 1)/R`` of the tokens, ``k = max(1, int(c·T))``."""
    assert default_capacities(3) == pytest.approx([1, 2 / 3, 1 / 3])
    assert default_capacities(2) == [1, 0.5]
    assert [tokens_of(capacity, 10) for capacity in (1, 0.5, 0.39, 0.01)] == [10, 5, 3, 1]


def test_capacity_warm_up_ends():
    """A cosine from 1 to the capacity, halfway in the middle; without steps, the capacity at once."""
    assert warmed_up(0.5, 0.0) == 1
    assert warmed_up(0.5, 0.5) == pytest.approx(0.75)
    assert warmed_up(0.5, 1.0) == 0.5
    assert warmed_up(0.5, 7.0) == 0.5
    assert warmed_up(0.5, math.inf) == 0.5


@pytest.mark.parametrize("trial", range(5))
def test_top_k_is_nested(trial):
    """Each depth takes exactly ``k``, the best, from those of the depth before."""
    generator = torch.Generator().manual_seed(trial)
    candidates = torch.ones(4, 23, dtype=torch.bool)
    for capacity in (1.0, 0.7, 0.31, 0.01):
        scores = torch.randn(4, 23, generator=generator)
        selected = choose_top_k(scores, candidates, capacity)
        assert selected.sum(-1).tolist() == [tokens_of(capacity, 23)] * 4
        assert not (selected & ~candidates).any()
        worst_in = scores.masked_fill(~selected, torch.inf).amin(-1)
        best_out = scores.masked_fill(selected | ~candidates, -torch.inf).amax(-1)
        assert (worst_in > best_out).all()
        candidates = selected


def test_top_k_of_fewer_candidates():
    """All of them, and nothing else, where they are fewer than ``k``."""
    candidates = torch.tensor([[False, False, True, True, False]])
    assert torch.equal(choose_top_k(torch.zeros(1, 5), candidates, 0.8), candidates)


def test_thresholds_include_even_odds():
    """A router that has learnt nothing scores 0.5, which is enough."""
    logits = torch.tensor([[0.0, -1e-3, 1e-3, 5.0]])
    candidates = torch.tensor([[True, True, True, False]])
    assert choose_above(logits, candidates, 0.5).tolist() == [[True, False, True, False]]
    assert torch.equal(choose_above(logits, candidates, None), candidates)


def test_depth_choice_has_a_bias_and_prefers_deep():
    """The bias moves the choice; of equal scores the deepest wins."""
    scores = torch.tensor([[[0.2, 0.5, 0.3], [1 / 3, 1 / 3, 1 / 3]]])
    assert choose_depths(scores, torch.zeros(3)).tolist() == [[1, 2]]
    assert choose_depths(scores, torch.tensor([0.4, 0.0, 0.0])).tolist() == [[0, 0]]


def test_gates_are_their_formulas():
    """``h + (1 + gate)(Block(h) − h)``, to the last bit Block(h) at 0; and ``h + gate · Block(h)``."""
    entered, made = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    gate = torch.rand(2, 5)
    wanted = entered + (1 + gate[..., None]) * (made - entered)
    torch.testing.assert_close(gated(entered, made, gate, "residual"), wanted)
    assert torch.equal(gated(entered, made, torch.zeros(2, 5), "residual"), made)
    torch.testing.assert_close(gated(entered, made, gate, "mor"), entered + gate[..., None] * made)


# --- What a routed model is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROUTERS)
def test_new_routers_change_nothing(family, kind):
    """Logits are the same to the last bit: with and without padding and a cache, and in training at full capacity."""
    for attention in ["sdpa", "eager"] if tiny_recursive(family)._supports_sdpa else ["eager"]:
        model = tiny_recursive(family)
        model.set_attn_implementation(attention)
        check_that_routers_change_nothing(model, kind)


def check_that_routers_change_nothing(model: RecursiveForCausalLM, kind: str) -> None:
    ids, mask = left_padded((9, 4))
    with torch.no_grad():
        before = [model(ids).logits, model(ids, attention_mask=mask).logits]
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        model.add_routers(kind)
        assert torch.equal(model(ids).logits, before[0])
        assert torch.equal(model(ids, use_cache=False).logits, before[0])
        assert torch.equal(model(ids, attention_mask=mask).logits, before[1])
        again = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, again)
        if kind == "expert_choice":
            model.add_routers(kind, router_capacities=[1.0, 1.0])
            assert torch.equal(model.train()(ids).logits, before[0])


@pytest.mark.parametrize("width", ["linear", "mlp", "wide_mlp"])
def test_every_width_starts_even(width):
    """An inner layer changes nothing of that, and has its size."""
    model = tiny_recursive()
    ids = random_ids(2, 9)
    before = model(ids).logits
    model.add_routers("expert_choice", router_width=width)
    assert torch.equal(model(ids).logits, before)
    inner = model.model.routers[0].inner
    assert (0 if inner is None else len(inner)) == {"linear": 0, "mlp": 64, "wide_mlp": 128}[width]


@pytest.mark.parametrize("recursions", [2, 4])
def test_training_takes_k_and_leaves_the_others_untouched(recursions):
    """Selected tokens nest, each depth has ``k``; a token that stays out has the state it had, to the last bit."""
    model = tiny_routed(recursions=recursions).train()
    outputs = model.model(random_ids(3, 21), use_cache=False, exit_depths=model.config.exit_depths)
    routing = outputs.routing
    for depth, selected in enumerate(routing.selected):
        assert selected.sum(-1).tolist() == [tokens_of(default_capacities(recursions)[depth], 21)] * 3
        assert not (selected & ~routing.candidates[depth]).any()
        if depth:
            assert torch.equal(routing.candidates[depth], routing.selected[depth - 1])
        if 0 < depth < recursions - 1:
            before, after = outputs.boundary_states[depth - 1 : depth + 1]
            assert torch.equal(before[~selected], after[~selected])
            assert not torch.isclose(before[selected], after[selected]).all(-1).any()


@pytest.mark.parametrize("kv", ROUTED_KV)
def test_a_recursion_is_the_block_on_its_tokens(kv):
    """By hand: the selected tokens alone, at their positions, in order, gated and put back."""
    model = tiny_routed(router_kv=kv).train()
    base, ids = model.model, random_ids(1, 12)
    with torch.no_grad():
        outputs = base(ids, use_cache=False, exit_depths=(0,))
        entered, selected = outputs.boundary_states[0], outputs.routing.selected[1][0]
        places = selected.nonzero()[:, 0]
        positions = torch.arange(12)[None]
        assert places.tolist() == sorted(places.tolist())
        keys = {}

        class Keys:
            def update(self, key, value, layer_idx, *_, **__):
                slot = model.config.layout.layer_ref(layer_idx)
                if kv == "shared":
                    return keys.setdefault(slot.index, (key, value))
                return key, value

        def block(states, at, depth):
            rotations = base.rotations(states, at)
            reach = torch.arange(12) if kv == "shared" else at[0]
            mask = torch.zeros(len(at[0]), len(reach)).masked_fill(reach > at[0][:, None], -torch.inf)[None, None]
            for layer in base.block:
                cache = {base.cache_argument: Keys()}
                states = layer(states, depth, attention_mask=mask, position_embeddings=rotations, **cache)
            return states

        first = base.embed_tokens(ids)
        first = base.prelude[0](first, position_embeddings=base.rotations(first, positions), attention_mask=None)
        block(first, positions, 0)
        alone = entered[:, places]
        logits = F.rms_norm(alone, alone.shape[-1:]) @ base.routers[1].weight[0]
        made = block(alone, places[None], 1)
        wanted = entered.clone()
        wanted[:, places] = made + (0.1 * (logits.sigmoid() - 0.5))[..., None] * (made - alone)
        last = base.coda[0](wanted, position_embeddings=base.rotations(wanted, positions), attention_mask=None)
    torch.testing.assert_close(base.norm(last), outputs.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_published_gates():
    """``mor``: expert choice adds the weighted block at each depth; token choice weights the last, beside ``h¹``."""
    model = tiny_routed(router_gate="mor", router_capacities=[1.0, 1.0])
    with torch.no_grad():
        outputs = model.model(random_ids(1, 9), use_cache=False, exit_depths=(0,))
        plain = tiny_recursive().model(random_ids(1, 9), use_cache=False, return_layer_states=True)
        entered, made = plain.layer_states[0], plain.layer_states[2]
        gate = 0.1 * outputs.routing.logits[0].sigmoid()[..., None]
        torch.testing.assert_close(outputs.boundary_states[0], entered + gate * made)

        routed = tiny_routed(kind="token_choice", router_gate="mor")
        outputs = routed.model(random_ids(1, 9), use_cache=False, exit_depths=(0,))
        score = outputs.routing.logits[0].softmax(-1)[..., :1]
        stops = (outputs.routing.depths == 0)[..., None]
        assert 0 < stops.sum() < 9
        wanted = torch.where(stops, entered + score * made, made)
        torch.testing.assert_close(outputs.boundary_states[0], wanted)


def block_tokens(model, call) -> int:
    """How many tokens the first shared layer is given."""
    seen = []
    original = model.model.run_layer

    def counting(position, states, **arguments):
        ref = model.model.layout.layer_ref(position)
        if ref.part == "block" and ref.index == 0:
            seen.append(states.shape[0] * states.shape[1])
        return original(position, states, **arguments)

    model.model.run_layer = counting
    try:
        call()
    finally:
        del model.model.run_layer
    return sum(seen)


def test_the_block_runs_on_its_tokens_alone():
    """In training ``1 + 2/3 + 1/3``; in prefill and decoding what the depths say."""
    model = tiny_routed(recursions=3)
    ids = random_ids(1, 30)
    assert block_tokens(model.train(), lambda: model.model(ids, use_cache=False)) == 30 + 20 + 10
    model.eval()
    found = []
    tokens = block_tokens(model, lambda: found.append(generate(model, ids)[2]))
    assert tokens == int((found[0].depths + 1).sum())
    assert tokens < 3 * found[0].depths.shape[1]
    assert block_tokens(model, lambda: forward(model, ids)) == int((forward(model, ids)[1] + 1).sum())


def test_shared_keys_are_projected_once():
    """Deeper recursions call no key or value projection where those are maps of their own."""
    model = tiny_routed(router_kv="shared")
    calls = []
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = model.model.block[0].self_attn.get_submodule(name)
        projection.register_forward_hook(lambda _, inputs, __, name=name: calls.append((name, inputs[1])))
    forward(model, random_ids(1, 9))
    assert sorted(calls) == [("k_proj", 0), ("q_proj", 0), ("q_proj", 1), ("v_proj", 0)]


# --- Causality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "kv"), MODES)
def test_nothing_leaks(family, kind, kv):
    """Another token at ``j`` changes no logit and no depth before ``j``, in a hundred random texts."""
    model = tiny_routed(family, kind, router_kv=kv)
    ids = random_ids(TRIALS, 24, seed=3)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(1, 24, (TRIALS,), generator=generator)
    other = ids.clone()
    other[torch.arange(TRIALS), places] = (ids[torch.arange(TRIALS), places] + 7) % 250 + 2
    (logits, depths), (other_logits, other_depths) = forward(model, ids), forward(model, other)
    before = torch.arange(24) < places[:, None]
    assert torch.equal(depths[before], other_depths[before])
    torch.testing.assert_close(logits[before], other_logits[before], atol=1e-5, rtol=0)
    assert len(depths.unique()) == 2, "or all tokens went the same way, and the test would say nothing"
    assert not torch.equal(depths, other_depths)


def test_training_leaks():
    """The best ``k`` of a sequence depend on later tokens: the reason why inference has thresholds."""
    model = tiny_routed().train()
    ids = random_ids(50, 24, seed=3)
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 7) % 250 + 2
    (logits, _), (other_logits, _) = forward(model, ids), forward(model, other)
    assert (logits[:, :-1] - other_logits[:, :-1]).abs().max() > 0.01


# --- Caches, batches, padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "kv"), [("expert_choice", "recursion_wise"), ("token_choice", "shared")])
def test_cached_is_uncached(family, kind, kv):
    """Sixty-four steps: each step's logits, and every token's depth, are those of one forward over the whole text."""
    model = tiny_routed(family, kind, router_kv=kv)
    ids = random_ids(2, 7)
    sequences, logits, cache = generate(model, ids)
    whole, depths = forward(model, sequences)
    torch.testing.assert_close(logits, whole[:, 6:-1], atol=LOGITS[torch.float32], rtol=0)
    assert torch.equal(cache.depths, depths[:, :-1])
    assert len(depths[:, 7:].unique()) == 2


@pytest.mark.parametrize("recursions", [3, 4])
@pytest.mark.parametrize(("kind", "kv"), MODES)
def test_batched_is_one_by_one(kind, kv, recursions):
    """Rows of unlike lengths, padded on the left, go on as each would alone: tokens, logits and depths."""
    model = tiny_routed(kind=kind, recursions=recursions, router_kv=kv)
    lengths = (9, 4, 7)
    ids, mask = left_padded(lengths)
    sequences, logits, cache = generate(model, ids, mask)
    for row, length in enumerate(lengths):
        alone, alone_logits, alone_cache = generate(model, ids[row : row + 1, -length:])
        assert torch.equal(sequences[row, -length - STEPS :], alone[0])
        torch.testing.assert_close(logits[row], alone_logits[0], atol=LOGITS[torch.float32], rtol=0)
        assert torch.equal(cache.depths[row, 9 - length :], alone_cache.depths[0])
        assert (cache.depths[row, : 9 - length] == -1).all()
    assert len(cache.depths.unique()) == recursions + 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "kv"), MODES)
def test_padded_is_unpadded(kind, kv, attention):
    """On the left or on the right, without a cache."""
    model = tiny_routed(kind=kind, recursions=4, router_kv=kv)
    model.set_attn_implementation(attention)
    lengths = (12, 5, 8)
    for ids, mask in (left_padded(lengths), tuple(part.flip(-1) for part in left_padded(lengths))):
        logits, depths = forward(model, ids, mask)
        for row in range(3):
            there = mask[row].bool()
            alone, alone_depths = forward(model, ids[row : row + 1, there])
            torch.testing.assert_close(logits[row, there], alone[0], atol=LOGITS[torch.float32], rtol=0)
            assert torch.equal(depths[row, there], alone_depths[0])
            assert (depths[row, ~there] == -1).all()


def test_sampling_and_several_sequences():
    """Seeded sampling of several continuations runs, and is the same again."""
    model = tiny_routed()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        ids, mask = left_padded((6, 4))
        more = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12, "pad_token_id": 0}
        found.append(model.generate(ids, attention_mask=mask, **more))
    assert found[0].shape == (4, 18)
    assert torch.equal(*found)


def test_beams_with_token_choice():
    """Beams change places in the cache with all that they hold."""
    model = tiny_routed(kind="token_choice")
    ids, mask = left_padded((6, 4))
    more = {"num_beams": 3, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **more), model.generate(ids, use_cache=False, **more))


@pytest.mark.parametrize("recursions", [2, 3, 4])
@pytest.mark.parametrize("kv", ROUTED_KV)
def test_cache_bytes(recursions, kv):
    """At the nominal capacities ``(R+1)/2R`` of a full cache's bytes over the looped layers, shared ``1/R``."""
    model = tiny_routed(recursions=recursions, router_kv=kv)
    ids = random_ids(1, 24)
    thresholds = calibrate_thresholds(model, [ids])
    assert thresholds[0] == 0
    assert forward(model, ids)[1].add(1).sum() == sum(int(c * 24) for c in default_capacities(recursions))
    cache, dense = RoutedCache(model.config), DynamicCache()
    with torch.no_grad():
        model.model(ids, past_key_values=cache, use_cache=True)
        tiny_recursive(recursions=recursions).model(ids, past_key_values=dense, use_cache=True)
    layout = model.config.layout
    looped = [position for position, slot in enumerate(layout.layer_refs()) if slot.part == "block"]
    there = sum(store[p].nbytes for store in (cache.keys, cache.values) for p in looped if p in store)
    everything = sum(dense.layers[p].keys.nbytes + dense.layers[p].values.nbytes for p in looped)
    wanted = (recursions + 1) / (2 * recursions) if kv == "recursion_wise" else 1 / recursions
    assert there == pytest.approx(wanted * everything, rel=1e-6)


def test_calibrated_thresholds_meet_other_capacities():
    """Loads are as asked for on the text that they were chosen on, with an auxiliary router as well."""
    ids = [random_ids(2, 40, seed=seed) for seed in range(3)]
    for decision in ("own", "auxiliary"):
        model = tiny_routed(recursions=4, router_decision=decision)
        calibrate_thresholds(model, ids, [0.9, 0.5, 0.5, 0.2])
        depths = torch.cat([forward(model, each)[1] for each in ids])
        assert [int((depths >= depth).sum()) for depth in range(4)] == [216, 120, 120, 48]


def test_auxiliary_router_decides_and_learns_alone():
    """In inference its score counts; in training the first router's, and states are not taught through it."""
    model = tiny_routed(router_decision="auxiliary")
    ids = random_ids(2, 16)
    outputs = model.model(ids, use_cache=False).routing
    assert torch.equal(outputs.selected[1], outputs.deciding[1] >= 0)
    routing = model.train().model(ids, use_cache=False).routing
    assert torch.equal(routing.selected[1], choose_top_k(routing.logits[1], routing.candidates[1], 0.5))
    sum(each.sum() for each in routing.deciding).backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None} == {"auxiliary_routers"}


def test_a_random_router_has_its_capacities():
    """The control: about half of the tokens in the second recursion, whatever they are, ungated."""
    model = tiny_recursive()
    model.add_routers("expert_choice", router_width="random")
    depths = forward(model, random_ids(20, 100))[1]
    assert float(depths.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert not [name for name, _ in model.named_parameters() if "router" in name]


@pytest.mark.parametrize(("kind", "kv"), MODES)
def test_saved_is_loaded(tmp_path, kind, kv):
    """Config, routers and logits, to the last bit."""
    model = tiny_routed(kind=kind, router_kv=kv)
    model.save_pretrained(tmp_path)
    loaded = RecursiveForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.router, loaded.config.router_kv) == (kind, kv)
    ids = random_ids(2, 13)
    assert torch.equal(forward(model, ids)[0], forward(loaded, ids)[0])


def test_gradients_reach_routers_and_survive_checkpointing():
    """Activation checkpointing changes no gradient, and every router gets some."""
    grads = []
    for checkpointed in (False, True):
        model = tiny_routed(recursions=4).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(random_ids(2, 16), labels=random_ids(2, 16)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=lambda m, n=name: f"{n}: {m}")
        if "routers" in name:
            assert grad.abs().max() > 0


def test_packed_documents_do_not_see_one_another():
    """A routed row of two documents is what each of them is alone."""
    model = tiny_routed(recursions=4)
    ids = random_ids(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model.model(ids, position_ids=positions, use_cache=False)
    for part in (slice(0, 12), slice(12, 20)):
        alone, depths = forward(model, ids[:, part])
        torch.testing.assert_close(
            model.compute_logits(packed.last_hidden_state)[:, part], alone, atol=LOGITS[torch.float32], rtol=0
        )
        assert torch.equal(packed.routing.depths[:, part], depths)


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mine", {}, "Unknown router 'mine'. Use one of: expert_choice, token_choice"),
        ("expert_choice", {"router_gate": "add"}, "Unknown router_gate 'add'. Use one of: residual, mor"),
        ("expert_choice", {"router_capacity": [1]}, "Unknown router field 'router_capacity'. Use one of: router_width"),
        ("expert_choice", {"router_capacities": [0.5, 0.7]}, r"rise from 0\.5 to 0\.7 at depth 1"),
        ("expert_choice", {"router_capacities": [1.0, 0.0]}, "0 at depth 1 leaves no token"),
        ("expert_choice", {"router_capacities": [1.5, 0.5]}, r"1\.5 at depth 0 leaves more tokens than there are"),
        ("expert_choice", {"router_capacities": [1.0]}, "has 1 values, and the model 2 recursions"),
        (
            "expert_choice",
            {"router_activation": "softmax"},
            "would look at later ones. Use router_activation sigmoid",
        ),
        ("expert_choice", {"router_thresholds": [0.5]}, "router_thresholds has 1 values, and the model 2"),
        ("expert_choice", {"router_thresholds": [0.5, 2]}, "must be between 0 and 1"),
        ("expert_choice", {"router_temperature": 0.0}, "router_temperature must be above 0, got 0"),
        (
            "token_choice",
            {"router_capacities": [1.0, 0.5]},
            "are for expert_choice: in token_choice every",
        ),
        ("token_choice", {"router_thresholds": [0.5, 0.5]}, "in token_choice every token chooses, without a threshold"),
        ("token_choice", {"router_width": "random"}, "A random router and an auxiliary one are for expert_choice"),
    ],
)
def test_bad_fields_are_refused(kind, fields, message):
    """Naming what is wrong; the model stays as it was."""
    model = tiny_recursive()
    with pytest.raises(ValueError, match=message):
        model.add_routers(kind, **fields)
    assert model.config.router is None
    assert model.model.routers is None
    with pytest.raises(
        ValueError, match=message.replace("router field", "config key").replace(". Use one of: router_width", "")
    ):
        RecursiveConfig.from_dense(tiny_config("llama"), model.config.layout, router=kind, **fields)


def test_layouts_without_boundaries_are_refused():
    """Sequence sharing, and one recursion."""
    for sharing, recursions in (("sequence", 2), ("cycle", 1)):
        layout = LayerLayout.fold(6, recursions, sharing)
        with pytest.raises(ValueError, match=f"{recursions} recursions in {sharing} sharing has no boundary"):
            RecursiveConfig.from_dense(tiny_config("llama"), layout, router="expert_choice")


def test_keys_of_unlike_layers_are_not_shared():
    """A window at one depth and none at the next."""
    model = tiny_recursive("gemma3_text", recursions=4)
    with pytest.raises(ValueError, match="attend in different ways"):
        model.add_routers("expert_choice", router_kv="shared")


def test_calls_that_cannot_be_routed_are_refused():
    """Other caches and attention, beams, assistants, exits, layer states, checkpointing with shared keys."""
    model, ids = tiny_routed(), random_ids(1, 6)
    with pytest.raises(ValueError, match=r"needs a RoutedCache, and got a DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"num_beams is 4, and the routers are expert_choice"):
        model.generate(ids, num_beams=4, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation does not work with routers"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens does not work with routers"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="routers decide how far a token goes"):
        model.generate(ids, exit_policy="confidence", max_new_tokens=2)
    with pytest.raises(ValueError, match="return_layer_states: a routed model's layers run on different tokens"):
        model.model(ids, return_layer_states=True)
    with pytest.raises(ValueError, match="The cache has 1 rows, and the call has 2"):
        model(random_ids(2, 3), past_key_values=generate(model, ids, max_new_tokens=3)[2])
    with pytest.raises(ValueError, match="routers, which were trained for 2 recursions"):
        model.with_recursions(3)
    with pytest.raises(ValueError, match="anderson=2 mixes loops of all tokens"):
        tiny_recursive().with_recursions(4, anderson=2).add_routers("expert_choice")
    model = tiny_routed(router_kv="shared").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="'shared' and activation checkpointing exclude one another"):
        model(ids)
