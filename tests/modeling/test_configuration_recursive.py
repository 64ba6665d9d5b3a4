"""The flat config."""

import json

import pytest

from helpers.tiny_models import tiny_config
from recursify.modeling import LayerLayout, LayoutError, RecursiveConfig


def make(family: str = "llama", **fields) -> RecursiveConfig:
    return RecursiveConfig.from_dense(tiny_config(family), LayerLayout.fold(6, 2, "middle_cycle"), **fields)


def test_every_dense_field_is_kept(family):
    """Readers that know nothing of recursion find the dense model's true values, flat."""
    dense = tiny_config(family)
    config = RecursiveConfig.from_dense(dense, LayerLayout.fold(6, 2, "cycle"))
    fields = config.to_dict()
    for key, value in dense.to_dict().items():
        if key not in ("model_type", "architectures", "transformers_version"):
            assert fields[key] == value, key
    assert config.num_hidden_layers == 6
    assert config.num_unique_layers == 3


def test_round_trip(tmp_path, family):
    """Saved and loaded, every field is the same, and the dense config can be had back."""
    config = RecursiveConfig.from_dense(
        tiny_config(family), LayerLayout.fold(6, 3, "cycle"), lora_rank=4, lora_rank_pattern={"1.mlp.down_proj": 2}
    )
    config.save_pretrained(tmp_path)
    loaded = RecursiveConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    back, dense = loaded.dense_config().to_dict(), tiny_config(family).to_dict()
    assert {k: v for k, v in back.items() if k != "dtype"} == {k: v for k, v in dense.items() if k != "dtype"}


def test_json_is_flat_and_complete(tmp_path):
    """``config.json`` spells out fields that equal transformers' defaults, and maps all three Auto classes."""
    make().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "recursive"
    assert fields["dense_model_type"] == "llama"
    assert fields["rms_norm_eps"] == tiny_config("llama").rms_norm_eps
    assert fields["layer_to_block"] == [0, 1, 2, 1, 2, 3]
    assert set(fields["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_ranks_go_from_general_to_specific():
    """The most specific pattern wins, and every rank is clamped to its matrix."""
    config = make(
        lora_rank=8, lora_rank_pattern={"down_proj": 5, "mlp.down_proj": 6, "1.mlp.down_proj": 7, "k_proj": 999}
    )
    assert config.rank_of(0, "self_attn.q_proj", 32, 32) == 8
    assert config.rank_of(0, "mlp.down_proj", 48, 32) == 6
    assert config.rank_of(1, "mlp.down_proj", 48, 32) == 7
    assert config.rank_of(0, "self_attn.k_proj", 32, 16) == 16


def test_misspelt_field_names_the_nearest():
    """transformers would keep an unknown key silently."""
    fields = make().to_dict()
    fields["num_recursion"] = fields.pop("num_recursions")
    with pytest.raises(ValueError, match=r"Unknown config key 'num_recursion'. Did you mean 'num_recursions'\?"):
        RecursiveConfig(**fields)


def test_edited_layout_is_refused():
    """Derived fields must agree with what they derive from."""
    fields = make().to_dict()
    fields["layer_to_block"] = [0, 1, 2, 3, 4, 5]
    with pytest.raises(LayoutError, match=r"config.layer_to_block is .* edited by hand"):
        RecursiveConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dense_model_type", "lama", "Unknown dense_model_type 'lama'"),
        ("format_version", 99, "format_version 99, newer than"),
        ("sharing", "spiral", "Unknown sharing 'spiral'"),
        ("lora_rank", -1, "LoRA ranks cannot be negative"),
        ("num_recursions", "two", r"config.num_recursions is 'two', which is not int\. Correct it in config\.json"),
        ("lora_rank_pattern", {"mlp": "4"}, r"is \{'mlp': '4'\}, which is not dict\[str, int\] \| None"),
        ("exit_thresholds", [0.5, "0.5"], r"which is not list\[float\] \| None"),
        ("tie_norms", "no", "config.tie_norms is 'no', which is not bool"),
    ],
)
def test_wrong_values_are_refused(field, value, message):
    """Each with what is wrong and what to do."""
    with pytest.raises(ValueError, match=message):
        RecursiveConfig(**{**make().to_dict(), field: value})
