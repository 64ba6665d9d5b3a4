"""Load a folder as somebody else will: a fresh process, stock transformers, no recursify, an empty module cache.

Run as a script by :mod:`recursify.hub.publication`, with the folder as its argument and on stdin ``{"ids": [...],
"choices": [...]}`` or nothing; prints ``{"log_probabilities": [...]}``: of ``choices`` after each of ``ids``, float32.
"""

import json
import sys

sys.modules["recursify"] = None  # type: ignore[assignment]  # importing it fails from here on

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main() -> None:
    """Load, read the ids, print what the choices are worth."""
    asked = json.loads(sys.stdin.read() or "{}")
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
    found = []
    if asked:
        with torch.inference_mode():
            ids, whole = torch.tensor([asked["ids"]]), model.config.num_recursions
            logits = model(input_ids=ids, num_recursions=whole, use_cache=False).logits[0]
        chosen = torch.tensor(asked["choices"])[:, None]
        found = logits.float().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
    print(json.dumps({"log_probabilities": found}))


if __name__ == "__main__":
    main()
