"""Bad checkpoints get a clear error, before anything is written."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.tiny_models import byte_tokenizer, save_tiny, tiny_config
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.checkpoint.shards import INDEX_FILE
from recursify.convert.pipeline import convert_model, plan_conversion
from recursify.errors import CheckpointError, RecursifyError, UnsupportedModelError


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A private copy of the tiny Llama in one file."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    """A tiny Llama in several shards."""
    save_tiny(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def convert(source, target):
    convert_model(source, target, check=False, calibration_data=[])


def refuse(source, target, error: type[RecursifyError], match: str):
    """Converting ``source`` raises, and nothing is left at or beside the target."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(error, match=match):
        convert(source, target)
    assert sorted(target.parent.iterdir()) == before


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_sharded_reads_as_one_file(sharded, tiny_llama):
    """Shards and a single file hold the same model."""
    one, many = open_checkpoint(str(tiny_llama)), open_checkpoint(str(sharded))
    assert one.parameters == many.parameters
    for name in one.parameters:
        assert torch.equal(one.read(name), many.read(name))


def test_missing_shard(sharded, tmp_path):
    """Named."""
    (sharded / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[-1].unlink()
    refuse(sharded, tmp_path / "out", CheckpointError, r"lacks \d+ of its shards: .*model-0000")


def test_truncated_shard(folder, tmp_path):
    """A file shorter than its header says."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse(folder, tmp_path / "out", CheckpointError, r"model.safetensors' is truncated or not a safetensors file")


def test_header_that_is_garbage(folder, tmp_path):
    """A file that is no safetensors at all."""
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"not json")
    refuse(folder, tmp_path / "out", CheckpointError, "is truncated or not a safetensors file")


def test_index_that_names_an_absent_tensor(sharded, tmp_path):
    """The index promises more than the shards hold."""
    index = json.loads((sharded / INDEX_FILE).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refuse(
        sharded,
        tmp_path / "out",
        CheckpointError,
        r"lists 1 tensors that the shards do not have, first 'model.layers.9",
    )


def test_missing_tensor(folder, tmp_path):
    """A weight that the family has and the file does not."""
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    refuse(folder, tmp_path / "out", CheckpointError, r"lacks the tensor 'model.layers.3.mlp.up_proj.weight'")


def test_wrong_shape(folder, tmp_path):
    """Weights and config of different models."""
    edit_config(folder, intermediate_size=64)
    refuse(folder, tmp_path / "out", CheckpointError, r"has shape \[48, 32\], but config.json requires \[64, 32\]")


def test_wrong_type_in_the_config(folder, tmp_path):
    """The field, its value, and what to do."""
    edit_config(folder, num_hidden_layers="six")
    message = r"'num_hidden_layers' expected int, got str \(value: 'six'\)\. Correct the field, or fetch the model"
    refuse(folder, tmp_path / "out", CheckpointError, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
)
def test_non_finite_weights(folder, tmp_path, value, name):
    """NaN and Inf anywhere: in a shared weight, an embedding, a norm."""

    def spoil(tensors):
        tensors[name].view(-1)[7] = value

    edit_weights(folder, spoil)
    refuse(folder, tmp_path / "out", CheckpointError, rf"'{name}' in .* has 1 NaN or Inf values")


def test_large_finite_weights_are_fine(folder, tmp_path):
    """A sum that overflows is not a weight that does."""
    edit_weights(folder, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].fill_(3e38))
    open_checkpoint(str(folder)).read("model.layers.2.mlp.up_proj.weight")


def test_pickle_is_refused_with_the_way_out(folder, tmp_path):
    """``pytorch_model.bin`` can run any code."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(
        folder, tmp_path / "out", CheckpointError, r"has only pickled weights \(pytorch_model.bin\).*save_pretrained"
    )


def test_folder_without_weights(folder, tmp_path):
    """Nor anything like them."""
    (folder / "model.safetensors").unlink()
    refuse(folder, tmp_path / "out", CheckpointError, "has no weights")


def test_folder_without_config(folder, tmp_path):
    """Not a model folder."""
    (folder / "config.json").unlink()
    refuse(folder, tmp_path / "out", CheckpointError, "has no config.json")


def test_unknown_family(folder, tmp_path):
    """A ``model_type`` that transformers has never heard of."""
    edit_config(folder, model_type="lama")
    refuse(
        folder, tmp_path / "out", UnsupportedModelError, r"transformers does not support the model .*model_type 'lama'"
    )


def test_model_that_is_no_language_model(folder, tmp_path):
    """A vision transformer."""
    edit_config(folder, model_type="vit")
    refuse(folder, tmp_path / "out", UnsupportedModelError, "'vit' cannot .*: it is not a causal language model")


def test_remote_code_is_refused(folder, tmp_path):
    """Unless trusted."""
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "configuration_x.XConfig"})
    refuse(folder, tmp_path / "out", UnsupportedModelError, r"needs its own Python code.*--trust-remote-code")


def test_recursive_model_is_refused(folder, tmp_path):
    """Converting twice would share the shared."""
    convert(folder, tmp_path / "recursive")
    refuse(tmp_path / "recursive", tmp_path / "out", CheckpointError, r"already a recursive model.*recursify export")


def test_no_such_model(tmp_path):
    """Neither a folder nor a Hub id."""
    refuse("./nowhere", tmp_path / "out", CheckpointError, r"No model at './nowhere'.*an embedded model: smollm2-135m")


def test_hub_that_does_not_answer(tmp_path):
    """Offline, with the reason."""
    refuse(
        "nobody/nothing",
        tmp_path / "out",
        CheckpointError,
        r"'nobody/nothing' is not a local folder, and cannot be downloaded",
    )


def test_file_that_is_no_gguf(folder, tmp_path):
    """A weight file instead of its folder."""
    refuse(folder / "model.safetensors", tmp_path / "out", CheckpointError, "is a file, but not a .gguf")


def test_damaged_gguf(tmp_path):
    """Bytes that only look like one."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    refuse(tmp_path / "model.gguf", tmp_path / "out", CheckpointError, "cannot be read as a GGUF language model")


def test_integer_weights(folder, tmp_path):
    """A quantized checkpoint has no floats to average."""

    def quantize(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)

    edit_weights(folder, quantize)
    refuse(folder, tmp_path / "out", UnsupportedModelError, r"is quantized \('model.layers.2.*' is stored as I8\)")


def test_checkpoint_of_the_bare_model(folder):
    """Names without the ``model.`` in front, as ``AutoModel`` saves them."""
    reference = open_checkpoint(str(folder))
    wanted = reference.read("model.layers.0.mlp.up_proj.weight")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(folder, strip)
    assert torch.equal(open_checkpoint(str(folder)).read("model.layers.0.mlp.up_proj.weight"), wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, tied):
    """And untied ones apart."""
    save_tiny(tmp_path / "dense", tie_word_embeddings=tied)
    convert(tmp_path / "dense", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied


def test_auxiliary_files_are_copied(folder, tmp_path):
    """Tokenizer, chat template, generation config and licence; no stray file."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("mine")
    (folder / "optimizer.pt").write_bytes(b"no")
    convert(folder, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
    } <= written
    assert "optimizer.pt" not in written
    assert byte_tokenizer()("abc")["input_ids"] == _tokenizer(tmp_path / "out")("abc")["input_ids"]


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_dense_model_loads_from_the_checkpoint(family, tmp_path):
    """The control is the dense model itself, computed buffers included."""
    dense = save_tiny(tmp_path / "dense", family)
    loaded = open_checkpoint(str(tmp_path / "dense")).load_model()
    ids = torch.arange(2, 26).view(2, 12)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(
    ("family_out", "changed"),
    [("granite", "embeddings before its first layer"), ("cohere", "logits behind the LM head")],
)
def test_family_that_fails_parity_is_refused_by_name(tmp_path, family_out, changed):
    """Families outside the list are tried, and refused where looping does not reproduce them."""
    config = tiny_config("llama").to_dict()
    config.pop("model_type")
    from transformers import AutoConfig

    fields = {"logits_scaling": 3.0, "embedding_multiplier": 2.0} if family_out == "granite" else {"logit_scale": 0.3}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(family_out, **{**config, **fields}))
    dense.save_pretrained(tmp_path / "dense")
    refuse(
        tmp_path / "dense", tmp_path / "out", UnsupportedModelError,
        rf"'{family_out}' cannot be made recursive: it changes the {changed}.*Supported families: llama, mistral",
    )  # fmt: skip


def test_family_outside_the_list_that_passes_is_converted(tmp_path):
    """With a warning in the plan."""
    from transformers import AutoConfig

    config = tiny_config("llama").to_dict()
    config.pop("model_type")
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", **{**config, "layer_norm_eps": 1e-5}))
    dense.save_pretrained(tmp_path / "dense")
    plan = plan_conversion(tmp_path / "dense", calibration_data=[])
    assert "is not a tested one" in plan.warnings[0]


def test_refused_families_say_why(tmp_path):
    """GPT-2's weights are no ``nn.Linear``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32)).save_pretrained(tmp_path / "dense")
    refuse(tmp_path / "dense", tmp_path / "out", UnsupportedModelError, r"'gpt2' cannot be made recursive: .*Conv1D")
