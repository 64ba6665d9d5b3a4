"""Quantized checkpoints are refused by their config and by their tensors, before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import save_tiny
from recursify.convert.pipeline import convert_model
from recursify.errors import UnsupportedModelError

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def fp8(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)


def float8_alone(tensors):
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e5m2)


def scales_alone(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_scale"] = torch.ones(1)


def gptq(tensors):
    del tensors[WEIGHT]
    tensors["model.layers.1.mlp.up_proj.qweight"] = torch.zeros(4, 48, dtype=torch.int32)


def bitsandbytes(tensors):
    tensors[WEIGHT] = torch.zeros(768, 1, dtype=torch.uint8)


def plain(tensors):
    pass


@pytest.mark.parametrize(
    ("store", "config", "message"),
    [
        (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}, r"method 'fp8'.*FineGrainedFP8Config\(deq"),
        (
            plain,
            {"quant_method": "bitnet", "linear_class": "autobitlinear"},
            r"method 'bitnet'.*library that quantized",
        ),
        (plain, {"quant_method": "torchao", "quant_type": "int4_weight_only"}, r"method 'torchao'"),
        (plain, {"quant_method": "compressed-tensors"}, r"CompressedTensorsConfig\(dequantize=True\)"),
        (gptq, {"quant_method": "gptq", "bits": 4}, r"method 'gptq'"),
        (fp8, None, rf"'{WEIGHT}' is stored as F8_E4M3"),
        (float8_alone, None, rf"'{WEIGHT}' is stored as F8_E5M2"),
        (scales_alone, None, r"it has the tensor 'model.layers.1.mlp.up_proj.weight_scale'"),
        (gptq, None, r"it has the tensor 'model.layers.1.mlp.up_proj.qweight'"),
        (bitsandbytes, None, rf"'{WEIGHT}' is stored as U8"),
    ],
)
def test_quantized_checkpoint(tmp_path, store, config, message):
    """The method or the tensor, and how to dequantize."""
    save_tiny(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    if config is not None:
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    store(tensors)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=rf"is quantized \(.*{message}"):
        convert_model(tmp_path / "dense", tmp_path / "out", calibration_data=[])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense"]
