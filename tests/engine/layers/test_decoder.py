"""Models of all families in the engine, compared with ``generate``."""

import pytest
import torch

from helpers.small_engine import assert_same_as_generate, greedy, prompts, recursive, small_engine
from helpers.tiny_models import tiny_dense
from helpers.tolerances import LOGITS
from recursify.engine import Engine, SamplingParams


def test_recursive_models_of_all_families(family):
    """Prompts of several chunks, more of them than run at once, at full depth."""
    assert_same_as_generate(recursive(family), 3, 17, 9, 6, max_num_seqs=3)


def test_dense_models_of_all_families(family):
    """A dense model is one recursion of the same engine: the control."""
    engine = assert_same_as_generate(tiny_dense(family), 3, 17, 9, 6, max_num_seqs=3)
    assert engine.stats.mean_recursions == 1


def test_mixed_depths_in_all_families(family):
    """Forced exits put rows of all depths into one call; a batch generates what its requests generate alone."""
    model = recursive(family)
    asked = prompts(5, 11, 4)
    params = [SamplingParams(max_tokens=9, forced_depths=table) for table in ((0, 1), (1, 0, 0), (1,))]
    together = small_engine(model, max_num_seqs=3).generate(asked, params)
    alone = [Engine(model, max_num_seqs=1).generate([each], its)[0] for each, its in zip(asked, params, strict=True)]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.depths for output in together] == [output.depths for output in alone]
    assert together[0].depths == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_depths_without_rotation():
    """SmolLM3 with a block whose layers rotate at one depth and not at another."""
    dense = {"no_rope_layers": [1, 1, 0, 0, 1, 1]}
    model = recursive("smollm3", recursions=2, dense=dense)
    assert len({view.self_attn.use_rope for view in model.model.block[0].views}) == 2
    assert_same_as_generate(model, 7, 12, max_num_seqs=2)


@pytest.mark.parametrize("fields", [{"sharing": "sequence"}, {"lora_rank": 0}, {"tie_norms": True}])
def test_other_models(fields):
    """Sequence sharing, which has no boundary, is one recursion; no residuals; tied norms."""
    model = recursive(recursions=2, **fields)
    assert_same_as_generate(model, 7, 12, max_num_seqs=2)


def test_another_number_of_recursions():
    """Scaled steps are hooks of the family's layers, which the engine's layers keep."""
    model = recursive().with_recursions(3)
    assert model.config.residual_scale != 1
    assert_same_as_generate(model, 7, 12, max_num_seqs=2)


def test_bfloat16():
    """Rows of both depths in one call; log-probabilities are the model's, as far as sums in another order let them."""
    model = recursive().bfloat16()
    outputs = small_engine(model).generate(prompts(7, 12), SamplingParams(max_tokens=9, logprobs=0))
    for prompt, output in zip(prompts(7, 12), outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.float().log_softmax(-1)
        for row, token, found in zip(expected, output.token_ids, output.logprobs, strict=True):
            assert found == {token: pytest.approx(float(row[token]), abs=LOGITS[torch.bfloat16])}


def test_model_is_as_it_was():
    """The engine's attention is the layers' own only while it runs."""
    model = recursive()
    engine = small_engine(model)
    before, keys = greedy(model, prompts(7)[0]), set(model.state_dict())
    engine.generate(prompts(7), SamplingParams(max_tokens=3))
    assert model.config._attn_implementation == "sdpa"
    assert set(model.state_dict()) == keys
    assert greedy(model, prompts(7)[0]) == before
