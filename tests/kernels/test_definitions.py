"""The references against what models compute: they are what the Triton kernels are compared with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from recursify.experiments.kernels.route import gather_normed
from recursify.kernels.depth_norm import add_and_norm
from recursify.kernels.paged_attention import attend_pages
from recursify.kernels.rope_store import store_keys_and_values

LENGTH, PAGE, DEPTHS, POOL = 11, 4, 3, 9


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Prompt:
    """One text, whose every token went through all depths, in pages and side by side."""

    def __init__(self, offsets: list[int]):
        self.query = torch.randn(LENGTH, 4, 8)
        self.keys, self.values = (torch.randn(DEPTHS, LENGTH, 2, 8) for _ in range(2))
        self.offsets = torch.tensor(offsets)
        self.table = torch.randperm(POOL)[: -(-LENGTH // PAGE)]
        at = torch.arange(LENGTH)
        self.slots = self.table[at // PAGE] * PAGE + at % PAGE
        self.pages = [torch.full((max(offsets) + POOL, PAGE, 2, 8), float("nan")) for _ in range(2)]
        for depth in range(DEPTHS):
            whole = torch.full((LENGTH,), depth)
            store_keys_and_values(self.keys[depth], self.values[depth], *self.pages, self.slots, whole, self.offsets)

    def attend(self, depth: torch.Tensor, **settings) -> torch.Tensor:
        lengths = torch.arange(1, LENGTH + 1)
        tables = self.table.expand(LENGTH, -1)
        return attend_pages(self.query, *self.pages, tables, depth, self.offsets, lengths, **settings)

    def expected(self, depth_of_keys: torch.Tensor, mask: torch.Tensor, **settings) -> torch.Tensor:
        """Row by row, over the keys that ``depth_of_keys [rows, keys]`` names."""
        rows = []
        for row, depths in enumerate(depth_of_keys):
            keys, values = (held[depths, torch.arange(LENGTH)] for held in (self.keys, self.values))
            query = self.query[row : row + 1].transpose(0, 1)[None]
            given = (query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], mask[row : row + 1])
            rows.append(F.scaled_dot_product_attention(*given, enable_gqa=True, **settings)[0, :, 0])
        return torch.stack(rows)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_a_prompt_at_mixed_depths_is_causal_attention(window):
    """With pages per depth, each row over the keys of its own."""
    prompt = Prompt([0, POOL, 2 * POOL])
    depth = torch.randint(0, DEPTHS, (LENGTH,))
    mask = CAUSAL if window is None else CAUSAL.triu(1 - window)
    expected = prompt.expected(depth[:, None].expand(-1, LENGTH), mask, scale=0.3)
    assert_equal(prompt.attend(depth, window=window, scale=0.3), expected)


def test_shared_keys_are_those_that_were_written_last():
    """All offsets are 0."""
    prompt = Prompt([0, 0, 0])
    last = torch.full((LENGTH, LENGTH), DEPTHS - 1)
    assert_equal(prompt.attend(torch.randint(0, DEPTHS, (LENGTH,))), prompt.expected(last, CAUSAL))


def test_latest_keys_are_of_the_deepest_depth_that_a_token_has():
    """But of no deeper one than the row's."""
    prompt = Prompt([0, POOL, 2 * POOL])
    depth, exited = torch.randint(0, DEPTHS, (LENGTH,)), torch.randint(0, DEPTHS, (LENGTH,))
    held = torch.full((POOL * PAGE,), 99)
    held[prompt.slots] = exited
    found = prompt.attend(depth, exit_depths=held.view(POOL, PAGE))
    assert_equal(found, prompt.expected(torch.minimum(depth[:, None], exited), CAUSAL))


def test_copied_keys_and_looked_up_ones_are_alike():
    """Writing the keys of an early token at all deeper depths, and looking them up."""
    prompt = Prompt([0, POOL, 2 * POOL])
    depth, exited = torch.randint(0, DEPTHS, (LENGTH,)), torch.randint(0, DEPTHS, (LENGTH,))
    held = torch.zeros(POOL * PAGE, dtype=torch.int8)
    held[prompt.slots] = exited.to(torch.int8)
    looked_up = prompt.attend(depth, exit_depths=held.view(POOL, PAGE))
    keys, values = (made[exited, torch.arange(LENGTH)] for made in (prompt.keys, prompt.values))
    store_keys_and_values(
        keys, values, *prompt.pages, prompt.slots, exited, prompt.offsets, count=torch.full((LENGTH,), DEPTHS)
    )
    assert_equal(prompt.attend(depth), looked_up)


def test_packed_windows_go_by_position():
    """Every third token is there: a window of 7 positions holds three of them."""
    prompt = Prompt([0, POOL, 2 * POOL])
    positions = 3 * torch.arange(LENGTH)
    held = torch.zeros(3 * POOL * PAGE, dtype=torch.long)
    depth = torch.ones(LENGTH, dtype=torch.long)
    held[prompt.slots + POOL * PAGE] = positions
    found = prompt.attend(depth, window=7, key_positions=held.view(-1, PAGE), positions=positions)
    assert_equal(found, prompt.expected(depth[:, None].expand(-1, LENGTH), CAUSAL.triu(-2)))


@pytest.mark.parametrize("rotary", [8, 4])
def test_stored_keys_are_rotated_as_transformers_does(rotary):
    """Whole, or in their first part only."""
    key, value = (torch.randn(5, 2, 8) for _ in range(2))
    angles = torch.randn(5, rotary // 2).repeat(1, 2)
    pages = [torch.zeros(4, PAGE, 2, 8) for _ in range(2)]
    slots, depth, offsets = torch.randperm(8)[:5], torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 2])
    store_keys_and_values(key, value, *pages, slots, depth, offsets, cos=angles.cos(), sin=angles.sin())
    turned = key.clone()
    turned[..., :rotary] = apply_rotary_pos_emb(
        *(2 * [key[None, ..., :rotary]]), angles.cos()[None], angles.sin()[None], unsqueeze_dim=2
    )[1][0]
    at = slots + offsets[depth] * PAGE
    assert_equal(pages[0].flatten(0, 1)[at], turned)
    assert torch.equal(pages[1].flatten(0, 1)[at], value)


@pytest.mark.parametrize(("kind", "adds_one"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)])
def test_norms_are_those_of_the_families(kind, adds_one):
    """With one weight per depth."""
    norms = [kind(16, eps=1e-5) for _ in range(DEPTHS)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    states, residual, depth = torch.randn(6, 16), torch.randn(6, 16), torch.randint(0, DEPTHS, (6,))
    weight = torch.stack([norm.weight.detach() for norm in norms])
    total, normed = add_and_norm(states, residual, weight, depth, eps=1e-5, adds_one=adds_one)
    assert torch.equal(total, states + residual)
    expected = torch.stack([norms[level](row) for level, row in zip(depth.tolist(), total, strict=True)])
    assert_equal(normed, expected)


def test_gathered_rows_are_normed_as_routers_do():
    """Without a weight; a negative row is 0."""
    states = torch.randn(6, 16)
    taken, normed = gather_normed(states, torch.tensor([4, -1, 0]))
    assert torch.equal(taken, torch.stack([states[4], torch.zeros(16), states[0]]))
    assert_equal(normed[[0, 2]], F.rms_norm(states[[4, 0]], (16,)))
    assert (normed[1] == 0).all()


def test_arguments_that_do_not_fit_are_refused():
    """With what was given."""
    prompt = Prompt([0, POOL, 2 * POOL])
    depth = torch.zeros(LENGTH, dtype=torch.long)
    with pytest.raises(ValueError, match="key_positions and positions go together"):
        prompt.attend(depth, positions=depth)
    with pytest.raises(ValueError, match="Rows come in groups of 4, and 11 are no multiple of that"):
        prompt.attend(depth, group=4)
    with pytest.raises(ValueError, match="A window has 1 position at least, its own; got 0"):
        prompt.attend(depth, window=0)
    with pytest.raises(ValueError, match="depth must have an entry for each of 11 rows, got 10"):
        prompt.attend(depth[1:])
    key, angles = torch.zeros(5, 2, 8), torch.zeros(5, 10)
    given = (key, key, *prompt.pages, depth[:5], depth[:5], prompt.offsets)
    with pytest.raises(ValueError, match=r"an even E of 8 at most, got \[5, 10\]"):
        store_keys_and_values(*given, cos=angles, sin=angles)
