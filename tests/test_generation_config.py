"""One rule for ``generation_config.json``, whoever generates, with dense and recursive models.

EOS tokens of both configs end every text. The sampling defaults of the file hold where a user gives no value, in
``generate``, ``chat`` and ``serve``; parameters of ``Engine`` are taken as they are, and ``bench`` is greedy.
"""

from __future__ import annotations

import io
import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recursify
from helpers.command_line import run
from helpers.running import NAME, TEMPLATE, running
from helpers.tiny_models import byte_tokenizer, convert_tiny, save_tiny
from recursify import Engine, SamplingParams, generate_text, load_model
from recursify.bench.contestants import generate_batch_runner, generate_runner
from recursify.bench.workload import Workload
from recursify.checkpoint.generation_defaults import GenerationDefaults
from recursify.checkpoint.loading import is_recursive
from recursify.errors import CheckpointError

PROMPT = "<user>hi\n<assistant>"
"""What the template makes of a message ``hi``."""


@pytest.fixture(scope="module", params=["dense", "recursive"])
def folder(request, tmp_path_factory):
    """The folder of a tiny model without EOS tokens, with a chat template."""
    home = tmp_path_factory.mktemp(request.param)
    save_tiny(home / "dense")
    if request.param == "recursive":
        convert_tiny(home / "dense", home / "recursive", lora_rank=4)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / request.param)
    return home / request.param


@pytest.fixture
def sets(folder):
    """Callable that writes ``generation_config.json``, and optionally the EOS tokens of ``config.json``."""
    config = (folder / "config.json").read_text(encoding="utf-8")

    def write(eos=None, **fields) -> None:
        (folder / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")
        changed = json.loads(config) | {"eos_token_id": eos}
        (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")

    yield write
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)


def plain(folder, **options) -> list[int]:
    """New tokens of transformers itself on the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    return model.generate(ids, **{"max_new_tokens": 12, **options})[0, ids.shape[1] :].tolist()


def text(tokens: list[int]) -> str:
    return byte_tokenizer().decode(tokens, skip_special_tokens=True)


def chat(folder, capsys, monkeypatch, *options) -> str:
    """Answer of ``recursify chat``."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert run("chat", folder, *options) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_every_end_of_both_configs_ends_a_text(folder, sets, capsys, monkeypatch):
    """A list in ``generation_config.json`` alone, as transformers does, and one token of ``config.json`` besides."""
    free = plain(folder)
    _, second, first, *_ = dict.fromkeys(free)
    sets(eos_token_id=[2, first])
    expected = plain(folder)
    assert expected == free[: free.index(first) + 1]
    for eos, tokens in ((None, expected), (second, free[: free.index(second) + 1])):
        sets(eos, eos_token_id=[2, first])
        (output,) = Engine.from_pretrained(folder).generate([PROMPT], SamplingParams(max_tokens=12))
        assert (output.token_ids, output.finish_reason) == (tokens, "stop")
        assert generate_text(folder, PROMPT, max_new_tokens=12).text == text(tokens)
        assert output.text == chat(folder, capsys, monkeypatch, "--max-tokens", 12) == text(tokens[:-1])
        (whole,) = Engine.from_pretrained(folder).generate([PROMPT], SamplingParams(max_tokens=12, ignore_eos=True))
        assert whole.token_ids == free


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 1.4, "do_sample": False, "temperature": 0.7, "top_k": 3},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
        {"do_sample": True, "min_p": 0.1, "top_k": 0},
    ],
)
def test_generate_obeys_the_file_as_transformers_does(folder, sets, fields):
    """The same text with the same seed."""
    free = generate_text(folder, PROMPT, max_new_tokens=12).text
    sets(**fields)
    assert generate_text(folder, PROMPT, max_new_tokens=12).text == text(plain(folder)) != free


def test_there_is_no_hidden_top_k(folder, sets):
    """transformers keeps 50 tokens where the file says nothing of it; the engine, and so ``generate``, all."""
    sets(do_sample=True, temperature=4.0)
    assert generate_text(folder, PROMPT, max_new_tokens=12).text == text(plain(folder, top_k=0)) != text(plain(folder))


def test_chat_and_serve_obey_the_file(folder, sets, capsys, monkeypatch):
    """Those of the engine with the same parameters, greedy and sampled; a value that is given wins."""
    for fields in (
        {"do_sample": False, "repetition_penalty": 1.4, "max_new_tokens": 9},
        {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "max_new_tokens": 9},
    ):
        sets(**fields)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        params = {name: fields[name] for name in names if name in fields}
        engine = Engine.from_pretrained(folder)

        def answer(engine=engine, **more) -> str:
            return engine.generate([PROMPT], SamplingParams(**{"max_tokens": 9, "seed": 0, **more}))[0].text

        assert chat(folder, capsys, monkeypatch) == answer(**params) != answer()
        given = ("--temperature", 0.9, "--top-k", 5, "--repetition-penalty", 1, "--max-tokens", 7)
        named = {"temperature": 0.9, "top_k": 5, "repetition_penalty": 1.0, "max_tokens": 7}
        assert chat(folder, capsys, monkeypatch, *given) == answer(**params | named)
        with running(partial(Engine.from_pretrained, folder, num_pages=64)) as made:

            def served(made=made, **more) -> str:
                messages = [{"role": "user", "content": "hi"}]
                found = made.client.chat.completions.create(model=NAME, messages=messages, seed=0, extra_body=more)
                return found.choices[0].message.content

            assert served() == answer(**params)
            assert served(**named) == answer(**params | named)
            neutral = {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
            assert served(**neutral) == answer()


def test_serve_samples_where_the_file_does_not_say(folder, sets):
    """OpenAI's default is temperature 1; ``generate``, ``chat`` and ``Engine`` are greedy there."""
    sets(top_k=7)
    model, _ = load_model(folder)
    defaults = GenerationDefaults.of(model)
    greedy = {"temperature": 0.0, "top_k": 7, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert defaults.sampling({}) == greedy
    assert defaults.sampling({}, samples=True) == greedy | {"temperature": 1.0}
    assert defaults.sampling({"temperature": 0.3, "top_k": None}) == greedy | {"temperature": 0.3}
    assert SamplingParams().temperature == 0


def test_options_win_over_the_file(folder, sets):
    """In ``generate``: each sampling option, and the number of tokens."""
    sets(do_sample=True, temperature=2.0, top_k=3, repetition_penalty=1.5, max_new_tokens=3)
    assert generate_text(folder, PROMPT).num_tokens == 3
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.2}
    expected = plain(folder, do_sample=True, **options)
    assert generate_text(folder, PROMPT, max_new_tokens=12, **options).text == text(expected)
    greedy = plain(folder, do_sample=False, repetition_penalty=1.0)
    assert generate_text(folder, PROMPT, max_new_tokens=12, temperature=0, repetition_penalty=1).text == text(greedy)


def test_other_fields_are_named_and_not_applied(folder, sets, caplog):
    """Nowhere, so that ``generate`` and the engine agree."""
    free = generate_text(folder, PROMPT, max_new_tokens=12).text
    assert not caplog.records
    sets(no_repeat_ngram_size=1, suppress_tokens=[5], num_beams=1, typical_p=1.0)
    assert text(plain(folder)) != free
    assert generate_text(folder, PROMPT, max_new_tokens=12).text == free
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("recursify")]
    assert "sets no_repeat_ngram_size=1, suppress_tokens=[5], which Recursify does not apply" in warning


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 7}, r"top_p in generation_config.json must be a number above 0 and at most 1, got 7"),
        ({"temperature": "hot"}, r"temperature in generation_config.json must be a number"),
        ({"repetition_penalty": 0}, r"repetition_penalty in generation_config.json must be a number above 0, got 0"),
    ],
)
def test_values_out_of_range_are_named(folder, sets, fields, message):
    sets(**fields)
    with pytest.raises(CheckpointError, match=message):
        generate_text(folder, PROMPT)


def test_a_damaged_file_is_an_error(folder, sets):
    sets()
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json' does not load: .*Correct or remove it"):
        recursify.load_model(folder)


def test_bench_is_greedy_and_ends_nothing(folder, sets):
    """All contestants generate all tokens, the likeliest ones, whatever the file sets."""
    free = plain(folder)
    sets(eos_token_id=free[2], repetition_penalty=2.0, do_sample=True, temperature=9.0)
    model, tokenizer = load_model(folder)
    prompt = tokenizer(PROMPT)["input_ids"]
    workload = Workload(prompts=[prompt], new_tokens=[12], concurrency=1, context=64)
    seen: list[torch.Tensor] = []
    generate = model.generate
    model.generate = lambda *arguments, **options: seen.append(generate(*arguments, **options))
    generate_runner(model)(workload)
    assert seen[0][0, len(prompt) :].tolist() == free
    assert model.generation_config.repetition_penalty == 2.0
    assert generate_batch_runner(model)(workload).latencies


WRONG = {
    "is a list": ([1, 2], "it holds a list, not an object"),
    "text as EOS": ({"eos_token_id": "</s>"}, "eos_token_id must be a token id, got '</s>'"),
    "nested EOS": ({"eos_token_id": [[5]]}, r"eos_token_id must be a token id, got \[\[5\]\]"),
    "text as a number": ({"do_sample": True, "top_k": "40"}, "top_k must not be text, got '40'"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_wrong_types_are_named(folder, sets, tmp_path, content, message):
    """One error with the file, for loading as for converting, before anything is written."""
    sets()
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"generation_config.json' does not load: .*{message}.*remove it"):
        load_model(folder)
    if not is_recursive(folder):
        with pytest.raises(CheckpointError, match=message):
            recursify.convert_model(folder, tmp_path / "out", calibration_data=[])
    assert not [*tmp_path.iterdir()]
