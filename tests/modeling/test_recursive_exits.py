"""Exit heads: what they read out, what they keep on disk, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import random_ids, tiny_config, tiny_recursive
from helpers.tolerances import LOGITS
from recursify.modeling import EXIT_HEADS, ExitHead, LayerLayout, RecursiveConfig, RecursiveForCausalLM


def exits(model: RecursiveForCausalLM, ids: torch.Tensor, **arguments):
    """Boundary and exit states at every depth."""
    depths = model.config.exit_depths
    return model.model(ids, use_cache=False, exit_depths=depths, **arguments)


@pytest.mark.parametrize("kind", EXIT_HEADS)
def test_a_new_head_reads_out_as_the_model_does(family, kind):
    """Through the coda, an exit after depth d is the model run with d + 1 recursions."""
    model = tiny_recursive(family, recursions=2)
    model.add_exit_heads(kind, rank=3)
    ids = random_ids(2, 9)
    with torch.no_grad():
        found = model.compute_exit_logits(0, exits(model, ids).exit_states[0])
        assert torch.equal(model(ids, exit_depth=0).logits, found)
        torch.testing.assert_close(found, model(ids, num_recursions=1).logits, atol=LOGITS[torch.float32], rtol=0)


def test_without_the_coda_an_exit_is_read_out_where_it_stopped():
    """Three recursions, no coda in the readout: final norm and head on the state at each boundary."""
    model = tiny_recursive(recursions=4)
    model.add_exit_heads("shared", through_coda=False)
    with torch.no_grad():
        outputs = exits(model, random_ids(2, 7), return_layer_states=True)
        for depth in range(3):
            # One prelude layer and one block layer per recursion.
            state = outputs.layer_states[1 + depth]
            assert torch.equal(outputs.boundary_states[depth], state)
            assert torch.equal(outputs.exit_states[depth], state)
            torch.testing.assert_close(model.compute_exit_logits(depth, state), model.lm_head(model.model.norm(state)))
    assert len(outputs.layer_states) == 6


def test_exits_leave_the_last_recursion_alone():
    """Branching off changes no bit of the full-depth output."""
    model = tiny_recursive(recursions=4)
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(exits(model, ids).last_hidden_state, model.model(ids, use_cache=False).last_hidden_state)


def test_head_is_its_formula():
    """``W n + B A n`` with its own norm, and ``w · h/rms(h) + b`` for the test."""
    model = tiny_recursive()
    model.add_exit_heads("low_rank", rank=3)
    head = model.exit_heads[0]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        h = torch.randn(5, 32)
        n = head.norm.weight * h / h.square().mean(-1, keepdim=True).add(model.config.rms_norm_eps).sqrt()
        wanted = n @ (model.lm_head.weight + head.lora_b @ head.lora_a).T
        torch.testing.assert_close(model.compute_exit_logits(0, h), wanted, atol=LOGITS[torch.float32], rtol=0)
        odds = (h / h.square().mean(-1, keepdim=True).sqrt()) @ head.test.weight[0] + head.test.bias
        torch.testing.assert_close(head.agreement(h), odds, atol=1e-5, rtol=1e-4)


def test_soft_capped_families_cap_exits_too():
    """Gemma 2 bounds its logits, at an exit as at the end."""
    model = tiny_recursive("gemma2")
    model.config.final_logit_softcapping = 0.5
    model.add_exit_heads("norm")
    with torch.no_grad():
        logits = model.compute_exit_logits(0, 100 * exits(model, random_ids(1, 5)).exit_states[0])
    assert float(logits.abs().max()) <= 0.5


@pytest.mark.parametrize("kind", EXIT_HEADS)
def test_heads_come_back_from_disk(tmp_path, kind):
    """Bit-identical, each tensor once, and only those that the kind owns."""
    model = tiny_recursive(recursions=4)
    model.add_exit_heads(kind, rank=3, through_coda=False)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = RecursiveForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(2, 7)
    with torch.no_grad():
        for depth, (mine, theirs) in enumerate(
            zip(exits(model, ids).exit_states, exits(loaded, ids).exit_states, strict=True)
        ):
            assert torch.equal(model.compute_exit_logits(depth, mine), loaded.compute_exit_logits(depth, theirs))
    owned = {"shared": 0, "norm": 1, "low_rank": 3, "full": 2}[kind] + 2
    assert sum(name.startswith("exit_heads.") for name in load_file(tmp_path / "model.safetensors")) == 3 * owned


@pytest.mark.parametrize("through_coda", [True, False])
def test_a_fixed_depth_generates_as_its_exit_says(tmp_path, through_coda):
    """Given to from_pretrained: cached, left-padded and batched generation is greedy over the exit's own logits."""
    model = tiny_recursive(recursions=4)
    model.add_exit_heads("norm", through_coda=through_coda)
    model.save_pretrained(tmp_path)
    shallow = RecursiveForCausalLM.from_pretrained(tmp_path, exit_depth=1).eval()
    ids = random_ids(1, 5)
    wanted = ids
    with torch.no_grad():
        for _ in range(8):
            states = exits(model, wanted).exit_states[1]
            wanted = torch.cat([wanted, model.compute_exit_logits(1, states)[:, -1:].argmax(-1)], dim=1)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    assert torch.equal(shallow.generate(ids, **arguments), wanted)
    assert torch.equal(shallow.generate(ids, cache_implementation="static", **arguments), wanted)
    assert torch.equal(model.generate(ids, exit_depth=1, **arguments), wanted)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    batch = torch.cat([padded, random_ids(1, 8)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    assert torch.equal(shallow.generate(batch, attention_mask=mask, **arguments)[0, 3:], wanted[0])


def test_a_fixed_depth_that_does_not_exist_is_refused(tmp_path):
    """In the config, in from_pretrained, and beside a number of recursions."""
    model = tiny_recursive(recursions=2)
    with pytest.raises(ValueError, match=r"no exit after depth 1: those are after \[0\]\. Leave exit_depth"):
        RecursiveConfig(**{**model.config.to_dict(), "exit_depth": 1})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no exit after depth 1"):
        RecursiveForCausalLM.from_pretrained(tmp_path, exit_depth=1)
    with pytest.raises(ValueError, match="Give num_recursions=1 or exit_depth=0, not both"):
        model(random_ids(1, 3), num_recursions=1, exit_depth=0)


def test_a_model_made_from_a_config_has_heads_at_even_odds():
    """Not from a checkpoint: the low-rank residual adds nothing, the test says 0."""
    torch.manual_seed(0)
    config = RecursiveConfig.from_dense(
        tiny_config("llama"), LayerLayout.fold(6, 2, "cycle"), exit_head="low_rank", exit_rank=2
    )
    model = RecursiveForCausalLM(config)
    head = model.exit_heads[0]
    assert isinstance(head, ExitHead)
    assert float(head.agreement(torch.randn(3, 32)).abs().max()) == 0
    assert float(head.lora_b.abs().max()) == 0


def test_what_cannot_exit_is_refused():
    """Sequence sharing, one recursion, unknown kinds, depths that are no boundary, caches."""
    with pytest.raises(ValueError, match="2 recursions in sequence sharing has no boundary"):
        tiny_recursive(sharing="sequence").add_exit_heads("shared")
    with pytest.raises(ValueError, match="1 recursions in cycle sharing"):
        tiny_recursive(recursions=1).add_exit_heads("shared")
    model = tiny_recursive(recursions=4)
    with pytest.raises(ValueError, match=r"Unknown exit_head 'own'\. Use one of: shared, norm, low_rank, full"):
        model.add_exit_heads("own")
    assert model.config.exit_head is None
    with pytest.raises(ValueError, match="exit_rank must be at least 1, got 0"):
        model.add_exit_heads("low_rank", rank=0)
    with pytest.raises(ValueError, match=r"exit_depths=\[3\] are not all depths that run .* those are \[0, 1, 2\]"):
        model.model(random_ids(1, 3), use_cache=False, exit_depths=[3])
    with pytest.raises(ValueError, match=r"exit_depths=\[2\] are not all depths that run .* those are \[0, 1\]"):
        model.model(random_ids(1, 3), use_cache=False, exit_depths=[2], num_recursions=2)
    with pytest.raises(ValueError, match="exclude one another: pass use_cache=False"):
        model.model(random_ids(1, 3), use_cache=True, exit_depths=[0])
