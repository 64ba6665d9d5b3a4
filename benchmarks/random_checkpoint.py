"""Llama checkpoints of any shape with random bfloat16 weights, written one tensor at a time, or as headers alone.

Only the standard library is imported: the weights are made in a process of their own.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "model.safetensors"

FILL = """
import sys, torch
from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
folder, sizes = sys.argv[1], [int(size) for size in sys.argv[2:]]
load_tokenizer(open_checkpoint("smollm2-135m")).save_pretrained(folder)
generator = torch.Generator().manual_seed(0)
with open(folder + "/model.safetensors", "ab") as file:
    for size in sizes:
        values = torch.ones(abs(size), dtype=torch.bfloat16)
        if size > 0:
            values.normal_(0, 0.02, generator=generator)
        file.write(values.view(torch.int16).numpy().tobytes())
"""
"""Appends the tensors, negative sizes as ones, and saves a tokenizer, whose text the calibration needs."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int

    def tensors(self, num_layers: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        hidden, keys = self.hidden, self.hidden // self.heads * self.key_heads
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for index in range(num_layers):
            tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return {**tensors, "model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}

    def config(self, num_layers: int) -> dict[str, object]:
        """Contents of ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "num_hidden_layers": num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def write_headers(folder: Path, shape: Shape, num_layers: int) -> None:
    """Write config and a sparse file of weights, whose header is all that a plan reads."""
    size = _begin(folder, shape, num_layers)
    with (folder / FILE_NAME).open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    _add_tokenizer_and(folder, [])


def write_checkpoint(folder: Path, shape: Shape, num_layers: int) -> None:
    """Write a model with random weights and a tokenizer."""
    _begin(folder, shape, num_layers)
    tensors = shape.tensors(num_layers).values()
    _add_tokenizer_and(folder, [math.prod(shape) * (1 if len(shape) > 1 else -1) for shape in tensors])


def _begin(folder: Path, shape: Shape, num_layers: int) -> int:
    """Write the config and the header of the weights; returns the bytes of the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config(num_layers), indent=2), encoding="utf-8")
    header, offset = {}, 0
    for name, dimensions in shape.tensors(num_layers).items():
        end = offset + 2 * math.prod(dimensions)
        header[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    (folder / FILE_NAME).write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    return offset


def _add_tokenizer_and(folder: Path, sizes: list[int]) -> None:
    command = [sys.executable, "-c", FILL, str(folder), *map(str, sizes)]
    subprocess.run(command, check=True, capture_output=True)
