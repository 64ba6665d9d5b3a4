"""Every tensor of a dense folder is used as transformers uses it, or named in an error."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from recursify.checkpoint.dense_checkpoint import SafetensorsFolder, open_checkpoint
from recursify.checkpoint.loading import load_model
from recursify.convert.pipeline import convert_model
from recursify.errors import CheckpointError, UnsupportedModelError


@pytest.fixture
def dense(request, tmp_path):
    """Folder of a tiny model of the family that the test names; Llama by default."""
    save_tiny(tmp_path / "dense", getattr(request, "param", "llama"))
    return tmp_path / "dense"


def edit(folder, change, **fields):
    """Change the tensors on disk, and fields of the config."""
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def stock_logits(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(random_ids(2, 11)).logits


def converted_logits(folder):
    with torch.inference_mode():
        model = convert_tiny(folder, folder.parent / "recursive", num_recursions=1, lora_rank=0)
        return model(random_ids(2, 11)).logits


def test_head_beside_a_config_that_ties_it(dense):
    """transformers unties what is on disk twice with unlike values."""
    edit(dense, lambda tensors: None, tie_word_embeddings=True)
    head = load_file(dense / "model.safetensors")["lm_head.weight"]
    assert torch.equal(converted_logits(dense), stock_logits(dense))
    assert torch.equal(load_file(dense.parent / "recursive" / "model.safetensors")["lm_head.weight"], head)


def test_head_equal_to_the_embedding_stays_tied(dense):
    """Stored twice, as pickles do: one tensor in the conversion."""

    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(dense, tie, tie_word_embeddings=True)
    assert torch.equal(converted_logits(dense), stock_logits(dense))
    assert "lm_head.weight" not in load_file(dense.parent / "recursive" / "model.safetensors")


def test_tied_embedding_under_the_name_of_the_head(dense):
    """The one tensor of two tied ones may have either name."""
    edit(dense, lambda tensors: tensors.pop("model.embed_tokens.weight"), tie_word_embeddings=True)
    assert torch.equal(converted_logits(dense), stock_logits(dense))


def test_check_sees_a_reader_that_drops_a_tensor(dense, monkeypatch):
    """The control of the check is transformers' own reading: a fault of our reader is a difference."""
    edit(dense, lambda tensors: None, tie_word_embeddings=True)

    def tie_regardless(self, tied):
        self.parameters.pop("lm_head.weight")

    monkeypatch.setattr(SafetensorsFolder, "_resolve_ties", tie_regardless)
    result = convert_model(dense, dense.parent / "out", num_recursions=1, lora_rank=0, calibration_data=[])
    assert result.check.comparison.top1_agreement < 0.5


def test_control_does_not_read_through_the_reader(dense, monkeypatch):
    """Nor does a dense model that is loaded for inference."""
    wanted, checkpoint = stock_logits(dense), open_checkpoint(dense)
    monkeypatch.setattr(SafetensorsFolder, "read", lambda self, name: torch.zeros(self.parameters[name].shape))
    with torch.inference_mode():
        assert torch.equal(checkpoint.load_model()(random_ids(2, 11)).logits, wanted)
        assert torch.equal(load_model(dense)[0](random_ids(2, 11)).logits, wanted)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.2.self_attn.q_proj.bias", (32,)),
        ("model.layers.6.mlp.up_proj.weight", (48, 32)),
        ("score.weight", (2, 32)),
    ],
)
def test_tensor_that_the_config_denies(dense, name, shape):
    """A bias, a layer beyond the count, another head: named, with the way to drop it, and nothing is written."""
    edit(dense, lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=rf"has 1 tensors .* does not have: {name}\. .*save_pretrained"):
        convert_model(dense, dense.parent / "out", calibration_data=[])
    assert not (dense.parent / "out").exists()
    AutoModelForCausalLM.from_pretrained(dense).save_pretrained(dense)  # what the message says
    assert torch.equal(converted_logits(dense), stock_logits(dense))


@pytest.mark.parametrize(
    ("dense", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
    indirect=["dense"],
)
def test_left_overs_that_transformers_ignores(dense, names):
    """Buffers of older versions; the masks are integers."""
    edit(dense, lambda tensors: tensors.update({name: torch.ones(4, dtype=torch.uint8) for name in names}))
    assert torch.equal(converted_logits(dense), stock_logits(dense))


def test_missing_tensor_of_a_dense_model_to_run(dense):
    """transformers would fill it with random numbers."""
    edit(dense, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors, first 'model.layers.3.mlp.up_proj"):
        load_model(dense)


def test_code_of_a_family_that_transformers_has_is_not_needed(dense):
    """``auto_map`` of Phi-3 and others: transformers' own class is used, trusted or not."""
    edit(dense, lambda tensors: None, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    for trust in (False, True):
        with torch.inference_mode():
            model = load_model(dense, trust_remote_code=trust)[0]
            assert torch.equal(model(random_ids(2, 11)).logits, stock_logits(dense))
        assert open_checkpoint(dense, trust_remote_code=trust).config.model_type == "llama"


def test_adapter_beside_the_weights(dense):
    """transformers would apply it while loading."""
    (dense / "adapter_config.json").write_text("{}")
    for use in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError, match=r"has an adapter of peft .*merge_and_unload"):
            use(dense)


def test_tensor_that_the_index_leaves_out(dense):
    """transformers reads whole shards."""
    tensors = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").rename(dense / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(set(tensors) - {"model.norm.weight"}, "model-00001-of-00001.safetensors"),
    }
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(converted_logits(dense), stock_logits(dense))


def test_one_file_beside_an_index(dense):
    """The single file is the model, and the shards are what another version left."""
    tensors = load_file(dense / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, dense / "old.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(converted_logits(dense), stock_logits(dense))


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_family_that_exists_in_the_folder_alone(dense, tmp_path, monkeypatch):
    """Trusted, its dense model runs; it is not converted, for transformers has no layers of it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    wanted = stock_logits(dense)
    (dense / "own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(dense, lambda tensors: None, model_type="own_llama", auto_map=auto_map)
    with torch.inference_mode():
        assert torch.equal(load_model(dense, trust_remote_code=True)[0](random_ids(2, 11)).logits, wanted)
    with pytest.raises(UnsupportedModelError, match="'own_llama' cannot be made recursive: it is not a causal"):
        open_checkpoint(dense, trust_remote_code=True)
    with pytest.raises(UnsupportedModelError, match=r"needs its own Python code .*--trust-remote-code"):
        load_model(dense)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_hub_model_is_downloaded_if_it_is_trusted(dense, monkeypatch, trusted):
    """And only then."""
    asked: list[str] = []

    def download(repo_id, revision, allow_patterns):
        asked.extend(allow_patterns)
        return dense

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_checkpoint("owner/name", trust_remote_code=trusted)
    assert ("*.py" in asked) is trusted
