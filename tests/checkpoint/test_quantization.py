"""FP8 is dequantized as by transformers; other quantized checkpoints are refused before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from helpers.tiny_models import convert_tiny, random_ids, save_tiny
from recursify.checkpoint.dense_checkpoint import open_checkpoint
from recursify.checkpoint.loading import load_model
from recursify.convert.pipeline import convert_model
from recursify.errors import UnsupportedModelError

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def fp8(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)


def fp8_and_more(tensors):
    fp8(tensors)
    tensors["model.layers.1.mlp.up_proj.input_scale"] = torch.ones(1)


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


def write(folder, store, config):
    """Write a tiny model, its tensors changed by ``store`` and its quantization stated by ``config``."""
    save_tiny(folder)
    file = folder / "config.json"
    if config is not None:
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    tensors = load_file(folder / "model.safetensors")
    store(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("store", "config", "message"),
    [
        (float8_alone, {"quant_method": "fp8"}, r"method 'fp8'.*FineGrainedFP8Config\(dequantize=True\)"),
        (fp8_and_more, {"quant_method": "fp8"}, r"method 'fp8'"),
        (
            plain,
            {"quant_method": "bitnet", "linear_class": "autobitlinear"},
            r"method 'bitnet'.*library that quantized",
        ),
        (plain, {"quant_method": "torchao", "quant_type": "int4_weight_only"}, r"method 'torchao'"),
        (plain, {"quant_method": "compressed-tensors"}, r"CompressedTensorsConfig\(dequantize=True\)"),
        (gptq, {"quant_method": "gptq", "bits": 4}, r"method 'gptq'"),
        (fp8, None, rf"'{WEIGHT}' is stored as float8_e4m3fn"),
        (float8_alone, None, rf"'{WEIGHT}' is stored as F8_E5M2"),
        (scales_alone, None, r"it has the tensor 'model.layers.1.mlp.up_proj.weight_scale'"),
        (gptq, None, r"it has the tensor 'model.layers.1.mlp.up_proj.qweight'"),
        (bitsandbytes, None, rf"'{WEIGHT}' is stored as U8"),
    ],
)
def test_quantized_checkpoint(tmp_path, store, config, message):
    """The method or the tensor, and how to dequantize."""
    write(tmp_path / "dense", store, config)
    with pytest.raises(UnsupportedModelError, match=rf"is quantized \(.*{message}"):
        convert_model(tmp_path / "dense", tmp_path / "out", calibration_data=[])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dense"]


def by_blocks(tensors):
    """Quantize every linear map of the layers to FP8, in blocks of 16 x 16 with scales of their own."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 16, 16, columns // 16, 16)
        scales = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_by_blocks(tmp_path, dtype):
    """The weights that transformers dequantizes, and so the same logits, also where the dense model is run."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    write(tmp_path / "dense", by_blocks, config)
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": str(dtype).removeprefix("torch.")}))
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": dtype}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options).eval()
    checkpoint = open_checkpoint(tmp_path / "dense")
    for name in checkpoint.parameters:
        assert torch.equal(checkpoint.read(name).to(dtype), stock.get_parameter(name)), name
    ids = random_ids(2, 9)
    convert_tiny(tmp_path / "dense", tmp_path / "once", num_recursions=1, lora_rank=0)
    for folder in ("once", "dense"):
        model = load_model(tmp_path / folder, dtype=str(dtype).removeprefix("torch."))[0]
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, stock(ids).logits)


def test_fp8_with_a_smaller_last_block(tmp_path):
    """48 rows in blocks of 32: two scales, which transformers gives to 24 rows each."""
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}

    def uneven(tensors):
        fp8(tensors)
        tensors[f"{WEIGHT}_scale_inv"] = torch.tensor([[1.0], [2.0]])

    write(tmp_path / "dense", uneven, config)
    with pytest.raises(UnsupportedModelError, match=r"method 'fp8'.*by the library that quantized it"):
        convert_model(tmp_path / "dense", tmp_path / "out", calibration_data=[])
