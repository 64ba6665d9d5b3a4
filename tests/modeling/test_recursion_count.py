"""Fewer or more recursions than a model was made with: the same weights, other depths, mixed loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from helpers.tiny_models import FAMILIES, random_ids, tiny_config, tiny_recursive
from helpers.tolerances import LOGITS
from recursify.convert.export import FORMATS, export_model
from recursify.errors import PlanError
from recursify.modeling import LayerLayout, RecursiveConfig, RecursiveForCausalLM, make_policy
from recursify.modeling.modeling_recursive_anderson import LoopMixing, anderson_mix, repetitions
from recursify.modeling.recursion_count import spread_depths, spread_exits

TOLERANCE = LOGITS[torch.float32]
STEPS = 64


def logits(model: nn.Module, ids: torch.Tensor, **more) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **more).logits


def greedy(model: nn.Module, ids: torch.Tensor, **more) -> torch.Tensor:
    return model.generate(ids, do_sample=False, pad_token_id=0, **{"max_new_tokens": STEPS, **more})


def own_parameters(model: RecursiveForCausalLM) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


# --- Depths ------------------------------------------------------------------------------------------------------


def test_depths_are_spread_over_those_there_are():
    """Each begins in the old depth whose time it begins in; an exit is that at which its time ends."""
    assert [spread_depths(n, 2) for n in (1, 2, 3, 4)] == [[0], [0, 1], [0, 0, 1], [0, 0, 1, 1]]
    assert spread_depths(2, 4) == [0, 2]
    assert spread_exits(2, 4) == [1]
    assert spread_exits(4, 2) == [0, 0, 0]
    assert spread_exits(4, 4) == [0, 1, 2]
    assert spread_exits(1, 4) == []


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_as_many_recursions_are_the_same_model(family, sharing):
    """To the bit, with as many parameters and the same config."""
    model = tiny_recursive(family, sharing=sharing, varied=True)
    same = model.with_recursions(2)
    ids = random_ids(2, 19)
    assert torch.equal(logits(same, ids), logits(model, ids))
    assert sum(p.numel() for p in same.parameters()) == sum(p.numel() for p in model.parameters())
    assert same.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("sharing", ["cycle", "middle_sequence"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_depth_takes_what_its_old_one_had(family, sharing, count):
    """The layer at a position equals the old one's at the position that it stands for: weights, window, RoPE, index."""
    model = tiny_recursive(family, sharing=sharing, seed=1, varied=True)
    other = model.with_recursions(count, residual_scale=1)
    layout, depths = other.config.layout, spread_depths(count, 2)
    states, ids = torch.randn(1, 11, 32), torch.arange(11)[None]
    for index in range(layout.block_size):
        for depth, source in enumerate(depths):
            at, was = layout.position(index, depth), model.config.layout.position(index, source)
            results = []
            for each, position, d in ((other, at, depth), (model, was, source)):
                kind = each.model.layer_type(position)
                assert kind == model.model.layer_type(was)
                rotations = each.model.rotations(states, ids)
                rotations = rotations[kind] if isinstance(rotations, dict) else rotations
                with torch.inference_mode():
                    results.append(each.model.block[index](states, d, position_embeddings=rotations))
            assert torch.equal(*results)
    indices = {module.layer_idx for module in other.modules() if hasattr(module, "layer_idx")}
    assert sorted(indices) == list(range(layout.num_layers))


@pytest.mark.parametrize("tie_norms", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_shared_weights_are_the_same_memory(count, tie_norms):
    """Only what a depth has of its own is copied, and no parameter has two names."""
    model = tiny_recursive("qwen2", tie_norms=tie_norms, varied=True)
    other = model.with_recursions(count)
    before, after = own_parameters(model), own_parameters(other)
    shared = {name for name in after if name in before and after[name].data_ptr() == before[name].data_ptr()}
    own = {name for name in after if "lora_" in name or (not tie_norms and ("copies" in name or "bias" in name))}
    own = {name for name in own if name.startswith("model.block")}
    assert shared == after.keys() - own
    assert len({parameter.data_ptr() for parameter in after.values()}) == len(after)
    per_depth = sum(p.numel() for name, p in before.items() if name in own or "copies.1" in name) // 2
    if tie_norms:
        per_depth = sum(p.numel() for name, p in before.items() if "lora_" in name) // 2
    wanted = sum(p.numel() for p in model.parameters()) + (count - 2) * per_depth
    assert sum(parameter.numel() for parameter in other.parameters()) == wanted
    with torch.no_grad():
        model.model.block[0].mlp.down_proj.linear.weight.zero_()
    assert not other.model.block[0].mlp.down_proj.linear.weight.any()


def test_tied_embeddings_stay_one_parameter():
    """Gemma's head is its embedding, in the new model, too."""
    other = tiny_recursive("gemma", varied=True).with_recursions(3)
    assert other.lm_head.weight is other.model.embed_tokens.weight


# --- The step ----------------------------------------------------------------------------------------------------


def explicitly(model: RecursiveForCausalLM, ids: torch.Tensor, depths: list[int], scale: float) -> torch.Tensor:
    """Logits of a cycle, by a loop over the layers of ``model``."""
    base = model.model
    states = base.embed_tokens(ids)
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    arguments = {
        "attention_mask": mask,
        "position_embeddings": base.rotary_emb(states, torch.arange(length)[None]),
    }
    for layer in base.prelude:
        states = layer(states, **arguments)
    for depth in depths:
        for layer in base.block:
            states = states + scale * (layer(states, depth, **arguments) - states)
    for layer in base.coda:
        states = layer(states, **arguments)
    return model.lm_head(base.norm(states))


@pytest.mark.parametrize(
    ("count", "depths", "scale"), [(1, [0], 2.0), (2, [0, 1], 1.0), (3, [0, 0, 1], 2 / 3), (4, [0, 0, 1, 1], 0.5)]
)
def test_automatic_scale_is_the_euler_step(count, depths, scale):
    """``h + R/n · (layer(h) - h)`` for every shared layer, and for no other (2310.12818)."""
    model = tiny_recursive(varied=True)
    other = model.with_recursions(count)
    assert other.config.residual_scale == scale
    ids = random_ids(2, 9)
    with torch.inference_mode():
        wanted = explicitly(model, ids, depths, scale)
        unscaled = explicitly(model, ids, depths, 1.0)
    assert (logits(other, ids) - wanted).abs().max() < TOLERANCE
    assert (logits(model.with_recursions(count, residual_scale=1), ids) - unscaled).abs().max() < TOLERANCE
    if scale != 1:
        assert (wanted - unscaled).abs().max() > 100 * TOLERANCE


def test_a_step_of_nearly_nothing_leaves_the_states():
    """A scale of 1e-6: the block passes on what it is given."""
    model = tiny_recursive(residual_scale=1e-6, varied=True)
    states = model.model(random_ids(1, 9), return_layer_states=True).layer_states
    torch.testing.assert_close(states[4], states[0], atol=1e-4, rtol=0)


def test_recorded_hidden_states_are_scaled():
    """What transformers records is what goes on to the next layer."""
    model = tiny_recursive(varied=True).with_recursions(4)
    ids = random_ids(1, 9)
    with torch.inference_mode():
        recorded = model(ids, output_hidden_states=True).hidden_states
        passed_on = model.model(ids, return_layer_states=True).layer_states
    assert all(torch.equal(one, two) for one, two in zip(recorded[1:-1], passed_on[:-1], strict=True))


def test_going_on_from_another_number_keeps_the_time():
    """From 4 to 2 to 1: depths and scale are those of going at once."""
    model = tiny_recursive(recursions=4, varied=True)
    detour, at_once = model.with_recursions(2).with_recursions(1), model.with_recursions(1)
    assert detour.config.to_dict() == at_once.config.to_dict()
    assert detour.config.depth_map == [0]
    ids = random_ids(2, 9)
    assert torch.equal(logits(detour, ids), logits(at_once, ids))
    assert model.with_recursions(2).with_recursions(4).config.depth_map == [0, 0, 2, 2]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_with_checkpointing_are_those_without(count):
    """A scaled step is recomputed as it was."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny_recursive(varied=True).with_recursions(count).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        ids = random_ids(2, 9)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


# --- An ordinary model -------------------------------------------------------------------------------------------

VARIANTS = [
    ("middle_cycle", 1, 0),
    ("middle_cycle", 4, 0),
    ("middle_cycle", 4, 2),
    ("middle_sequence", 3, 0),
    ("middle_sequence", 6, 2),
]


@pytest.mark.parametrize(("sharing", "count", "anderson"), VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "gpt_neox"])
def test_cached_and_padded_decoding(family, sharing, count, anderson):
    """64 greedy steps: with a cache as without, and every row of a left-padded batch as alone."""
    model = tiny_recursive(family, sharing=sharing, varied=True).with_recursions(count, anderson=anderson)
    lengths = (9, 4, 7)
    ids = random_ids(3, 9)
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]).long()
    together = greedy(model, ids * mask, attention_mask=mask)
    assert torch.equal(greedy(model, ids * mask, attention_mask=mask, use_cache=False), together)
    for row, length in enumerate(lengths):
        assert torch.equal(greedy(model, ids[row : row + 1, -length:])[0], together[row, -length - STEPS :])


@pytest.mark.parametrize("anderson", [0, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_logits(family, anderson):
    """Over several steps, past the sliding windows, in every family."""
    model = tiny_recursive(family, varied=True).with_recursions(6, residual_scale=1, anderson=anderson)
    ids = random_ids(2, 17)
    whole = logits(model, ids)
    with torch.inference_mode():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        for step in range(5, 17):
            found = model(ids[:, step : step + 1], past_key_values=cache).logits[:, 0]
            assert (found - whole[:, step]).abs().max() < TOLERANCE


@pytest.mark.parametrize(("count", "anderson"), [(1, 0), (4, 2)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "smollm3", "gpt_neox"])
def test_saved_and_loaded(family, count, anderson, tmp_path):
    """The same logits, from a folder that holds every tensor once."""
    model = tiny_recursive(family, varied=True).with_recursions(count, anderson=anderson)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 12)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.config.anderson == anderson
    assert loaded.config.depth_map == spread_depths(count, 2)
    assert (tmp_path / "modeling_recursive_anderson.py").exists() == (anderson > 0)


def test_exits_and_speculation_go_on():
    """Exit heads follow, thresholds that were chosen for other exits do not; drafts and checks agree."""
    model = tiny_recursive(recursions=4, varied=True)
    model.add_exit_heads("norm")
    with torch.no_grad():
        for number, head in enumerate(model.exit_heads):
            head.test.bias.fill_(number)
    model.config.exit_policy, model.config.exit_thresholds = "confidence", [0.1, 0.2, 0.3]
    same, fewer, more = (model.with_recursions(count) for count in (4, 2, 8))
    assert same.config.exit_thresholds == [0.1, 0.2, 0.3]
    assert fewer.config.exit_thresholds is more.config.exit_thresholds is more.config.exit_policy is None
    assert [float(head.test.bias.detach()) for head in fewer.exit_heads] == [1]
    assert [float(head.test.bias.detach()) for head in more.exit_heads] == [0, 0, 1, 1, 2, 2, 2]
    assert model.with_recursions(1).exit_heads is None
    ids = random_ids(2, 7)
    for other in (fewer, more):
        whole = greedy(other, ids)
        assert torch.equal(greedy(other, ids, speculate=True), whole)
        assert torch.equal(greedy(other, ids, exit_policy=make_policy("confidence", 1.0)), whole)
    assert greedy(fewer, ids, exit_policy=make_policy("head", 0.5)).shape == (2, 7 + STEPS)


def test_unscaled_recursions_export(tmp_path):
    """A dense model of as many layers as run."""
    tiny_recursive(varied=True).with_recursions(4, residual_scale=1).save_pretrained(tmp_path / "four")
    assert export_model(tmp_path / "four", tmp_path / "dense").max_logit_difference < TOLERANCE
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.num_hidden_layers == 10


# --- Mixing loops ------------------------------------------------------------------------------------------------


def contraction(width: int = 48, rate: float = 0.9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x -> A x + b`` with eigenvalues of ``A`` from 0 to ``rate``, and its fixed point."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    matrix = (basis * torch.linspace(0, rate, width)) @ basis.T
    offset = torch.randn(width, generator=generator)
    return matrix, offset, torch.linalg.solve(torch.eye(width) - matrix, offset)


def loops_to(error: float, history: int) -> int:
    """Loops until a linear block is as near its fixed point, relatively, for every token."""
    matrix, offset, fixed = contraction()
    states = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    for loop in range(500):
        entered.append(states)
        left.append(states @ matrix.T + offset)
        states = anderson_mix(entered[-history - 1 :], left[-history - 1 :])
        if (states - fixed).norm(dim=-1).max() < error * fixed.norm():
            return loop + 1
    raise AssertionError("does not converge")


def test_mixing_reaches_a_fixed_point_sooner():
    """Plain loops take as many as the slowest eigenvalue says; mixing four takes a third of that."""
    assert loops_to(1e-3, 0) > 50
    assert loops_to(1e-3, 2) < 0.6 * loops_to(1e-3, 0)
    assert loops_to(1e-3, 4) < 0.4 * loops_to(1e-3, 0)


def test_mixing_one_loop_is_that_loop():
    """To the bit; so it is where loops have come to rest."""
    entered, left = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert anderson_mix([entered], [left]) is left
    assert torch.equal(anderson_mix([entered, left, left], [left, left, left]), left)
    assert torch.equal(anderson_mix([left, left], [left, left]), left)


def test_mixing_two_loops_is_the_secant():
    """In one dimension: the zero of the line through two residuals, so a linear map's fixed point, save the ridge."""
    block = lambda x: 0.8 * x + 1  # noqa: E731
    first = torch.tensor([[[0.0]], [[20.0]]])
    second = block(first)
    torch.testing.assert_close(
        anderson_mix([first, second], [block(first), block(second)]), torch.full_like(first, 5.0), atol=5e-3, rtol=0
    )


def test_no_token_sees_another():
    """Changing one token's states changes what is mixed for it alone, and half precision comes back as such."""
    entered, left = [list(torch.randn(3, 2, 5, 16)) for _ in range(2)]
    before = anderson_mix(entered, left)
    left[1] = left[1].clone()
    left[1][1, 2] += 1
    changed = (anderson_mix(entered, left) != before).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]
    half = anderson_mix([state.bfloat16() for state in entered], [state.bfloat16() for state in left])
    assert half.dtype == torch.bfloat16


def test_later_tokens_do_not_change_earlier_ones():
    """Mixing is causal."""
    model = tiny_recursive(varied=True).with_recursions(6, anderson=2)
    ids = random_ids(1, 12)
    before = logits(model, ids)
    ids[0, 8] = (ids[0, 8] + 1) % 200 + 2
    after = logits(model, ids)
    assert torch.equal(after[:, :8], before[:, :8])
    assert not torch.equal(after[:, 8:], before[:, 8:])


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
def test_a_model_mixes_the_loops_that_repeat(sharing):
    """As an explicit loop: anew where another depth begins, and in a sequence for every layer."""
    model = tiny_recursive(sharing=sharing, recursions=2, varied=True).with_recursions(6, residual_scale=1)
    mixed = model.with_recursions(6, residual_scale=1, anderson=2)
    assert repetitions(mixed.config) == [0, 1, 2, 0, 1, 2]
    ids, length = random_ids(1, 9), 9
    base = model.model
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        states = base.embed_tokens(ids)
        arguments = {
            "attention_mask": mask,
            "position_embeddings": base.rotary_emb(states, torch.arange(length)[None]),
        }
        blocks = [[layer] for layer in base.block] if sharing == "sequence" else [list(base.block)]
        for block in blocks:
            for depth in range(6):
                if depth % 3 == 0:
                    entered, left = [], []
                entered.append(states)
                for layer in block:
                    states = layer(states, depth, **arguments)
                left.append(states)
                states = anderson_mix(entered, left)
        wanted = model.lm_head(base.norm(states))
    assert (logits(mixed, ids) - wanted).abs().max() < TOLERANCE
    assert (logits(model, ids) - wanted).abs().max() > 100 * TOLERANCE


def test_history_is_as_long_as_asked():
    """With one earlier loop, the third forgets the first."""
    layout = LayerLayout.fold(3, 3, "cycle")
    mixing = LoopMixing(layout, [0, 1, 2], 1)
    entered, left = [list(torch.randn(3, 1, 4, 8)) for _ in range(2)]
    for slot, before, after in zip(layout.layer_refs(), entered, left, strict=True):
        found = mixing.after(slot, before, after)
    assert torch.equal(found, anderson_mix(entered[1:], left[1:]))


def test_depths_without_parameters_of_their_own_are_one_map():
    """Rank 0 and tied norms: all recursions repeat, unless their layers are of other kinds."""
    bare = {"lora_rank": 0, "tie_norms": True}
    assert repetitions(tiny_recursive("llama", 3, "cycle", varied=True, **bare).config) == [0, 1, 2]
    assert repetitions(tiny_recursive("llama", 3, "cycle", varied=True).config) == [0, 0, 0]
    assert repetitions(tiny_recursive("llama", 3, "cycle", lora_rank=0, varied=True).config) == [0, 0, 0]
    # Windows of every second layer: a block of three layers meets them at other places in every recursion.
    assert repetitions(tiny_recursive("gemma3_text", 2, "cycle", varied=True, **bare).config) == [0, 0]
    assert repetitions(tiny_recursive("gemma3_text", 3, "cycle", varied=True, **bare).config) == [0, 1, 2]


def test_mixing_compiles_in_one_graph():
    """No graph break, with the same logits."""
    model = tiny_recursive(varied=True).with_recursions(4, anderson=2)
    torch._dynamo.reset()
    ids = random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        difference = (compiled(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max()
    assert difference < TOLERANCE


# --- What cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_recursions": 0}, r"A model has at least 1 recursion, got 0\."),
        ({"num_recursions": 3, "residual_scale": -1.0}, r"residual_scale must be a positive number, got -1\.0\."),
        ({"num_recursions": 3, "residual_scale": 0}, r"residual_scale must be a positive number, got 0\."),
        ({"num_recursions": 3, "anderson": -1}, r"anderson must be a number of loops, 0 for none; got -1\."),
        (
            {"num_recursions": 2, "anderson": 2},
            r"anderson=2 mixes loops that repeat a depth, and of 2 recursions none does\. Take more recursions than",
        ),
    ],
)
def test_wrong_values(arguments, message):
    """One clear error each, and the model is as it was."""
    model = tiny_recursive(varied=True)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.with_recursions(**arguments)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("depth_map", [[0], [1, 0], [-1, 0]])
def test_a_map_edited_by_hand(depth_map):
    """It has one rising depth per recursion."""
    with pytest.raises(ValueError, match=r"depth_map \[.*\] is not one rising depth for each of 2 recursions"):
        RecursiveConfig.from_dense(tiny_config("llama"), LayerLayout.fold(6, 2, "cycle"), depth_map=depth_map)


def test_mixing_refuses_what_stops_between_loops():
    """Exit policies and speculation."""
    model = tiny_recursive(varied=True).with_recursions(4, anderson=2)
    for shortcut in ({"exit_policy": "confidence"}, {"speculate": True}):
        with pytest.raises(ValueError, match=r"mixes loops \(anderson=2\).*with_recursions\(\.\.\., anderson=0"):
            greedy(model, random_ids(1, 5), **shortcut)


@pytest.mark.parametrize("export", FORMATS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_recursions": 1}, r"scales its layers' updates by 2, which stock layers cannot"),
        (
            {"num_recursions": 4, "residual_scale": 1, "anderson": 2},
            r"mixes 2 earlier recursions into each one, which",
        ),
    ],
)
def test_stock_layers_neither_scale_nor_mix(tmp_path, export, arguments, message):
    """The export says so and writes nothing."""
    tiny_recursive(sharing="cycle", varied=True).with_recursions(**arguments).save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=message):
        export_model(tmp_path / "model", tmp_path / "out", format=export)
    assert not (tmp_path / "out").exists()
