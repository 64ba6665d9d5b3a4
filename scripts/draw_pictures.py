"""Draw docs/pictures again: layouts of small random models, by ``recursify inspect --plot``.

Run it with ``.venv/bin/python scripts/draw_pictures.py`` after the drawing has changed.
calibration.svg is made by hand.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from recursify.cli.app import main
from recursify.modeling import RecursiveForCausalLM

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
ENDS = ["--prelude", "2", "--coda", "2"]
LAYOUTS = {
    "cycle": [*ENDS, "--recursions", "2"],
    "sequence": [*ENDS, "--recursions", "2", "--sharing", "sequence"],
    "exits": [*ENDS, "--recursions", "3"],
}
"""File name -> options of ``recursify convert``."""


def run(*arguments: object) -> None:
    """Run the command line in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            raise


def draw() -> None:
    """Write every picture."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768}
    config = LlamaConfig(**sizes, num_hidden_layers=10, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "ten-layers"
        LlamaForCausalLM(config).save_pretrained(dense)
        for name, layout in LAYOUTS.items():
            folder = Path(scratch) / name
            run("convert", dense, "-o", folder, *layout, "--lora-rank", 16, "--no-check")
            if name == "exits":
                model = RecursiveForCausalLM.from_pretrained(folder)
                model.add_exit_heads("norm")
                model.save_pretrained(folder)
            run("inspect", folder, "--plot", PICTURES / f"{name}.svg")


if __name__ == "__main__":
    draw()
