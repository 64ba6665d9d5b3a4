"""Linear maps and norms with a depth per row, beside those with one depth."""

import pytest
import torch

from helpers.tolerances import LOGITS
from recursify.engine.layers.mixed_depth import DepthContext, MixedDepthLinear, MixedDepthNorm
from recursify.modeling import PerDepth, RelaxedLinear


def relaxed(rank: int, biases: int, dtype: torch.dtype) -> RelaxedLinear:
    linear = RelaxedLinear(24, 40, num_depths=3, rank=rank, num_biases=biases).to(dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return linear


@pytest.mark.parametrize("counts", [[(0, 1), (1, 63)], [(0, 5), (2, 7)], [(1, 9)], [(0, 100), (1, 1), (2, 30)]])
@pytest.mark.parametrize(("rank", "biases"), [(8, 3), (8, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_all_depths(counts, rank, biases, dtype):
    """Ranks that ``grouped_mm`` takes and one that it does not; depths without a row."""
    stored, spans = relaxed(rank, biases, dtype), DepthContext()
    spans.set(counts, torch.device("cpu"))
    x = torch.randn(spans.num_rows, 1, 24, dtype=dtype)
    expected = torch.cat([stored(x[rows], depth) for depth, rows in spans.slices])
    found = MixedDepthLinear(stored, spans)(x)
    assert found.shape == (spans.num_rows, 1, 40)
    torch.testing.assert_close(
        found, expected, atol=LOGITS.get(dtype, 1e-9), rtol=1e-2 if dtype == torch.bfloat16 else 0
    )


def test_both_forms_of_residuals():
    """The masked product of a GPU's decoding, here on a CPU, is the grouped one."""
    stored, spans = relaxed(8, 0, torch.float32), DepthContext()
    spans.set([(0, 6), (2, 5)], torch.device("cpu"))
    mixed, x = MixedDepthLinear(stored, spans), torch.randn(11, 24)
    torch.testing.assert_close(mixed.masked(x), mixed.grouped(x), atol=LOGITS[torch.float32], rtol=0)


def test_norms_of_heads_and_states():
    """Rows are the first axis, however many follow."""
    copies = [torch.nn.LayerNorm(8) for _ in range(3)]
    for number, norm in enumerate(copies):
        torch.nn.init.constant_(norm.bias, number)
    spans = DepthContext()
    spans.set([(0, 2), (2, 3)], torch.device("cpu"))
    for shape in ((5, 1, 8), (5, 4, 1, 8), (5, 1, 5, 8)):
        x = torch.randn(shape)
        expected = torch.cat([copies[0](x[:2]), copies[2](x[2:])])
        torch.testing.assert_close(MixedDepthNorm(PerDepth(copies), spans)(x), expected, atol=0, rtol=0)
    tied = MixedDepthNorm(PerDepth(copies[:1]), spans)
    torch.testing.assert_close(tied(x), copies[0](x), atol=0, rtol=0)
