"""The dense export of a recursive model in llama.cpp: logits and greedy text beside the recursive model's own.

::

    python benchmarks/gguf_export.py MODEL --llama-cpp PATH --output benchmarks/results/gguf_export.json

``PATH`` is a checkout of llama.cpp, for ``convert_hf_to_gguf.py`` (it needs ``pip install sentencepiece gguf``); the
GGUF is then run by llama-cpp-python (``pip install llama-cpp-python``; or its source beside a build of llama.cpp, which
it finds by ``LLAMA_CPP_LIB_PATH``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from quality import commit
from recursify.convert.export import export_model
from recursify.modeling import RecursiveForCausalLM

PROMPT = "Once upon a time"
TEXT = "Once upon a time there was a little girl who lived in a small house at the edge of a large, dark forest."
NEW_TOKENS = 48


def convert(model: Path, llama_cpp: Path, folder: Path) -> Path:
    """The GGUF of the dense export, in float32."""
    export_model(model, folder / "dense", check=False)
    target = folder / "dense.gguf"
    command = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(folder / "dense"), "--outtype", "f32"]
    environment = {**os.environ, "PYTHONPATH": str(llama_cpp / "gguf-py")}
    subprocess.run([*command, "--outfile", str(target)], env=environment, check=True, capture_output=True)
    return target


def measure(model: Path, gguf: Path) -> dict[str, Any]:
    """Both models on the same token ids."""
    from llama_cpp import Llama

    tokenizer = AutoTokenizer.from_pretrained(model)
    recursive = RecursiveForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt, text = (tokenizer(words, return_tensors="pt").input_ids for words in (PROMPT, TEXT))
    with torch.inference_mode():
        mine = recursive(text).logits[0].double().log_softmax(-1).numpy()
        written = recursive.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    llama = Llama(str(gguf), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    assert llama.tokenize(TEXT.encode(), add_bos=False) == text[0].tolist(), "the tokenizers differ"
    llama.eval(text[0].tolist())
    theirs = torch.tensor(np.array(llama.scores[: llama.n_tokens])).double().log_softmax(-1).numpy()
    answer = llama(PROMPT, max_tokens=NEW_TOKENS, temperature=0.0, top_k=1, repeat_penalty=1.0)
    return {
        "tokens": int(text.shape[1]),
        "largest_difference_of_log_probabilities": float(np.abs(mine - theirs)[:, mine.argmax(-1)].max()),
        "kl_nats_per_token": float((np.exp(mine) * (mine - theirs)).sum(-1).mean()),
        "same_first_choice": float((mine.argmax(-1) == theirs.argmax(-1)).mean()),
        "greedy_text": tokenizer.decode(written),
        "greedy_text_in_llama_cpp": answer["choices"][0]["text"],
    }


def main() -> None:
    """Convert, run both, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a recursive model's folder")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(arguments.model, convert(arguments.model, arguments.llama_cpp, Path(scratch)))
    from llama_cpp import __version__ as llama_cpp_python

    facts = {
        "model": arguments.model.name,
        **figures,
        "versions": {name: version(name) for name in ("torch", "transformers", "recursify")}
        | {"llama-cpp-python": llama_cpp_python},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    arguments.output.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
