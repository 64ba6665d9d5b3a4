"""Every family: a recursive model computes what the dense model computes, however it is run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from helpers.tiny_models import convert_tiny, random_ids, save_tiny, tiny_dense
from helpers.tolerances import LOGITS
from recursify.convert.export import export_model
from recursify.convert.parity import fold_exactly
from recursify.modeling import CACHE_ARGUMENT

TOLERANCE = LOGITS[torch.float32]


@pytest.fixture(scope="module")
def converted(family, tmp_path_factory):
    """A tiny dense model on disk and a relaxed recursive one made from it: 1 + 2 x 2 + 1, rank 4."""
    folder = tmp_path_factory.mktemp(family)
    dense = save_tiny(folder / "dense", family)
    model = convert_tiny(folder / "dense", folder / "recursive", lora_rank=4)
    return folder, dense, model


def greedy(model, ids, **arguments):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **arguments)


def test_one_recursion_equals_dense(family):
    """R = 1 stores every layer once and computes the same, to the bit."""
    dense = tiny_dense(family)
    ids = random_ids(2, 19)
    with torch.inference_mode():
        assert torch.equal(fold_exactly(dense, 1)(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("num_recursions", [2, 3])
def test_full_rank_equals_dense(family, tmp_path, num_recursions):
    """Residuals of full rank recover the dense model (RRT section 2.2)."""
    dense = save_tiny(tmp_path / "dense", family)
    model = convert_tiny(
        tmp_path / "dense", tmp_path / "recursive", num_recursions=num_recursions, sharing="cycle", lora_rank="full"
    )
    ids = random_ids(3, 21)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.inference_mode():
        difference = (model(ids, attention_mask=mask).logits - dense(ids, attention_mask=mask).logits)[mask.bool()]
    assert difference.abs().max() < TOLERANCE
    assert torch.equal(greedy(model, ids), greedy(dense, ids))


def test_cached_equals_uncached(converted):
    """Eight greedy steps with and without a cache."""
    _, _, model = converted
    ids = random_ids(2, 13)
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


def test_cached_logits_equal_uncached(converted):
    """Logits over several decoding steps, past the sliding window of the families that have one."""
    _, _, model = converted
    ids = random_ids(2, 17)
    with torch.inference_mode():
        whole = model(ids).logits
        cache = model(ids[:, :5], use_cache=True).past_key_values
        for step in range(5, 17):
            logits = model(ids[:, step : step + 1], past_key_values=cache).logits[:, 0]
            assert (logits - whole[:, step]).abs().max() < TOLERANCE


def test_left_padded_equals_unpadded(converted):
    """A padded row writes what it writes alone."""
    _, _, model = converted
    short, long = random_ids(1, 6, seed=1), random_ids(1, 15, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    together = greedy(model, batch, attention_mask=mask)
    assert torch.equal(together[0, 15:], greedy(model, short)[0, 6:])
    assert torch.equal(together[1, 15:], greedy(model, long)[0, 15:])


def test_static_cache_equals_dynamic(converted):
    """Logits with a preallocated cache, over prefill and several steps."""
    _, _, model = converted
    ids = random_ids(2, 14)
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=16)
        whole = model(ids).logits
        pieces = [model(ids[:, :9], past_key_values=cache).logits]
        for step in range(9, 14):
            pieces.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < TOLERANCE


def test_generate_batch_equals_generate(converted):
    """transformers' paged continuous batching: each position must have a cache slot of its own."""
    _, dense, model = converted
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 12)]
    wanted = [greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    before = model.config._attn_implementation
    if before != "sdpa":  # Gemma 2: its softcap has no sdpa form
        model.set_attn_implementation("paged|eager")
    # Small pages: by default most of the machine's memory is taken, and touched.
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)

    def write(model) -> list[list[int]]:
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages)
        return [outputs[key].generated_tokens for key in sorted(outputs, key=lambda k: int(k.split("_")[-1]))]

    if CACHE_ARGUMENT == "cache" and model.config.dense_model_type == "gpt_neox":
        # transformers 5.24 itself: GPT-NeoX's attention calls the paged cache without an argument that it needs.
        wanted = write(dense)
        assert not any(wanted)
    written = write(model)
    model.set_attn_implementation(before)
    assert written == wanted


def test_unrolled_equals_recursive(converted):
    """The dense export is a stock checkpoint of the family and computes the same."""
    folder, dense, model = converted
    exported = export_model(folder / "recursive", folder / "unrolled", overwrite=True)
    stock = AutoModelForCausalLM.from_pretrained(folder / "unrolled").eval()
    assert type(stock) is type(dense)
    assert exported.max_logit_difference < TOLERANCE
    ids = random_ids(2, 11)
    assert torch.equal(greedy(stock, ids), greedy(model, ids))


LOAD_WITHOUT_RECURSIFY = """
import json, sys
sys.modules["recursify"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.inference_mode():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)), sys.argv[3])
    hidden = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden).shape and hidden, model.model(ids).last_hidden_state)
model.save_pretrained(sys.argv[4])
"""


def test_loads_in_a_fresh_process_without_the_package(converted):
    """Bit-identical logits where recursify cannot be imported, and what that process saves loads again."""
    folder, _, model = converted
    ids = random_ids(2, 12)
    script = [sys.executable, "-c", LOAD_WITHOUT_RECURSIFY, folder / "recursive", json.dumps(ids.tolist())]
    done = subprocess.run([*script, folder / "out.pt", folder / "again"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, written = torch.load(folder / "out.pt")
    with torch.inference_mode():
        assert torch.equal(logits, model(ids).logits)
        again = AutoModelForCausalLM.from_pretrained(folder / "again").eval()
        assert torch.equal(again(ids).logits, logits)
    assert torch.equal(written, model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_folder_holds_each_tensor_once(converted):
    """File bytes are unique parameters times the dtype, within 1 % for the header at real sizes."""
    folder, _, model = converted
    file = folder / "recursive" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == sum(p.numel() * p.element_size() for p in model.parameters())
