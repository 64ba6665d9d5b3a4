"""The reference implementations against attention, norms and routers of models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from recursify.experiments.kernels.route import gather_normed
from recursify.kernels.depth_norm import add_and_norm
from recursify.kernels.kv_write import store_keys_and_values
from recursify.kernels.paged_attention import attend_pages

LENGTH, PAGE, DEPTHS, POOL = 11, 4, 3, 9


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Prompt:
    """A sequence whose tokens have keys at every depth, in pages and contiguously."""

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
        """PyTorch's attention of each row over the keys of depths ``depth_of_keys [rows, keys]``."""
        rows = []
        for row, depths in enumerate(depth_of_keys):
            keys, values = (tensor[depths, torch.arange(LENGTH)] for tensor in (self.keys, self.values))
            query = self.query[row : row + 1].transpose(0, 1)[None]
            inputs = (query, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], mask[row : row + 1])
            rows.append(F.scaled_dot_product_attention(*inputs, enable_gqa=True, **settings)[0, :, 0])
        return torch.stack(rows)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_a_prompt_at_mixed_depths_is_causal_attention(window):
    """Each row attends to the keys of its own depth, where every depth has pages."""
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


def test_packed_windows_go_by_position():
    """Every third token has keys: a window of 7 positions holds three of them."""
    prompt = Prompt([0, POOL, 2 * POOL])
    positions = 3 * torch.arange(LENGTH)
    key_positions = torch.zeros(3 * POOL * PAGE, dtype=torch.long)
    depth = torch.ones(LENGTH, dtype=torch.long)
    key_positions[prompt.slots + POOL * PAGE] = positions
    found = prompt.attend(depth, window=7, key_positions=key_positions.view(-1, PAGE), positions=positions)
    assert_equal(found, prompt.expected(depth[:, None].expand(-1, LENGTH), CAUSAL.triu(-2)))


def test_keys_are_written_at_the_depth_of_their_row():
    """A row with a negative slot writes nothing, and slots that no row has stay as they are."""
    key, value = (torch.randn(5, 2, 8) for _ in range(2))
    pages = [torch.zeros(4, PAGE, 2, 8) for _ in range(2)]
    slots, depth, offsets = torch.randperm(8)[:5], torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 2])
    slots[3] = -1
    store_keys_and_values(key, value, *pages, slots, depth, offsets)
    written = (slots + offsets[depth] * PAGE)[slots >= 0]
    for new, found in zip((key, value), pages, strict=True):
        expected = torch.zeros(4 * PAGE, 2, 8)
        expected[written] = new[slots >= 0]
        assert torch.equal(found.flatten(0, 1), expected)


@pytest.mark.parametrize(("kind", "adds_one"), [(LlamaRMSNorm, False), (GemmaRMSNorm, True)])
def test_norms_are_those_of_the_families(kind, adds_one):
    """One weight per depth."""
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
    """No weight is applied, and a negative row gives 0."""
    states = torch.randn(6, 16)
    taken, normed = gather_normed(states, torch.tensor([4, -1, 0]))
    assert torch.equal(taken, torch.stack([states[4], torch.zeros(16), states[0]]))
    assert_equal(normed[[0, 2]], F.rms_norm(states[[4, 0]], (16,)))
    assert (normed[1] == 0).all()


def test_arguments_that_do_not_fit_are_refused():
    """Errors name the values that were passed."""
    prompt = Prompt([0, POOL, 2 * POOL])
    depth = torch.zeros(LENGTH, dtype=torch.long)
    with pytest.raises(ValueError, match="key_positions and positions depend on each other"):
        prompt.attend(depth, positions=depth)
    with pytest.raises(ValueError, match="A window must be at least 1, the row's own position; got 0"):
        prompt.attend(depth, window=0)
    with pytest.raises(ValueError, match="depth must have an entry for each of 11 rows, got 10"):
        prompt.attend(depth[1:])
    key, strided = torch.zeros(5, 2, 8), torch.zeros(8, 2, PAGE, 9).transpose(1, 2)[..., :8]
    targets = (depth[:5], depth[:5], prompt.offsets)
    with pytest.raises(ValueError, match=r"got \[5, 2, 8\], \[4, 2, 8\]"):
        store_keys_and_values(key, key[1:], *prompt.pages, *targets)
    with pytest.raises(ValueError, match=r"Pages are not contiguous.* Call contiguous\(\) on them"):
        store_keys_and_values(key, key, strided, strided, *targets)
