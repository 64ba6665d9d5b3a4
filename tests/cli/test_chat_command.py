"""``recursify chat``: streamed answers of a conversation."""

from __future__ import annotations

import io
import re
import shutil

import pytest
import torch

from helpers.command_line import run
from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny
from recursify.cli.conversation import Conversation
from recursify.engine import Engine, SamplingParams
from recursify.errors import EngineError
from recursify.modeling import RecursiveForCausalLM

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with exits and a chat template; and one without a template."""
    home = tmp_path_factory.mktemp("chat")
    save_tiny(home / "dense")
    model = convert_tiny(home / "dense", home / "model", lora_rank=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_exit_heads("norm")
    model.save_pretrained(home / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / "model")
    return home


def engine_of(folder) -> Engine:
    """Of the model, with its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Engine(RecursiveForCausalLM.from_pretrained(folder / "model"), tokenizer, max_num_seqs=1)


def test_lines_are_answered_in_one_conversation(folder, monkeypatch, capsys):
    """The second answer knows the first; /new forgets both."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nmore\n/new\nhi\n/quit\nnever\n"))
    assert run("chat", folder / "model", "--max-tokens", 8, "--system", "Be kind.") == 0
    printed = capsys.readouterr()
    engine, params = engine_of(folder), SamplingParams(max_tokens=8)
    first = "<system>Be kind.\n<user>hi\n<assistant>"
    (one,) = engine.generate([first], params)
    (two,) = engine.generate(
        [f"{first}{one.text}\n<user>more\n<assistant>".replace("<assistant>", "<assistant>")], params
    )
    assert printed.out == f"{one.text}\n{two.text}\n{one.text}\n"
    assert "a new conversation" in printed.err


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_template_that_refuses_is_one_error(folder, monkeypatch, capsys, tmp_path, command):
    """Gemma's raises one for a system message; a damaged template is the same."""
    template = tmp_path / "model" / "chat_template.jinja"
    shutil.copytree(folder / "model", template.parent)
    arguments = {"chat": [], "generate": ["hi", "--chat"]}[command]
    for text, reason in {"{{ raise_exception('no') }}": "no", "{% for": "unexpected 'end of template'"}.items():
        template.write_text(text, encoding="utf-8")
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        assert run(command, template.parent, *arguments) == 1
        assert f"chat template rejects the messages: {reason}" in capsys.readouterr().err


def test_depths_are_shown(folder, monkeypatch, capsys):
    """Under every answer, how many tokens were read at each depth."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert run("chat", folder / "model", "--max-tokens", 9, "--show-depth", "--max-depth", 0) == 0
    # The first token comes from the prompt, which runs all recursions.
    assert re.search(r"■ depth 0 8 +■ depth 1 1", capsys.readouterr().out)


def test_a_conversation_that_is_too_long_goes_on_when_it_begins_again(folder, monkeypatch, capsys):
    """The message says how; what was too long is not part of it."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'x' * 300}\nhi\n"))
    assert run("chat", folder / "model", "--max-tokens", 4) == 0
    printed = capsys.readouterr()
    assert "together more than the 256" in printed.err
    assert "/new" in printed.err
    (expected,) = engine_of(folder).generate(["<user>hi\n<assistant>"], SamplingParams(max_tokens=4))
    assert printed.out == f"{expected.text}\n"


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(folder):
    """And takes nothing of the engine along."""
    conversation = Conversation(engine_of(folder), SamplingParams(max_tokens=50))
    answer = conversation.say("hi")
    text = "".join(next(answer)[0] for _ in range(5))
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    assert not conversation.engine.has_work
    assert conversation.engine.kv_cache.num_used == 0
    with pytest.raises(EngineError, match="together more than"):
        next(conversation.say("y" * 300))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "has no chat template, so it cannot chat. Use recursify generate"),
        (["model", "--threshold", 0.5], "without a policy: threshold. Name a policy"),
        (["model", "--exit", "often"], "Unknown exit policy 'often'"),
        (["model", "--exit", "confidence", "--min-depth", 4], "no exit after depth 4"),
        (["model", "--exit", "oracle"], "'oracle' is a simulation"),
    ],
)
def test_what_cannot_be_done_is_said(folder, monkeypatch, capsys, arguments, message):
    """Before or at the first line, on stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    name, *rest = arguments
    run("chat", folder / name, *rest)
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
