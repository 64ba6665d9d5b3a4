"""Load a folder as other users will: in a fresh process with stock transformers, no recursify, an empty module cache.

A script that :mod:`recursify.hub.publication` runs. The argument is the folder; stdin is empty or ``{"ids": [...],
"choices": [...]}``; stdout is ``{"log_probabilities": [...]}`` of ``choices`` after each of ``ids``, in float32.
"""

import json
import sys

sys.modules["recursify"] = None  # type: ignore[assignment]  # makes every import of recursify fail

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main() -> None:
    """Load the model and print the log-probabilities."""
    request = json.loads(sys.stdin.read() or "{}")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
    log_probabilities: list[float] = []
    if request:
        with torch.inference_mode():
            ids = torch.tensor([request["ids"]])
            logits = model(input_ids=ids, num_recursions=model.config.num_recursions, use_cache=False).logits[0]
        choices = torch.tensor(request["choices"])[:, None]
        log_probabilities = logits.float().log_softmax(-1).gather(-1, choices)[:, 0].tolist()
    print(json.dumps({"log_probabilities": log_probabilities}))


if __name__ == "__main__":
    main()
