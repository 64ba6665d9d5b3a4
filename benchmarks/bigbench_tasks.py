"""Three multiple-choice tasks of BIG-bench for lm-eval, taken from the ``bigbench`` source distribution on PyPI.

They are the tasks on which a 135M model is well above chance, so that damage by a conversion shows. The source
distribution (358 MB, Apache-2.0) is fetched once, by pip from whatever index pip is set up for; only three JSON files
of it are kept, in a cache folder. BIG-bench asks that its data never appear in training corpora: keep it out of Git.

Run as a script, it fetches the tasks and scores a model::

    python benchmarks/bigbench_tasks.py smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

DISTRIBUTION = "bigbench"
VERSION = "1.0.0"
DEFAULT_CACHE = Path.home() / ".cache" / "recursify" / "bigbench"

TASKS = {"general_knowledge": 70, "phrase_relatedness": 100, "social_iqa": 120}
"""Task -> how many of its examples are taken, from the first on: all of them, but for social_iqa (1954)."""

PROMPT = "Q: {question}\nA:"
"""The choices are not listed: each is scored as the continuation, zero-shot."""

METRICS = ("acc", "acc_norm")


def fetch_tasks(cache: Path = DEFAULT_CACHE) -> dict[str, Path]:
    """The ``task.json`` of every task, from the cache or, the first time, from PyPI.

    Args:
        cache: Folder to keep them in.

    Returns:
        Task name -> file.

    Raises:
        RuntimeError: pip did not deliver the source distribution, or a task is not in it.
    """
    files = {name: cache / VERSION / f"{name}.json" for name in TASKS}
    if all(file.exists() for file in files.values()):
        return files
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _extract(_download(Path(folder)), files)
    return files


def _download(folder: Path) -> Path:
    """Let pip fetch the source distribution; it reads the package's metadata too, and that is the slower half."""
    requirement = f"{DISTRIBUTION}=={VERSION}"
    # PIP_NO_CACHE_DIR: 358 MB are not worth keeping a second time.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", DISTRIBUTION]
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    run = subprocess.run(
        [*command, "--dest", str(folder), requirement], env=environment, capture_output=True, text=True, check=False
    )
    archives = sorted(folder.glob("*.tar.gz"))
    if not archives:
        raise RuntimeError(
            f"pip did not deliver {requirement}: {run.stderr.strip()[-2000:]}\nWith its .tar.gz at hand, copy "
            f"{DISTRIBUTION}/benchmark_tasks/NAME/task.json as NAME.json into the cache folder's '{VERSION}'."
        )
    return archives[0]


def _extract(archive: Path, files: dict[str, Path]) -> None:
    wanted = {f"{DISTRIBUTION}/benchmark_tasks/{name}/task.json": file for name, file in files.items()}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            file = wanted.pop(member.name.partition("/")[2], None)
            if file is None:
                continue
            stream = members.extractfile(member)
            assert stream is not None, "task.json is a regular file"
            data = stream.read()
            json.loads(data)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial_file = file.with_suffix(".part")
            partial_file.write_bytes(data)
            partial_file.replace(file)
            if not wanted:
                return
    raise RuntimeError(f"{archive.name} lacks {', '.join(wanted)}.")


def read_examples(file: Path, count: int) -> list[dict[str, Any]]:
    """The first ``count`` examples of a ``task.json``.

    Returns:
        Rows of ``question``, ``choices`` and ``targets``, the indices of all choices with the best score (more than
        one is right in one example of general_knowledge).
    """
    rows = []
    for example in json.loads(file.read_text(encoding="utf-8"))["examples"][:count]:
        scores = list(example["target_scores"].values())
        targets = [index for index, score in enumerate(scores) if score == max(scores)]
        question = example["input"].strip()
        rows.append({"question": question, "choices": list(example["target_scores"]), "targets": targets})
    return rows


def _dataset(rows: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def _prompt(row: dict[str, Any]) -> str:
    return PROMPT.format(question=row["question"])


def lm_eval_tasks(cache: Path = DEFAULT_CACHE) -> list[dict[str, Any]]:
    """The tasks as lm-eval's task dicts; nothing but the cache is read."""
    return [
        {
            "task": f"bigbench_{name}",
            "custom_dataset": partial(_dataset, read_examples(file, TASKS[name])),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": _prompt,
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["targets"],
            "metric_list": [{"metric": metric} for metric in METRICS],
            "num_fewshot": 0,
        }
        for name, file in fetch_tasks(cache).items()
    ]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path = DEFAULT_CACHE,
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """Score ``model`` on the three tasks with lm-eval.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        cache: See :func:`fetch_tasks`.
        limit: Examples per task, to try things out.
        batch_size: Sequences per forward pass.

    Returns:
        Task -> ``acc``, ``acc_norm`` (log-likelihood per character), their standard errors ``acc_stderr`` and
        ``acc_norm_stderr``, and the number of examples ``n``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=lm_eval_tasks(cache),
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None, "only ranks above 0 get None"
    figures = {}
    for name in TASKS:
        samples = results["samples"][f"bigbench_{name}"]
        scores: dict[str, float] = {"n": len(samples)}
        for metric in METRICS:
            hits = [float(sample[metric]) for sample in samples]
            mean = sum(hits) / len(hits)
            scores[metric] = mean
            scores[f"{metric}_stderr"] = math.sqrt(mean * (1 - mean) / max(1, len(hits) - 1))
        figures[name] = scores
    return figures


def chance(cache: Path = DEFAULT_CACHE) -> dict[str, float]:
    """Accuracy of guessing, by task."""
    found = {}
    for name, file in fetch_tasks(cache).items():
        rows = read_examples(file, TASKS[name])
        found[name] = sum(len(row["targets"]) / len(row["choices"]) for row in rows) / len(rows)
    return found


def main() -> None:
    """Score one model and print a line per task."""
    parser = argparse.ArgumentParser(description="Score a model on three tasks of BIG-bench.")
    parser.add_argument("model", help="a dense or a recursive model: folder, .gguf or smollm2-135m")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--limit", type=int, default=None, help="examples per task")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from recursify.checkpoint.dense_checkpoint import load_tokenizer, open_checkpoint
    from recursify.modeling import RecursiveForCausalLM

    if (Path(arguments.model) / "recursify.json").exists():
        model = RecursiveForCausalLM.from_pretrained(arguments.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    else:
        checkpoint = open_checkpoint(arguments.model)
        model, tokenizer = checkpoint.load_model(), load_tokenizer(checkpoint)
    guesses = chance(arguments.cache)
    for name, scores in evaluate_tasks(model, tokenizer, arguments.cache, limit=arguments.limit).items():
        print(
            f"{name}: acc {scores['acc']:.3f} ± {scores['acc_stderr']:.3f}, acc_norm {scores['acc_norm']:.3f} ± "
            f"{scores['acc_norm_stderr']:.3f}, chance {guesses[name]:.3f}, n {scores['n']}"
        )


if __name__ == "__main__":
    main()
