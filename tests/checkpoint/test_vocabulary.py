"""A tokenizer with more entries than the model: they may be there, and using one is one error in every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.command_line import run
from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny
from recursify.checkpoint.vocabulary import require_known_tokens
from recursify.engine import Engine
from recursify.errors import EngineError, TextError
from recursify.evaluation.tasks import _lm_eval_model
from recursify.modeling import RecursiveForCausalLM

MESSAGE = "The tokenizer has 298 entries, and token 297 ('<unused39>') is not in the model's vocabulary of 260 entries"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
WORDS = "some plain words " * 60


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense and a recursive model of 260 entries with a tokenizer of 298, and texts."""
    home = tmp_path_factory.mktemp("vocabulary")
    save_tiny(home / "dense")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(40)])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / "dense")
    model = convert_tiny(home / "dense", home / "model", lora_rank=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_exit_heads("norm")
    model.save_pretrained(home / "model")
    (home / "plain.txt").write_text(WORDS, encoding="utf-8")
    (home / "used.txt").write_text(f"a <unused39> {WORDS}", encoding="utf-8")
    return home


def commands(models, text: str, out) -> dict[str, list]:
    """Every command that tokenizes, on a text."""
    model, dense, file = models / "model", models / "dense", models / f"{text}.txt"
    prompt = "hello <unused39>" if text == "used" else "hello"
    data = ["--data", file, "--length", 32]
    training = ["--max-tokens", 128, "--batch-size", 2, "--eval-sequences", 2, "--kl-weight", 0]
    return {
        "convert": ["convert", dense, "-o", out, "--calibration-data", file, "--calibration-tokens", 512,
                    "--calibration-length", 64, "--lora-rank", 2, "--no-check"],
        "perplexity": ["perplexity", model, *data],
        "calibrate-exits": ["calibrate-exits", model, *data, "--policy", "confidence", "--dry-run"],
        "generate": ["generate", model, prompt, "--max-new-tokens", 2],
        "chat template": ["generate", model, prompt, "--chat", "--max-new-tokens", 2],
        "uptrain": ["uptrain", model, "-o", out, *data, *training],
    }  # fmt: skip


@pytest.mark.parametrize("command", commands(Path("."), "plain", "out"))
def test_commands(models, tmp_path, capsys, command):
    """Both sizes, the token and what to do, and nothing written."""
    out = tmp_path / "out"
    assert run(*commands(models, "used", out)[command]) == 1
    err = capsys.readouterr().err
    assert MESSAGE in err
    assert "Use the tokenizer of the model" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert run(*commands(models, "plain", out)[command]) == 0


def test_engine_and_its_chats(models):
    """Text of a prompt, ids of a program, and a conversation."""
    engine = Engine.from_pretrained(models / "model", kv_cache_memory_bytes=2**20)
    with pytest.raises(EngineError, match="tokenizer has 298 entries, and token 297"):
        engine.generate(["hello <unused39>"])
    with pytest.raises(EngineError, match=r"Token 300 is not in the model's vocabulary of 260 entries\. Give ids from"):
        engine.generate([[300]])
    ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": "<unused39>"}], return_dict=True)
    with pytest.raises(EngineError, match="tokenizer has 298 entries, and token 297"):
        engine.add(ids["input_ids"])


def test_benchmark(models, capsys):
    """Prompts of the benchmark, which are the held-out text."""
    save_tiny(models / "small", vocab_size=100)
    assert run("bench", models / "small", "--new", 4, "--concurrency", 1, "--rounds", 1) == 1
    assert "is not in the model's vocabulary of 100 entries" in capsys.readouterr().err


def test_tasks(models):
    """What lm-eval encodes: texts begin with BOS if the tokenizer adds it, in every version of lm-eval."""
    model = RecursiveForCausalLM.from_pretrained(models / "model").eval()
    runner = _lm_eval_model(model, byte_tokenizer("<s> $A"), 2)
    assert runner.tok_encode("ab")[0] == 1
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(40)])
    runner = _lm_eval_model(model, tokenizer, 2)
    assert runner.tok_encode("ab") == tokenizer("ab")["input_ids"]
    for encode in (lambda: runner.tok_encode("a <unused39>"), lambda: runner.tok_batch_encode(["a", "b <unused39>"])):
        with pytest.raises(TextError, match="tokenizer has 298 entries"):
            encode()


@pytest.mark.parametrize(("ids", "message"), [([3, -1], "Token -1 is not"), ([260], "Token 260 is not")])
def test_ids_of_a_program(ids, message):
    """Without a tokenizer, or outside it, the range is named."""
    with pytest.raises(
        TextError, match=message + r" in the model's vocabulary of 260 entries\. Give ids from 0 to 259"
    ):
        require_known_tokens(ids, 260)
    require_known_tokens([0, 259], 260)
