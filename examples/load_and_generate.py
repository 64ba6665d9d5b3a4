"""Load a recursive model and continue a prompt, after all recursions and after fewer.

Run it with ``python examples/load_and_generate.py FOLDER --prompt "Once upon a time"``. A model without trained exits
applies its final norm and head after fewer recursions, and generates nonsense.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import recursify  # noqa: F401  (registers recursive models; without recursify: trust_remote_code=True)


def main() -> None:
    """Generate one continuation for every exit depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a recursive model")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False)
    config = AutoConfig.from_pretrained(arguments.folder)
    print(f"{config.num_unique_layers} layers stored, {config.num_hidden_layers} run: {config.layout}")
    for depth in (None, *reversed(config.exit_depths)):
        model = AutoModelForCausalLM.from_pretrained(arguments.folder, exit_depth=depth).eval()
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)[0]
        print(f"\n[{'all recursions' if depth is None else f'exit after depth {depth}'}]")
        print(tokenizer.decode(output, skip_special_tokens=True))


if __name__ == "__main__":
    main()
