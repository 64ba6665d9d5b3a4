"""Where shared weights come from: the golden index maps, and their arithmetic."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_models import convert_tiny, save_tiny
from recursify.convert.initialization import INITIALIZATIONS, average, find_initialization
from recursify.errors import PlanError
from recursify.modeling import LayerLayout

STEPWISE = [
    # layers, recursions, sharing, dense layers chosen (papers' formula: linspace, halves to even)
    ("Gemma-2B", 18, 2, "cycle", [0, 2, 4, 6, 8, 11, 13, 15, 17]),
    ("Gemma-2B", 18, 3, "cycle", [0, 3, 7, 10, 14, 17]),
    ("TinyLlama-1.1B", 22, 2, "cycle", [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21]),
    ("Pythia-1B", 16, 2, "cycle", [0, 2, 4, 6, 9, 11, 13, 15]),
    ("6 layers", 6, 2, "cycle", [0, 2, 5]),
    ("8 layers", 8, 2, "cycle", [0, 2, 5, 7]),
    ("12 layers", 12, 2, "cycle", [0, 2, 4, 7, 9, 11]),
    ("4 layers", 4, 2, "cycle", [0, 3]),
    ("12 layers", 12, 3, "cycle", [0, 4, 7, 11]),
    ("24 layers", 24, 3, "cycle", [0, 3, 7, 10, 13, 16, 20, 23]),
    ("Qwen2-1.5B", 28, 2, "cycle", [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]),
    ("SmolLM-360M", 32, 2, "middle_cycle", [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26, 28, 30]),
    ("SmolLM-360M", 32, 3, "middle_cycle", [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]),
    ("SmolLM2-135M", 30, 2, "middle_cycle", [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26, 28]),
    ("8 layers", 8, 2, "middle_cycle", [1, 4, 6]),
    ("8 layers", 8, 3, "middle_cycle", [1, 6]),
]


def sources(name: str, layers: int, recursions: int, sharing: str, seed: int = 0) -> list[list[int]]:
    layout = LayerLayout.fold(layers, recursions, sharing)
    return find_initialization(name).sources(layout, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("model", "layers", "recursions", "sharing", "chosen"), STEPWISE)
def test_stepwise_goldens(model, layers, recursions, sharing, chosen):
    """Evenly spaced layers with the first and last fixed."""
    assert sources("stepwise", layers, recursions, sharing) == [[layer] for layer in chosen]


@pytest.mark.parametrize(
    ("sharing", "tied"),
    [
        ("cycle", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("sequence", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("middle_cycle", [[1, 4], [2, 5], [3, 6]]),
        ("middle_sequence", [[1, 2], [3, 4], [5, 6]]),
    ],
)
def test_average_ties_what_the_scheme_ties(sharing, tied):
    """The layers averaged are those that run on the shared weight."""
    assert sources("average", 8, 2, sharing) == tied


def test_lower_and_upper():
    """The first and the last layers of the inner ones."""
    assert sources("lower", 8, 2, "middle_cycle") == [[1], [2], [3]]
    assert sources("upper", 8, 2, "middle_cycle") == [[4], [5], [6]]
    assert sources("lower", 8, 2, "cycle") == [[0], [1], [2], [3]]
    assert sources("upper", 8, 2, "cycle") == [[4], [5], [6], [7]]


def test_random_choice_is_sorted_seeded_and_without_repeats():
    """The same seed chooses the same layers."""
    first = [layer for [layer] in sources("random_choice", 30, 2, "middle_cycle", seed=3)]
    assert first == sorted(set(first))
    assert len(first) == 14
    assert min(first) >= 1
    assert max(first) <= 28
    assert [[layer] for layer in first] == sources("random_choice", 30, 2, "middle_cycle", seed=3)
    assert [[layer] for layer in first] != sources("random_choice", 30, 2, "middle_cycle", seed=4)


@pytest.mark.parametrize("name", sorted(INITIALIZATIONS))
def test_every_strategy_feeds_every_block_layer(name):
    """To register is to be tested."""
    layout = LayerLayout.fold(12, 3, "middle_sequence", num_prelude_layers=2, num_coda_layers=1)
    chosen = find_initialization(name).sources(layout, torch.Generator().manual_seed(0))
    assert len(chosen) == layout.block_size
    assert all(2 <= position <= 10 for group in chosen for position in group)


def test_unknown_strategy_lists_those_that_exist():
    """A misspelt name is answered with the names."""
    with pytest.raises(PlanError, match=r"Unknown initialization 'mean'\. Use one of: auto, stepwise, average"):
        find_initialization("mean")


def test_average_is_the_mean_in_float32():
    """Rounded once, also for bfloat16 weights."""
    weights = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
    torch.testing.assert_close(average(weights), sum(w.float() for w in weights) / 3)


def test_uniform_fisher_is_the_average():
    """Equal curvature everywhere leaves the plain mean."""
    weights = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    uniform = [torch.full((7, 5), 0.3)] * 3
    torch.testing.assert_close(average(weights, uniform), average(weights))


def test_fisher_follows_the_curvature():
    """Where only one layer has curvature, its weight is taken; where none has, the mean."""
    weights = [torch.zeros(1, 2), torch.ones(1, 2)]
    importances = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])]
    torch.testing.assert_close(average(weights, importances), torch.tensor([[1.0, 0.5]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("initialization", ["stepwise", "average", "lower", "upper", "random_choice"])
@pytest.mark.parametrize("tie_norms", [False, True])
def test_written_weights_are_the_strategy_s(tmp_path, initialization, tie_norms):
    """The files hold what the strategy says: weights, and norms own or tied."""
    dense = save_tiny(tmp_path / "dense", "qwen2")
    model = convert_tiny(
        tmp_path / "dense", tmp_path / "out", sharing="cycle", lora_rank=0, initialization=initialization,
        tie_norms=tie_norms,
    )  # fmt: skip
    layout = model.config.layout
    fed_by = find_initialization(initialization).sources(layout, torch.Generator().manual_seed(0))
    layers = dense.model.layers
    for index, layer in enumerate(model.model.block):
        wanted = torch.stack([layers[p].mlp.up_proj.weight for p in fed_by[index]]).mean(0)
        torch.testing.assert_close(layer.mlp.up_proj.linear.weight, wanted)
        for depth, position in enumerate(layout.positions(index)):
            own = layers[position].self_attn.q_proj.bias
            tied = torch.stack([layers[p].self_attn.q_proj.bias for p in fed_by[index]]).mean(0)
            bias = layer.self_attn.q_proj.bias
            torch.testing.assert_close(bias[0 if tie_norms else depth], tied if tie_norms else own)


def test_random_is_drawn_anew(tmp_path):
    """From-scratch weights are seeded, and unlike the dense ones."""
    save_tiny(tmp_path / "dense")
    first = convert_tiny(tmp_path / "dense", tmp_path / "a", initialization="random", lora_rank=0, seed=1)
    again = convert_tiny(tmp_path / "dense", tmp_path / "b", initialization="random", lora_rank=0, seed=1)
    other = convert_tiny(tmp_path / "dense", tmp_path / "c", initialization="random", lora_rank=0, seed=2)

    def weight(model):
        return model.model.block[0].mlp.up_proj.linear.weight

    assert torch.equal(weight(first), weight(again))
    assert not torch.equal(weight(first), weight(other))
    assert 0.15 < weight(first).std() < 0.25
