"""Fine-tune a recursive model on a text file with peft and TRL: a small adapter, and the model itself left as it is.

Run it with ``python examples/finetune_with_lora.py FOLDER --data notes.md --output adapter``. Every depth of a shared
map uses the same adapter. To train all weights and distil from the dense model, use ``recursify uptrain`` instead.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from recursify import RecursiveForCausalLM


def main() -> None:
    """Train, save the adapter, and print how to load it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a recursive model")
    parser.add_argument("--data", required=True, help="a text file; each paragraph is a document")
    parser.add_argument("--output", default="adapter")
    parser.add_argument("--maps", nargs="*", default=["q_proj", "v_proj"], help="linear maps to adapt; none: all")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=100)
    arguments = parser.parse_args()

    model = RecursiveForCausalLM.from_pretrained(arguments.folder)
    targets = model.lora_targets(*arguments.maps)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=arguments.rank, target_modules=targets))
    model.print_trainable_parameters()
    data = load_dataset("text", data_files=arguments.data, sample_by="paragraph", split="train")
    settings = SFTConfig(
        output_dir=f"{arguments.output}-run",
        max_steps=arguments.max_steps,
        max_length=512,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer).train()
    model.save_pretrained(arguments.output)
    print(f"wrote {arguments.output}; load it with PeftModel.from_pretrained(model, '{arguments.output}')")


if __name__ == "__main__":
    main()
