"""Other people's programs against the server: lm-evaluation-harness, and requests made from its own schema."""

from __future__ import annotations

import json

import hypothesis
import pytest
import schemathesis
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from helpers.running import NAME, build, running, tokenizer
from helpers.schedules import model_of

WORDS = ("red", "green", "blue", "grey", "black")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[dict]:
    """One with choices, which scores prompts, and one that generates."""
    file = tmp_path_factory.mktemp("task") / "rows.jsonl"
    rows = [{"question": f"{WORDS[n % 5]} {WORDS[n % 3]}", "choices": WORDS[:3], "answer": n % 3} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    both = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
    }
    choice = {
        "task": "tiny_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generation = {
        "task": "tiny_texts",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "Q:"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [both | choice, both | generation]


def evaluated(model, tasks: list[dict], **arguments) -> dict:
    """What the harness says of every sample: its log-likelihoods, or its text."""
    found = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **arguments,
    )
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda each: each["doc_id"])]
        for name, samples in found["samples"].items()
    }


def test_lm_eval_says_of_the_server_what_it_says_of_the_model(server, tasks, tmp_path):
    """``local-completions`` against the server, and ``hf`` on the same weights: the same scores and the same texts."""
    words = tokenizer()
    words.eos_token = "<s>"  # the harness cannot do without
    words.save_pretrained(tmp_path)
    arguments = {
        "model": NAME,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tmp_path),
        "max_length": 256,
        "max_retries": 1,
    }
    found = evaluated("local-completions", tasks, model_args=arguments, batch_size=4)
    with torch.random.fork_rng():
        hf = HFLM(pretrained=model_of("llama", "deferred"), tokenizer=words, max_length=256)
        expected = evaluated(hf, tasks)
    assert found["tiny_texts"] == expected["tiny_texts"]
    for mine, its in zip(found["tiny_choices"], expected["tiny_choices"], strict=True):
        for ((value, greedy),), ((wanted, wanted_greedy),) in zip(mine, its, strict=True):
            assert (float(value), greedy) == (pytest.approx(float(wanted), abs=1e-3), wanted_greedy)


# --- Schemathesis ------------------------------------------------------------------------------------------------


EXAMPLES = 100


@pytest.fixture(scope="module")
def fuzzed():
    """A server for requests that nobody would send; answers are short, and end soon."""
    with running(build(max_model_len=48), max_tokens=8, max_choices=3, request_timeout=20) as made:
        yield made


@pytest.fixture(scope="module")
def schema(fuzzed):
    """What the server says of itself."""
    return schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")


EXPECTED = {
    "/v1/completions": {200, 400},
    "/v1/chat/completions": {200, 400},
    "/v1/models/{name}": {404},
    "/restart": {409},
}
"""Some requests must be answered and some refused, or nothing has been tried."""


@pytest.mark.parametrize("path", EXPECTED)
def test_no_request_that_the_schema_allows_breaks_it(fuzzed, schema, path):
    """A few hundred drawn requests, whole and broken: no 500, every error in its form, and nothing stays behind."""
    operation = next(each.ok() for each in schema.get_all_operations() if each.ok().path == path)
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=EXAMPLES if "completions" in path else 20,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case) -> None:
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(json.loads(answer.content)["error"]) == {"message", "type", "param", "code"}

    ask()
    assert EXPECTED[path] <= statuses
    assert fuzzed.http.get("/health").status_code == 200
    assert fuzzed.is_idle()
